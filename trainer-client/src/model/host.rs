//! Tensors' values between their device and this process's memory.

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::counters::count_wait;
use super::device::is_cpu;

/// Whether a tensor's values are f32 in this process's memory, where [`kernels`](super::kernels) can have them without a copy.
pub(super) fn on_host<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && is_cpu(&x.device())
}

/// Row-major values as a tensor; on the CPU without a copy.
pub(super) fn from_host<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Copies a tensor's values to the host, row-major; on the CPU without a copy where nobody else holds them.
pub(super) fn to_host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    count_wait();
    match tensor.try_into_vec_as::<f32>() {
        Ok(values) => values,
        Err(error) => panic!("cannot read a tensor from the device: {error}"),
    }
}
