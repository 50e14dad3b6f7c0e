//! The trainer client of Sluice: reads scored documents, keeps the tokens worth learning from, trains on those
//! alone, and shows what came of it.
//!
//! Data flows one way: `stream` -> `pack` -> (`learner` with `select`) -> `run_folder` -> `report`. No room but
//! `model` and `export` knows a tensor framework: the seam is [`learner::Learner`].

pub mod batch;
mod books;
pub mod categories;
pub mod checkpoints;
pub mod cli;
pub mod document;
pub mod evaluate;
pub mod experiment;
pub mod export;
pub mod failure;
mod files;
pub mod histogram;
mod http;
pub mod learner;
pub mod metrics;
pub mod model;
pub mod optimizer;
pub mod pack;
pub mod picture;
pub mod process;
pub mod progress;
pub mod random;
pub mod recorded_run;
pub mod report;
pub mod run_folder;
pub mod run_record;
pub mod schedule;
pub mod select;
pub mod shuffle;
pub mod snapshot;
pub mod sources;
pub mod stream;
pub mod supply;
pub mod telemetry;
pub mod text;
pub mod token_losses;
pub mod train;
