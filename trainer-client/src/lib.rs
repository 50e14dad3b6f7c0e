//! The trainer client of Sluice: reads scored documents, keeps the tokens worth learning from, trains on those
//! alone, and shows what came of it.
//!
//! Data flows one way: `stream` -> `pack` -> (`learner` with `select`) -> `run_folder` -> `report`. No room but
//! `model` and `export` knows a tensor framework: the seam is [`learner::Learner`].
//!
//! Files have moved to the rooms that they will be modules of; until then each stands here by its path.

#[path = "../feed/src/batch.rs"]
pub mod batch;
#[path = "training/books.rs"]
mod books;
#[path = "report/dynamics.rs"]
pub mod categories;
#[path = "run/checkpoints.rs"]
pub mod checkpoints;
pub mod cli;
#[path = "../feed/src/document.rs"]
pub mod document;
#[path = "training/evaluate.rs"]
pub mod evaluate;
pub mod export;
pub mod failure;
#[path = "run/files.rs"]
pub mod files;
#[path = "run/histogram.rs"]
pub mod histogram;
#[path = "watch/http.rs"]
mod http;
#[path = "training/learner.rs"]
pub mod learner;
#[path = "run/metrics.rs"]
pub mod metrics;
pub mod model;
#[path = "model/optimizer.rs"]
pub mod optimizer;
#[path = "../feed/src/pack.rs"]
pub mod pack;
#[path = "run/picture.rs"]
pub mod picture;
#[path = "watch/process.rs"]
pub mod process;
#[path = "watch/progress.rs"]
pub mod progress;
#[path = "../feed/src/random.rs"]
pub mod random;
#[path = "run/recorded.rs"]
pub mod recorded_run;
pub mod report;
#[path = "run/folder.rs"]
pub mod run_folder;
#[path = "run/record.rs"]
pub mod run_record;
#[path = "training/schedule.rs"]
pub mod schedule;
#[path = "../feed/src/select/mod.rs"]
pub mod select;
#[path = "../feed/src/shuffle.rs"]
pub mod shuffle;
#[path = "../feed/src/snapshot.rs"]
pub mod snapshot;
#[path = "../feed/src/sources.rs"]
pub mod sources;
#[path = "../feed/src/stream/mod.rs"]
pub mod stream;
#[path = "../feed/src/supply.rs"]
pub mod supply;
#[path = "watch/telemetry.rs"]
pub mod telemetry;
pub mod text;
#[path = "run/token_losses.rs"]
pub mod token_losses;
#[path = "training/mod.rs"]
pub mod train;
