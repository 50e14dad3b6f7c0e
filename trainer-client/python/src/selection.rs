//! The choice among a step's tokens: the Rust trainer's own function over numpy arrays.

use std::sync::{Mutex, MutexGuard, PoisonError};

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use sluice_feed::random::SplitMix64;
use sluice_feed::select::{
    Choice, KeepRatio, KeepSchedule, Lowest, Objective, Rule, Scope, Score, Selection as Rules, Side,
    Signals, Thresholds, Turn,
};

use crate::error::{StateError, refused};

/// Which tokens a step learns from (Rho-1, arXiv 2404.07965, section 2.2). Settings are checked when it is made, and
/// `ValueError` says what is wrong.
///
/// score: what ranks tokens, higher first: "excess" (loss - reference loss), "reference-loss", "reference-entropy" (both the
///     lower the better), "intersection" and "union" of those two, "loss", "entropy", "improvement" (loss of an earlier state
///     of the model - loss), "attribute" (what a token classifier says), or "random", the control.
/// keep: share of the eligible tokens that is kept, above 0 and at most 1, or a schedule: "linear:0.8:0.6",
///     "cosine:0.8:0.6", "steps:0.8,500=0.7,1000=0.6"; or "adaptive", "adaptive:MIN:MAX": every token whose score is at least
///     0, which the reference predicts better than the model, but no less than the share MIN (0.05) and no more than MAX (1).
///     0.6 if neither it nor a threshold is given.
/// threshold: instead of a share, keeps every token whose score is at least this, in nats; of "attribute" whose value is at
///     least this, or with "below" at most.
/// scope: which tokens compete for the share: "sequence", "micro-batch", "batch" (all micro-batches of a step, over all
///     ranks) or "running-quantile" (none: a running mean of the steps' thresholds decides, which `end_step` moves). By default
///     "batch", and "micro-batch" with "adaptive".
/// warmup_steps: first steps, which keep every token.
/// entropy_keep: share of the lowest entropies, for "intersection" and "union"; `keep` where it is not given.
/// steps: steps of the whole run, which "linear" and "cosine" need.
/// seed: of the draws of "random".
/// attribute_keep: which end of "attribute" is kept, "above" (the default) or "below".
#[pyclass(frozen, module = "sluice_feed")]
pub(crate) struct Selection {
    rules: Rules,
    objective: Objective,
    steps: u64,
    #[pyo3(get)]
    seed: u64,
    running: Mutex<Running>,
}

/// What the scope "running-quantile" has learnt.
#[derive(Default)]
struct Running {
    thresholds: Thresholds,
    /// What the micro-batches of the step have taught so far.
    lowest: Vec<Lowest>,
}

/// Lowest scores of a micro-batch, as Python has them.
type LowestScores = (Option<f32>, Option<f32>);

#[pymethods]
impl Selection {
    #[new]
    #[pyo3(signature = (*, score = "excess", keep = None, threshold = None, scope = None, warmup_steps = 0,
        entropy_keep = None, steps = None, seed = 0, attribute_keep = None))]
    #[allow(clippy::too_many_arguments, reason = "named ones, which Python gives by name")]
    fn new(
        score: &str,
        keep: Option<Share>,
        threshold: Option<f32>,
        scope: Option<&str>,
        warmup_steps: u64,
        entropy_keep: Option<f64>,
        steps: Option<u64>,
        seed: u64,
        attribute_keep: Option<&str>,
    ) -> PyResult<Self> {
        let score = score_of(score, entropy_keep, attribute_keep)?;
        let rule = match (threshold, keep) {
            (Some(_), Some(_)) => return Err(refused("give keep or threshold, not both")),
            (Some(threshold), None) if !threshold.is_finite() => {
                return Err(refused("threshold must be a finite number of nats"));
            }
            (Some(threshold), None) => Rule::Threshold(threshold),
            (None, keep) => keep.map_or_else(paper_share, Share::rule)?,
        };
        if !rule.goes_with(score) {
            return Err(refused(match rule {
                Rule::Adaptive(_) => {
                    "adaptive asks whether one model is better than another, which the scores excess and improvement say: give \
                     one of them, or a share"
                }
                _ => "intersection, union and random have no single score for a threshold: give keep",
            }));
        }
        let scope = match scope {
            None => rule.default_scope(),
            Some(name) => {
                serde_json::from_value(name.into()).map_err(|error| refused(format!("scope: {error}")))?
            }
        };
        if matches!(rule, Rule::Adaptive(_)) && scope == Scope::RunningQuantile {
            return Err(refused(
                "running-quantile follows a share, and adaptive has none: give another scope",
            ));
        }
        if score == Score::Random && scope == Scope::RunningQuantile {
            return Err(refused("running-quantile follows scores, and random has none: give another scope"));
        }
        let is_sloped = matches!(rule, Rule::Keep(KeepSchedule::Linear { .. } | KeepSchedule::Cosine { .. }));
        let Some(steps) = steps.or((!is_sloped).then_some(u64::MAX)) else {
            return Err(refused(
                "a linear or cosine schedule of keep needs steps, the steps of the whole run",
            ));
        };
        if warmup_steps >= steps {
            return Err(refused(
                "warmup_steps reaches the last of the steps, so nothing would ever be left out",
            ));
        }
        let rules = Rules { score, rule, scope, warmup_steps };
        let objective = Objective::Slm(rules.clone());
        Ok(Self { rules, objective, steps, seed, running: Mutex::default() })
    }

    /// Name of the score.
    #[getter]
    fn score(&self) -> PyResult<String> {
        let value = serde_json::to_value(self.rules.score).map_err(refused)?;
        Ok(value["name"].as_str().unwrap_or_default().to_owned())
    }

    /// Name of the scope.
    #[getter]
    fn scope(&self) -> PyResult<String> {
        let value = serde_json::to_value(self.rules.scope).map_err(refused)?;
        Ok(value.as_str().unwrap_or_default().to_owned())
    }

    /// Scores from here on are kept, in nats; of an attribute its values from here on, or down; None with another rule.
    #[getter]
    fn threshold(&self) -> Option<f32> {
        match self.rules.rule {
            Rule::Threshold(threshold) => Some(threshold),
            Rule::Keep(_) | Rule::Adaptive(_) => None,
        }
    }

    /// Smallest and largest share of "adaptive"; None with another rule.
    #[getter]
    fn adaptive(&self) -> Option<(f64, f64)> {
        match self.rules.rule {
            Rule::Adaptive(rule) => Some((rule.min.get(), rule.max.get())),
            Rule::Keep(_) | Rule::Threshold(_) => None,
        }
    }

    /// Which end of the attribute is kept, "above" or "below"; None with another score.
    #[getter]
    fn attribute_keep(&self) -> Option<&'static str> {
        match self.rules.score {
            Score::Attribute { keep: Side::Above } => Some("above"),
            Score::Attribute { keep: Side::Below } => Some("below"),
            _ => None,
        }
    }

    /// Share of the lowest entropies, where it is not `keep`'s.
    #[getter]
    fn entropy_keep(&self) -> Option<f64> {
        match self.rules.score {
            Score::Intersection { entropy_keep } | Score::Union { entropy_keep } => {
                entropy_keep.map(KeepRatio::get)
            }
            _ => None,
        }
    }

    /// First steps, which keep every token.
    #[getter]
    fn warmup_steps(&self) -> u64 {
        self.rules.warmup_steps
    }

    /// Whether the score looks at the entropy of the model in training.
    #[getter]
    fn needs_entropy(&self) -> bool {
        self.rules.score.needs().entropy
    }

    /// Whether the score looks at the loss of an earlier state of the model.
    #[getter]
    fn needs_history_loss(&self) -> bool {
        self.rules.score.needs().history_loss
    }

    /// Whether the score looks at what a token classifier says.
    #[getter]
    fn needs_attribute(&self) -> bool {
        self.rules.score.needs().attribute
    }

    /// Whether the score looks at the reference's entropy.
    #[getter]
    fn needs_reference_entropy(&self) -> bool {
        self.rules.score.needs().reference_entropy
    }

    /// The share that is kept at a step (from 1); None where the scores decide.
    fn keep_at(&self, step: u64) -> Option<f64> {
        self.rules.keep_at(step, self.steps).map(KeepRatio::get)
    }

    /// Chooses from micro-batches that compete as the scope says.
    ///
    /// signals: for each micro-batch, flat float32 arrays of one length by name: "loss", "reference_loss", and what the score
    ///     needs of "entropy", "history_loss", "reference_entropy"; in nats, NaN where there is none; and "attribute", as it is.
    /// row_len: tokens of a sequence. step: from 1. micro_batch: number of the first one given, within its step.
    ///
    /// Returns a bool array for each micro-batch: True where a token is kept.
    #[pyo3(signature = (signals, row_len, step, micro_batch = 0))]
    fn select<'py>(
        &self,
        py: Python<'py>,
        signals: Vec<Bound<'py, PyDict>>,
        row_len: usize,
        step: u64,
        micro_batch: u64,
    ) -> PyResult<Vec<Bound<'py, PyArray1<bool>>>> {
        if row_len == 0 || step == 0 {
            return Err(refused("row_len and step are at least 1"));
        }
        let lists = signals.iter().map(|signals| self.lists(signals)).collect::<PyResult<Vec<_>>>()?;
        let turn = Turn { seed: self.seed, step, steps: self.steps, micro_batch };
        let masks = py.detach(|| {
            let batch: Vec<Signals<'_>> = lists.iter().map(Lists::signals).collect();
            let mut running = self.running();
            let choices = self.objective.select(&batch, row_len, turn, &running.thresholds);
            if self.rules.scope == Scope::RunningQuantile {
                running.lowest.extend(choices.iter().map(|choice| choice.lowest));
            }
            choices.iter().map(mask).collect::<Vec<_>>()
        });
        Ok(masks.into_iter().map(|mask| PyArray1::from_vec(py, mask)).collect())
    }

    /// The draws of the score "random" for a micro-batch: a number for each eligible position, 0 for the others; the highest
    /// are kept.
    fn draws<'py>(
        &self,
        py: Python<'py>,
        eligible: PyReadonlyArray1<'py, bool>,
        step: u64,
        micro_batch: u64,
    ) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let seed = SplitMix64::keyed(self.seed, step).next_u64();
        let mut generator = SplitMix64::keyed(seed, micro_batch);
        let eligible = eligible.as_slice()?.iter();
        let draws = eligible.map(|&is| if is { generator.next_u64() } else { 0 }).collect();
        Ok(PyArray1::from_vec(py, draws))
    }

    /// Running thresholds of the score and, where two rankings decide, of the reference entropy, in nats; None before the end
    /// of the first step.
    #[getter]
    fn running_thresholds(&self) -> LowestScores {
        let Thresholds { score, entropy } = self.running().thresholds;
        (score.get(), entropy.get())
    }

    /// What the micro-batches chosen from since the last `end_step` teach running thresholds: for each the lowest score, and
    /// the lowest reference entropy, that it would have kept by itself.
    fn lowest_scores(&self) -> Vec<LowestScores> {
        self.running().lowest.iter().map(|lowest| (lowest.score, lowest.entropy)).collect()
    }

    /// Adds what a micro-batch that was chosen from elsewhere teaches running thresholds, as `lowest_scores` gives it.
    fn add_lowest_scores(&self, lowest_scores: Vec<LowestScores>) {
        let lowest = lowest_scores.into_iter().map(|(score, entropy)| Lowest { score, entropy });
        self.running().lowest.extend(lowest);
    }

    /// Moves the running thresholds at the end of a step: by what this process has chosen from (`lowest_scores`), or by what is
    /// given, which is that of all ranks. Of no effect with other scopes.
    #[pyo3(signature = (lowest_scores = None))]
    fn end_step(&self, lowest_scores: Option<Vec<LowestScores>>) {
        let mut running = self.running();
        let own = std::mem::take(&mut running.lowest);
        let lowest = lowest_scores.map_or(own, |given| {
            given.into_iter().map(|(score, entropy)| Lowest { score, entropy }).collect()
        });
        if self.rules.scope == Scope::RunningQuantile {
            running.thresholds.end_step(&lowest);
        }
    }

    /// What a checkpoint must carry of it: the running thresholds, as text.
    fn state_dict(&self) -> PyResult<String> {
        serde_json::to_string(&self.running().thresholds).map_err(refused)
    }

    /// Takes back what `state_dict` gave.
    fn load_state_dict(&self, state: &str) -> PyResult<()> {
        let thresholds = serde_json::from_str(state)
            .map_err(|error| StateError::new_err(format!("no state of a selection: {error}")))?;
        *self.running() = Running { thresholds, lowest: vec![] };
        Ok(())
    }
}

impl Selection {
    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lists(&self, signals: &Bound<'_, PyDict>) -> PyResult<Lists> {
        let needs = self.rules.score.needs();
        let list = |name: &str| -> PyResult<Vec<f32>> {
            let Some(values) = signals.get_item(name)? else { return Ok(vec![]) };
            let values: PyReadonlyArray1<'_, f32> = values
                .extract()
                .map_err(|_| refused(format!("{name} must be a flat numpy array of float32")))?;
            Ok(values.as_array().to_vec())
        };
        let lists = Lists {
            loss: list("loss")?,
            entropy: list("entropy")?,
            history_loss: list("history_loss")?,
            reference_loss: list("reference_loss")?,
            reference_entropy: list("reference_entropy")?,
            attribute: list("attribute")?,
        };
        let needs_reference = needs.reference_loss || self.rules.score == Score::Random;
        let has_attribute = !lists.attribute.is_empty();
        let expected = lists.loss.len();
        for (name, list, is_needed) in [
            ("reference_loss", &lists.reference_loss, needs_reference),
            ("entropy", &lists.entropy, needs.entropy),
            ("history_loss", &lists.history_loss, needs.history_loss),
            ("reference_entropy", &lists.reference_entropy, needs.reference_entropy),
            // A draw looks at it where it is given.
            ("attribute", &lists.attribute, needs.attribute || has_attribute),
        ] {
            if is_needed && list.len() != expected {
                let found = list.len();
                return Err(refused(format!(
                    "{name} has {found} values and loss has {expected}: the score needs one for each"
                )));
            }
        }
        Ok(lists)
    }
}

/// The signals of a micro-batch, copied so that the GIL can be released.
struct Lists {
    loss: Vec<f32>,
    entropy: Vec<f32>,
    history_loss: Vec<f32>,
    reference_loss: Vec<f32>,
    reference_entropy: Vec<f32>,
    attribute: Vec<f32>,
}

impl Lists {
    fn signals(&self) -> Signals<'_> {
        Signals {
            loss: &self.loss,
            entropy: &self.entropy,
            history_loss: &self.history_loss,
            reference_loss: &self.reference_loss,
            reference_entropy: &self.reference_entropy,
            attribute: &self.attribute,
        }
    }
}

/// A share as a number or as the text of a rule.
#[derive(FromPyObject)]
enum Share {
    Number(f64),
    Text(String),
}

impl Share {
    fn rule(self) -> PyResult<Rule> {
        match self {
            Self::Number(keep) => {
                KeepRatio::try_from(keep).map(KeepSchedule::constant).map(Rule::Keep).map_err(refused)
            }
            Self::Text(text) => text.parse().map_err(refused),
        }
    }
}

/// The paper's share.
fn paper_share() -> PyResult<Rule> {
    Share::Number(0.6).rule()
}

fn score_of(name: &str, entropy_keep: Option<f64>, attribute_keep: Option<&str>) -> PyResult<Score> {
    let mut fields = serde_json::json!({ "name": name });
    if let Some(side) = attribute_keep {
        if name != "attribute" {
            return Err(refused("attribute_keep is the side of attribute: leave it out, or give that score"));
        }
        fields["keep"] = side.into();
    }
    if let Some(keep) = entropy_keep {
        if !matches!(name, "intersection" | "union") {
            return Err(refused(
                "entropy_keep is the second share of intersection and union: leave it out, or give one of them",
            ));
        }
        fields["entropy_keep"] = keep.into();
    }
    serde_json::from_value(fields).map_err(|error| refused(format!("score: {error}")))
}

fn mask(choice: &Choice) -> Vec<bool> {
    let mut mask = vec![false; choice.scores.len()];
    choice.kept.iter().for_each(|&index| mask[index as usize] = true);
    mask
}
