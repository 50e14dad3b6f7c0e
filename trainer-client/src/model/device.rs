//! Where a model computes, and in which precision.

use std::fmt;
use std::str::FromStr;

use burn::tensor::FloatDType;
use serde::{Deserialize, Serialize};

/// A device that a model can be put on.
#[derive(Clone, Debug, PartialEq)]
pub struct Device(pub(super) burn::tensor::Device);

impl Device {
    /// This machine's processor.
    pub fn cpu() -> Self {
        Self(burn::tensor::Device::flex())
    }
}

/// Whether a device is this machine's processor, for which the model has passes of its own (`kernels`) and groups of rows over
/// the cores. Everything else gets tensor operations alone.
pub(super) fn is_cpu(device: &burn::tensor::Device) -> bool {
    #[cfg(test)]
    if tests::ACTS_AS_A_GPU.get() {
        return false;
    }
    *device == burn::tensor::Device::flex()
}

/// A device by the name that people give it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceName {
    /// This machine's processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(usize),
}

/// Why a device cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// The program was built without it.
    #[error("this build knows no CUDA: build sluice-train with --features cuda, or give --device cpu")]
    NotBuilt,
    /// The device did not answer.
    #[error(
        "{0} cannot be used: {1}; check the NVIDIA driver (libcuda.so.1), NVRTC (libnvrtc.so) and CUDA's headers ($CUDA_PATH/include), or give --device cpu"
    )]
    Unusable(DeviceName, String),
}

/// What the products of matrices are computed in. Weights, sums of gradients, the optimizer, norms and softmaxes are f32 in
/// any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision
    #[default]
    F32,
    /// bfloat16: for a GPU; the CPU only emulates it
    Bf16,
}

impl Precision {
    /// Burn's name for it.
    pub(super) fn dtype(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "cpu" {
            return Ok(Self::Cpu);
        }
        let number = text.strip_prefix("cuda").and_then(|rest| match rest.strip_prefix(':') {
            Some(number) => number.parse().ok(),
            None => rest.is_empty().then_some(0),
        });
        number.map(Self::Cuda).ok_or_else(|| "must be cpu, cuda or cuda:N".to_owned())
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl DeviceName {
    /// The device, after a computation on it has come back. Burn aborts the process where there is no driver, so a process
    /// of its own tries first: `probe` is this program's command for that, without the device.
    pub fn open(self, probe: &mut std::process::Command) -> Result<Device, DeviceError> {
        match self {
            Self::Cpu => Ok(Device::cpu()),
            Self::Cuda(_) if cfg!(not(feature = "cuda")) => Err(DeviceError::NotBuilt),
            Self::Cuda(_) => {
                let unusable = |why: String| DeviceError::Unusable(self, why);
                let tried =
                    probe.arg(self.to_string()).output().map_err(|error| unusable(error.to_string()))?;
                if tried.status.success() {
                    return Ok(self.unchecked());
                }
                Err(unusable(reason(&String::from_utf8_lossy(&tried.stderr))))
            }
        }
    }

    /// Computes something on the device.
    ///
    /// # Panics
    ///
    /// Where the device cannot be used: the process that tries it is there for that.
    pub fn probe(self) {
        let two = burn::tensor::Tensor::<1>::ones([2], &self.unchecked().0).sum();
        match two.try_into_vec_as::<f32>() {
            Ok(values) => assert!(values == [2.0], "the device computes something else"),
            Err(error) => panic!("cannot read a tensor from the device: {error}"),
        }
    }

    #[cfg(feature = "cuda")]
    fn unchecked(self) -> Device {
        match self {
            Self::Cpu => Device::cpu(),
            Self::Cuda(number) => Device(burn::tensor::Device::cuda(number)),
        }
    }

    // Only a build with CUDA has a choice.
    #[cfg(not(feature = "cuda"))]
    #[allow(clippy::unused_self)]
    fn unchecked(self) -> Device {
        Device::cpu()
    }
}

/// What a panic of Burn's says of the driver, without the list of names that it tried.
fn reason(said: &str) -> String {
    let line = said.lines().map(str::trim).find(|line| line.contains("Unable") || line.contains("rror"));
    let line = line.unwrap_or("it did not answer");
    line.split(" - searched for").next().unwrap_or(line).chars().take(160).collect()
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
