//! Measurements of Sluice; see `README.md` beside this crate.

pub mod device_check;
pub mod experiments;
pub mod one_pass;
pub mod packing;
pub mod process;
pub mod step;
pub mod stream;
pub mod through_daemon;
pub mod workload;
