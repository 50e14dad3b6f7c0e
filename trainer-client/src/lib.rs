//! The trainer client of Sluice: takes micro-batches of scored documents from the feed, keeps the tokens worth learning
//! from, trains on those alone, and shows what came of it.
//!
//! Data flows one way: `sluice_feed` -> `training` (with a model behind [`training::learner::Learner`]) -> `run` ->
//! `report`. `forecast` takes a sample of the same documents, and says before a run what selection would keep of it. No room
//! but `model` and `export` knows a tensor framework.

pub mod cli;
pub mod export;
pub mod failure;
pub mod forecast;
pub mod model;
pub mod report;
pub mod run;
pub mod text;
pub mod training;
pub mod watch;
