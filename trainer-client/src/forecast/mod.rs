//! Whether selection can be expected to help, before a run: what the reference and the model to be trained say of a sample of
//! a scored topic, what a first step would keep of it, and which streams of an experiment lie near.
//!
//! A [`sample::Sample`] is read and measured; [`sources`] sums it up by source, each mean excess with its interval
//! ([`estimate`]); [`Forecast`] says what that comes to, with what the [`map`] knows of such a stream, and [`page`] shows it.

pub mod estimate;
mod headline;
pub mod map;
mod outcome;
pub mod page;
pub mod sample;
pub mod sources;
mod words;

pub use outcome::{About, Forecast, MapCell, MapRow, MapRule, Target, Verdict};
