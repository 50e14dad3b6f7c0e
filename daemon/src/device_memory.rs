//! Memory of the GPU that scores, as the driver's management library (NVML) knows it. The library comes with NVIDIA's
//! driver and is loaded when a GPU is asked for, so that nothing of it is needed elsewhere.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use crate::device::Device;

/// Names the GPUs that CUDA shows to this process, in its numbering.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// A GPU whose memory can be asked for.
#[derive(Debug)]
pub struct DeviceMemory {
    nvml: Nvml,
    gpu: Gpu,
}

/// How NVML is told which GPU is meant.
#[derive(Debug, PartialEq, Eq)]
enum Gpu {
    /// By its number on the PCI bus, which is CUDA's too where `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    Number(u32),
    /// By its own name, such as `GPU-8932f937-d72c-4106-c12f-20bd9faed9f6`.
    Uuid(String),
}

/// Memory of a GPU in bytes, whoever uses it.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// In use.
    pub used: u64,
    /// All there is.
    pub total: u64,
}

impl DeviceMemory {
    /// The memory of `device`; `None` on the CPU, and with a line in the log where the driver does not tell.
    pub fn of(device: Device) -> Option<Self> {
        let Device::Cuda(index) = device else { return None };
        let gpu = visible(u32::try_from(index).ok()?, std::env::var(VISIBLE).ok().as_deref())?;
        match Nvml::init() {
            Ok(nvml) => Some(Self { nvml, gpu }),
            Err(error) => {
                tracing::warn!(%error, "the memory of {device} is not known: NVIDIA's NVML does not answer");
                None
            }
        }
    }

    /// The memory as it is now; `None` where the driver does not tell.
    pub fn read(&self) -> Option<Memory> {
        let read = || -> Result<Memory, NvmlError> {
            let device = match &self.gpu {
                Gpu::Number(number) => self.nvml.device_by_index(*number)?,
                Gpu::Uuid(uuid) => self.nvml.device_by_uuid(uuid.as_str())?,
            };
            let memory = device.memory_info()?;
            Ok(Memory { used: memory.used, total: memory.total })
        };
        read()
            .inspect_err(|error| tracing::debug!(%error, "the driver does not tell the memory of the GPU"))
            .ok()
    }
}

/// The GPU that CUDA calls `index`, where `visible` is the list of those it shows.
fn visible(index: u32, visible: Option<&str>) -> Option<Gpu> {
    let Some(list) = visible else { return Some(Gpu::Number(index)) };
    let entry = list.split(',').map(str::trim).nth(index as usize)?;
    match entry.parse() {
        Ok(number) => Some(Gpu::Number(number)),
        Err(_) => entry.starts_with("GPU-").then(|| Gpu::Uuid(entry.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gpu_is_the_one_that_cuda_means() {
        assert_eq!(visible(2, None), Some(Gpu::Number(2)));
        assert_eq!(visible(1, Some("3, 5")), Some(Gpu::Number(5)));
        assert_eq!(visible(0, Some("GPU-89,5")), Some(Gpu::Uuid("GPU-89".to_owned())));
        assert_eq!(visible(2, Some("3,5")), None, "CUDA does not show it");
        assert_eq!(visible(0, Some("MIG-89")), None, "a part of a GPU, which has no memory of its own here");
    }

    #[test]
    fn a_cpu_has_no_device_memory() {
        assert!(DeviceMemory::of(Device::Cpu).is_none());
    }
}
