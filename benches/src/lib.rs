//! Measurements of Sluice; see `README.md` beside this crate.

pub mod process;
pub mod step;
pub mod workload;
