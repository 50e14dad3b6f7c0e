//! What a run minimises the loss of, and the choice of tokens that follows from it.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::adaptive::{self, Adaptive};
use super::rank::{Keys, Share};
use super::ratio::KeepRatio;
use super::running::{Lowest, RunningThreshold, Thresholds};
use super::schedule::KeepSchedule;
use super::score::{Needs, Score, Side, Signals};

/// What a run minimises the loss of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Objective {
    /// Causal language modeling: every token.
    Clm,
    /// Selective language modeling: some tokens, as a selection says.
    Slm(Selection),
}

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// How they are ranked.
    pub score: Score,
    /// How many are kept, or from which score on.
    pub rule: Rule,
    /// Which of them compete.
    pub scope: Scope,
    /// First steps of the run, which keep every token.
    pub warmup_steps: u64,
}

/// How many tokens are kept, or from which score on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// A share of the eligible tokens.
    Keep(KeepSchedule),
    /// Every token whose score is at least this, in nats; of an attribute of which the lowest are kept, at most this.
    Threshold(f32),
    /// Every token whose score is at least 0, within bounds.
    Adaptive(Adaptive),
}

impl Rule {
    /// The scope that it has where none is asked for: shares are of the whole step, as in the text of Rho-1; where the tokens'
    /// own scores decide, none needs to wait for the rest of the step.
    pub fn default_scope(&self) -> Scope {
        match self {
            Self::Keep(_) | Self::Threshold(_) => Scope::Batch,
            Self::Adaptive(_) => Scope::MicroBatch,
        }
    }

    /// Whether it means something for a score: `adaptive` asks whether one model is better than another.
    pub fn goes_with(&self, score: Score) -> bool {
        match self {
            Self::Keep(_) => true,
            Self::Threshold(_) => score.has_threshold(),
            Self::Adaptive(_) => matches!(score, Score::Excess | Score::Improvement),
        }
    }

    /// The last step at which it says something new; 0 where it says nothing of steps.
    pub fn last_change(&self) -> u64 {
        match self {
            Self::Keep(schedule) => schedule.last_change(),
            Self::Threshold(_) | Self::Adaptive(_) => 0,
        }
    }
}

/// Of a share, a schedule of shares, or `adaptive`.
impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with(adaptive::NAME) {
            return text.parse().map(Self::Adaptive);
        }
        text.parse().map(Self::Keep)
    }
}

/// Which tokens compete with one another for the share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Those of one packed sequence (the equation of Rho-1).
    Sequence,
    /// Those of one micro-batch.
    MicroBatch,
    /// Those of all micro-batches of an optimizer step (the text of Rho-1).
    #[default]
    Batch,
    /// None: a running mean of the steps' thresholds decides, and the share is kept on average.
    RunningQuantile,
}

/// When a choice is made: names its random draws and its place in the schedules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Seed of the run.
    pub seed: u64,
    /// Step, counted from 1.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Index of the first micro-batch given, within its step.
    pub micro_batch: u64,
}

/// The tokens chosen from one micro-batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// Flat indices of the positions to learn from, ascending.
    pub kept: Vec<u32>,
    /// Score of each position in nats, higher first; NaN where it could not be chosen.
    pub scores: Vec<f32>,
    /// What the step teaches running thresholds ([`Thresholds::end_step`]).
    pub lowest: Lowest,
}

impl Objective {
    /// A constant share of each step's tokens, ranked by `score`.
    pub fn slm(score: Score, keep: KeepRatio) -> Self {
        let rule = Rule::Keep(KeepSchedule::constant(keep));
        Self::Slm(Selection { score, rule, scope: Scope::default(), warmup_steps: 0 })
    }

    /// The objective's short name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Clm => "clm",
            Self::Slm(Selection { score: Score::Random, .. }) => "random",
            Self::Slm(_) => "slm",
        }
    }

    /// The selection; `None` where every token is kept.
    pub fn selection(&self) -> Option<&Selection> {
        match self {
            Self::Clm => None,
            Self::Slm(selection) => Some(selection),
        }
    }

    /// What must be known beside the losses of both models.
    pub fn needs(&self) -> Needs {
        self.selection().map_or(Needs::default(), |selection| selection.score.needs())
    }

    /// Whether all micro-batches of a step must be known before any of them can be chosen from.
    pub fn needs_whole_batch(&self, step: u64) -> bool {
        self.selection().is_some_and(|selection| {
            let competes = matches!(selection.rule, Rule::Keep(_) | Rule::Adaptive(_));
            selection.scope == Scope::Batch && competes && step > selection.warmup_steps
        })
    }

    /// Whether a step can be chosen from before its forward pass, by what the reference says and where there is a target, which
    /// a loss of 0 marks in [`Signals::loss`] as well as any other.
    pub fn chooses_beforehand(&self) -> bool {
        self.selection().is_some_and(|selection| selection.score.is_known_beforehand())
    }

    /// Whether the lowest score that was kept is a threshold.
    pub fn has_threshold(&self) -> bool {
        self.selection().is_some_and(|selection| selection.score.has_threshold())
    }

    /// Whether nothing at all may be kept of a batch that has tokens to choose from.
    pub fn may_keep_nothing(&self) -> bool {
        self.selection().is_some_and(|selection| {
            matches!(selection.rule, Rule::Threshold(_))
                || selection.scope == Scope::RunningQuantile
                || matches!(selection.score, Score::Intersection { .. })
        })
    }

    /// Chooses from micro-batches that compete as the scope says; `row_len` is the length of their sequences.
    /// `thresholds` are read where the scope is [`Scope::RunningQuantile`]; they move at the end of the step, by what all of
    /// its choices say ([`Thresholds::end_step`]).
    ///
    /// # Panics
    /// When a list that the score needs is not as long as the losses, or `row_len` is 0.
    pub fn select(
        &self,
        batch: &[Signals<'_>],
        row_len: usize,
        turn: Turn,
        thresholds: &Thresholds,
    ) -> Vec<Choice> {
        match self {
            Self::Clm => batch.iter().map(|signals| all_of(signals.loss.to_vec())).collect(),
            Self::Slm(selection) => selection.select(batch, row_len, turn, thresholds),
        }
    }
}

impl Selection {
    /// The share that is kept at a step; `None` where the scores decide.
    pub fn keep_at(&self, step: u64, steps: u64) -> Option<KeepRatio> {
        if step <= self.warmup_steps {
            return Some(KeepRatio::ALL);
        }
        match &self.rule {
            Rule::Keep(schedule) => Some(schedule.at(step, self.warmup_steps + 1, steps)),
            Rule::Threshold(_) | Rule::Adaptive(_) => None,
        }
    }

    fn select(
        &self,
        batch: &[Signals<'_>],
        row_len: usize,
        turn: Turn,
        thresholds: &Thresholds,
    ) -> Vec<Choice> {
        let keep = self.keep_at(turn.step, turn.steps);
        let scores: Vec<Vec<f32>> = batch.iter().map(|signals| self.score.values(signals)).collect();
        let entropy_keep = match self.score {
            Score::Intersection { entropy_keep } | Score::Union { entropy_keep }
                if turn.step > self.warmup_steps =>
            {
                entropy_keep.or(keep)
            }
            _ => keep,
        };
        let rank = |scores: &[Vec<f32>], keep: Option<KeepRatio>, running: RunningThreshold| match self
            .cut(keep)
        {
            Cut::At(threshold) => without_lowest(scores.iter().map(|scores| at_least(scores, threshold))),
            Cut::Highest(Share::Ratio(keep)) if self.scope == Scope::RunningQuantile => {
                scores.iter().map(|scores| running_choice(scores, keep, running)).collect()
            }
            Cut::Highest(share) => {
                let keys = (turn.micro_batch..).zip(scores).map(|(micro_batch, scores)| match self.score {
                    Score::Random => Keys::drawn(scores, turn.seed, turn.step, micro_batch),
                    _ => Keys::of_scores(scores),
                });
                without_lowest(highest(&keys.collect::<Vec<_>>(), self.scope, row_len, share).into_iter())
            }
        };
        let ranked = rank(&scores, keep, thresholds.score);
        let (mut kept, mut lowest): (Vec<Vec<u32>>, Vec<Lowest>) =
            ranked.into_iter().map(|(kept, score)| (kept, Lowest { score, entropy: None })).unzip();
        if let Score::Intersection { .. } | Score::Union { .. } = self.score {
            // Positions that lack a reference loss cannot be chosen for their entropy either.
            let entropies: Vec<Vec<f32>> = batch
                .iter()
                .zip(&scores)
                .map(|(signals, scores)| {
                    let pairs = Score::ReferenceEntropy.values(signals).into_iter().zip(scores);
                    pairs.map(|(entropy, score)| if score.is_nan() { f32::NAN } else { entropy }).collect()
                })
                .collect();
            let by_entropy = rank(&entropies, entropy_keep, thresholds.entropy);
            let is_union = matches!(self.score, Score::Union { .. });
            for ((kept, lowest), (other, entropy)) in kept.iter_mut().zip(&mut lowest).zip(by_entropy) {
                *kept = combine(kept, &other, is_union);
                lowest.entropy = entropy;
            }
        }
        let choices = kept.into_iter().zip(scores).zip(lowest);
        choices.map(|((kept, scores), lowest)| Choice { kept, scores, lowest }).collect()
    }

    /// Where the scores are cut, at a step that keeps a share, or lets the scores decide.
    fn cut(&self, keep: Option<KeepRatio>) -> Cut {
        match (keep, &self.rule) {
            (Some(KeepRatio::ALL), _) | (None, Rule::Keep(_)) => Cut::At(f32::NEG_INFINITY),
            (Some(keep), _) => Cut::Highest(Share::Ratio(keep)),
            (None, Rule::Threshold(threshold)) => Cut::At(match self.score {
                Score::Attribute { keep: Side::Below } => -threshold,
                _ => *threshold,
            }),
            (None, Rule::Adaptive(rule)) => Cut::Highest(Share::Adaptive(*rule)),
        }
    }
}

/// Which scores are kept.
enum Cut {
    /// Those of at least this.
    At(f32),
    /// The highest of those that compete.
    Highest(Share),
}

/// Every position with a score.
fn all_of(scores: Vec<f32>) -> Choice {
    Choice { kept: at_least(&scores, f32::NEG_INFINITY), scores, lowest: Lowest::default() }
}

/// Positions whose score is `threshold` or higher.
fn at_least(scores: &[f32], threshold: f32) -> Vec<u32> {
    // A comparison with NaN is false, so positions without a score are left out.
    (0..).zip(scores).filter(|&(_, &score)| score >= threshold).map(|(index, _)| index).collect()
}

/// Chooses by what earlier steps have taught, and says what this micro-batch teaches: the lowest score that it would have kept
/// by itself. In the first step of a run each has only itself.
fn running_choice(scores: &[f32], keep: KeepRatio, running: RunningThreshold) -> (Vec<u32>, Option<f32>) {
    let own = Keys::of_scores(scores).highest(Share::Ratio(keep));
    let lowest = own.iter().map(|&index| scores[index as usize]).min_by(f32::total_cmp);
    match running.get() {
        Some(threshold) => (at_least(scores, threshold), lowest),
        None => (own, lowest),
    }
}

/// What is kept where no running threshold decides.
fn without_lowest(kept: impl Iterator<Item = Vec<u32>>) -> Vec<(Vec<u32>, Option<f32>)> {
    kept.map(|kept| (kept, None)).collect()
}

/// The highest keys within each sequence, micro-batch or the whole batch.
fn highest(keys: &[Keys], scope: Scope, row_len: usize, share: Share) -> Vec<Vec<u32>> {
    match scope {
        Scope::Sequence => keys.iter().map(|keys| keys.highest_of_each(row_len, share)).collect(),
        Scope::Batch => {
            let mut rest = &Keys::concat(keys).highest(share)[..];
            let mut start = 0;
            let mut kept = Vec::with_capacity(keys.len());
            for keys in keys {
                let end = start + keys.len() as u32;
                let (own, others) = rest.split_at(rest.partition_point(|&index| index < end));
                kept.push(own.iter().map(|index| index - start).collect());
                (start, rest) = (end, others);
            }
            kept
        }
        Scope::MicroBatch | Scope::RunningQuantile => keys.iter().map(|keys| keys.highest(share)).collect(),
    }
}

/// Union or intersection of two ascending lists, ascending.
fn combine(left: &[u32], right: &[u32], is_union: bool) -> Vec<u32> {
    let (mut left, mut right) = (left.iter().peekable(), right.iter().peekable());
    let mut combined = Vec::new();
    loop {
        let order = match (left.peek(), right.peek()) {
            (Some(a), Some(b)) => a.cmp(b),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (None, None) => break,
        };
        let taken = match order {
            std::cmp::Ordering::Less => (left.next(), is_union),
            std::cmp::Ordering::Greater => (right.next(), is_union),
            std::cmp::Ordering::Equal => {
                right.next();
                (left.next(), true)
            }
        };
        if let (Some(&index), true) = taken {
            combined.push(index);
        }
    }
    combined
}
