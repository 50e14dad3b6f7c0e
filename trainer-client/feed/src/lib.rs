//! The scored topic as micro-batches for a trainer, and the choice among their tokens.
//!
//! Data flows one way: `stream` (documents, by partition) -> `supply` (shuffled, cut and packed, by lane) -> [`feed::Feed`]
//! (the micro-batches of a step, agreed on by all ranks) -> a trainer, which measures them and asks `select` which of
//! their tokens to learn from. Nothing here knows a tensor framework, a command line, or how a run is written down.

pub mod batch;
pub mod cut;
pub mod document;
pub mod feed;
pub mod observer;
pub mod pack;
pub mod plan;
pub mod random;
pub mod select;
pub mod shuffle;
pub mod snapshot;
pub mod sources;
pub mod stream;
pub mod supply;
pub mod turns;
