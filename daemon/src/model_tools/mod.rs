//! `sluiced model inspect` and `sluiced model score`: a model folder without Kafka.

mod inspect;
mod score;

pub use inspect::{Inspect, inspect};
pub use score::{ScoreText, score};
