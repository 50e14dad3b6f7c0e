//! Which tokens a step learns from: pure functions over slices (Rho-1, arXiv 2404.07965, section 2.2).
//!
//! A [`Score`] ranks tokens by what is known of them ([`Signals`]); a [`Rule`] says how many are kept, or from
//! which score on; a [`Scope`] says which tokens compete with one another. Together they are an [`Objective`].
//! Nothing here knows a tensor framework, a clock or a random state: a draw is named by seed, step and micro-batch.

mod adaptive;
mod objective;
mod rank;
mod ratio;
mod running;
mod schedule;
mod score;

pub use adaptive::Adaptive;
pub use objective::{Choice, Objective, Rule, Scope, Selection, Turn};
pub use ratio::{KeepRatio, KeepRatioError};
pub use running::{Lowest, RunningThreshold, Thresholds};
pub use schedule::{KeepSchedule, Stair};
pub use score::{Needs, Score, Side, Signals};

#[cfg(test)]
mod tests;
