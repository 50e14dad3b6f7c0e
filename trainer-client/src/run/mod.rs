//! What a run leaves behind: its folder, checkpoints, metrics and pictures, and how they are read back.

pub mod checkpoints;
pub mod files;
pub mod folder;
pub mod histogram;
pub mod learning_curve;
pub mod metrics;
pub mod picture;
pub mod record;
pub mod recorded;
mod tensorboard;
pub mod tensors;
pub mod token_losses;
