//! What people and programs see of a run while it goes on.

pub mod http;
pub mod process;
pub mod progress;
pub mod stage;
pub mod telemetry;
