//! Flags that say which tokens a run learns from.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;
use sluice_feed::select::{KeepRatio, KeepSchedule, Objective, Rule, Scope, Score, Selection, Side};

use crate::failure::{Classify, Failure};
use crate::model::checkpoint::read_weights;
use crate::model::config::CONFIG_FILE;
use crate::model::{Backward, BurnLearner, ModelConfig};

/// Which tokens a run learns from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ObjectiveName {
    /// The tokens that the score ranks highest
    Slm,
    /// Every token
    Clm,
    /// As many tokens as slm, drawn at random: the control
    Random,
}

/// How tokens are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScoreName {
    /// Highest excess loss over the reference (Rho-1)
    Excess,
    /// Lowest reference loss (self-reference)
    ReferenceLoss,
    /// Lowest reference entropy (self-reference)
    ReferenceEntropy,
    /// Among the lowest by reference loss and by reference entropy
    Intersection,
    /// Among the lowest by reference loss or by reference entropy
    Union,
    /// Highest loss of the model in training
    Loss,
    /// Highest entropy of the model in training
    Entropy,
    /// Highest improvement over --history or the average of --history-decay
    Improvement,
    /// Highest or lowest probability of a token classifier's class (--attribute-keep)
    Attribute,
}

/// Which end of an attribute is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SideName {
    /// The highest values, and with --threshold those at or above it
    Above,
    /// The lowest values, and with --threshold those at or below it
    Below,
}

impl From<SideName> for Side {
    fn from(name: SideName) -> Self {
        match name {
            SideName::Above => Self::Above,
            SideName::Below => Self::Below,
        }
    }
}

/// Which tokens compete with one another for the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScopeName {
    /// Those of one packed sequence (the equation of Rho-1)
    Sequence,
    /// Those of one micro-batch
    MicroBatch,
    /// Those of all micro-batches of an optimizer step (the text of Rho-1); with several, and a score that looks at the model in
    /// training, each runs forward twice
    Batch,
    /// None: a running mean of the steps' thresholds decides, and the share is kept on average
    RunningQuantile,
}

impl From<ScopeName> for Scope {
    fn from(name: ScopeName) -> Self {
        match name {
            ScopeName::Sequence => Self::Sequence,
            ScopeName::MicroBatch => Self::MicroBatch,
            ScopeName::Batch => Self::Batch,
            ScopeName::RunningQuantile => Self::RunningQuantile,
        }
    }
}

/// Which tokens to learn from.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Selection")]
pub(super) struct SelectionArguments {
    /// Which tokens to learn from
    #[arg(long, env = "SLUICE_TRAIN_OBJECTIVE", value_enum, default_value_t = ObjectiveName::Slm)]
    objective: ObjectiveName,
    /// How slm ranks tokens [default: excess]
    #[arg(long, env = "SLUICE_TRAIN_SCORE", value_enum)]
    score: Option<ScoreName>,
    /// Share of the tokens to keep, above 0 and at most 1: KEEP, linear:FROM:TO, cosine:FROM:TO or
    /// steps:FROM,STEP=KEEP,...; or adaptive, adaptive:MIN:MAX: every token that the reference predicts better than the model,
    /// but no less than the share MIN (0.05) and no more than MAX (1) [default: 0.6]
    #[arg(long, env = "SLUICE_TRAIN_KEEP", conflicts_with = "threshold")]
    keep: Option<Rule>,
    /// First steps, which keep every token
    #[arg(long, env = "SLUICE_TRAIN_KEEP_WARMUP_STEPS", default_value_t = 0)]
    keep_warmup_steps: u64,
    /// Share of the lowest reference entropies, for intersection and union [default: --keep]
    #[arg(long, env = "SLUICE_TRAIN_ENTROPY_KEEP", value_name = "KEEP")]
    entropy_keep: Option<KeepRatio>,
    /// Which end of --score attribute is kept [default: above]
    #[arg(long, env = "SLUICE_TRAIN_ATTRIBUTE_KEEP", value_enum)]
    attribute_keep: Option<SideName>,
    /// Instead of a share, keep every token whose score is at least this, in nats; the scores of reference-loss and
    /// reference-entropy are their negatives; of an attribute it is its own value, and --attribute-keep says on which side
    #[arg(long, env = "SLUICE_TRAIN_THRESHOLD", value_name = "SCORE", allow_negative_numbers = true, value_parser = finite)]
    threshold: Option<f32>,
    /// Which tokens compete for the share [default: batch; micro-batch with --keep adaptive]
    #[arg(long, env = "SLUICE_TRAIN_SCOPE", value_enum)]
    scope: Option<ScopeName>,
    /// Older checkpoint of the same model, for the score improvement
    #[arg(long, env = "SLUICE_TRAIN_HISTORY", value_name = "FOLDER", conflicts_with = "history_decay")]
    history: Option<PathBuf>,
    /// Decay per step of an average of the weights, above 0 and below 1, for the score improvement
    #[arg(long, env = "SLUICE_TRAIN_HISTORY_DECAY", value_name = "DECAY", value_parser = decay)]
    history_decay: Option<f64>,
    /// What the gradient of the kept tokens flows through
    #[arg(long, env = "SLUICE_TRAIN_BACKWARD", value_enum, default_value_t = Backward::Exact)]
    pub backward: Backward,
}

impl SelectionArguments {
    /// The objective of a run of `steps` steps; flags that contradict one another are refused.
    pub fn objective(&self, steps: u64) -> anyhow::Result<Objective> {
        self.check(steps).map_err(Failure::Usage)?;
        let entropy_keep = self.entropy_keep;
        let score = match (self.objective, self.score.unwrap_or(ScoreName::Excess)) {
            (ObjectiveName::Clm, _) => return Ok(Objective::Clm),
            (ObjectiveName::Random, _) => Score::Random,
            (ObjectiveName::Slm, ScoreName::Excess) => Score::Excess,
            (ObjectiveName::Slm, ScoreName::ReferenceLoss) => Score::ReferenceLoss,
            (ObjectiveName::Slm, ScoreName::ReferenceEntropy) => Score::ReferenceEntropy,
            (ObjectiveName::Slm, ScoreName::Intersection) => Score::Intersection { entropy_keep },
            (ObjectiveName::Slm, ScoreName::Union) => Score::Union { entropy_keep },
            (ObjectiveName::Slm, ScoreName::Loss) => Score::Loss,
            (ObjectiveName::Slm, ScoreName::Entropy) => Score::Entropy,
            (ObjectiveName::Slm, ScoreName::Improvement) => Score::Improvement,
            (ObjectiveName::Slm, ScoreName::Attribute) => {
                Score::Attribute { keep: self.attribute_keep.map_or(Side::default(), Side::from) }
            }
        };
        let rule = match (self.threshold, &self.keep) {
            (Some(threshold), _) => Rule::Threshold(threshold),
            (None, Some(rule)) => rule.clone(),
            (None, None) => Rule::Keep(KeepSchedule::constant(default_keep()?)),
        };
        let scope = self.scope.map_or(rule.default_scope(), Scope::from);
        Ok(Objective::Slm(Selection { score, rule, scope, warmup_steps: self.keep_warmup_steps }))
    }

    /// What makes no sense, and what to do instead.
    fn check(&self, steps: u64) -> Result<(), String> {
        let is = |objective, score: Option<ScoreName>| {
            self.objective == objective && (score.is_none() || score == self.score)
        };
        let two_rankings = matches!(self.score, Some(ScoreName::Intersection | ScoreName::Union));
        let has_history = self.history.is_some() || self.history_decay.is_some();
        let last_change = self.keep.as_ref().map_or(0, Rule::last_change);
        let is_adaptive = matches!(self.keep, Some(Rule::Adaptive(_)));
        let refusals = [
            (
                is(ObjectiveName::Clm, None)
                    && (self.score.is_some() || self.threshold.is_some() || self.scope.is_some()),
                "--objective clm keeps every token: leave out --score, --threshold and --scope, or give --objective slm",
            ),
            (
                is(ObjectiveName::Clm, None) && self.backward == Backward::Kept,
                "--objective clm drops no token, so --backward kept saves nothing: leave it out, or give --objective slm",
            ),
            (
                is(ObjectiveName::Random, None) && (self.score.is_some() || self.threshold.is_some()),
                "--objective random looks at no score: leave out --score and --threshold, or give --objective slm",
            ),
            (
                is(ObjectiveName::Random, None) && self.scope == Some(ScopeName::RunningQuantile),
                "--scope running-quantile follows scores, and --objective random has none: give another --scope",
            ),
            (
                self.entropy_keep.is_some() && !two_rankings,
                "--entropy-keep is the second share of --score intersection and union: leave it out, or give one of them",
            ),
            (
                self.attribute_keep.is_some() && self.score != Some(ScoreName::Attribute),
                "--attribute-keep is the side of --score attribute: leave it out, or give that score",
            ),
            (
                self.threshold.is_some() && two_rankings,
                "--threshold is one number, but --score intersection and union look at two: give --keep",
            ),
            (
                self.threshold.is_some() && self.scope.is_some(),
                "with --threshold no token competes with another: leave out --scope",
            ),
            (
                is_adaptive
                    && (!is(ObjectiveName::Slm, None)
                        || !matches!(self.score, None | Some(ScoreName::Excess | ScoreName::Improvement))),
                "--keep adaptive asks whether one model is better than another, which --score excess and improvement say: give \
                 one of them, or a share",
            ),
            (
                is_adaptive && self.scope == Some(ScopeName::RunningQuantile),
                "--scope running-quantile follows a share, and --keep adaptive has none: give another scope",
            ),
            (
                is(ObjectiveName::Slm, Some(ScoreName::Improvement)) && !has_history,
                "--score improvement needs what it is measured over: give --history FOLDER or --history-decay DECAY",
            ),
            (
                has_history && !is(ObjectiveName::Slm, Some(ScoreName::Improvement)),
                "--history and --history-decay serve --score improvement alone: leave them out, or give that score",
            ),
            (
                self.keep_warmup_steps >= steps,
                "--keep-warmup-steps reaches the last of the --steps, so nothing would ever be left out: give fewer, or \
                 --objective clm",
            ),
            (last_change > steps, "--keep changes after the last of the --steps: give earlier changes"),
        ];
        match refusals.into_iter().find(|(refused, _)| *refused) {
            Some((_, why)) => Err(why.to_owned()),
            None => Ok(()),
        }
    }

    /// Gives the learner what an improvement is measured over.
    pub fn give_history(&self, learner: &mut BurnLearner) -> anyhow::Result<()> {
        if let Some(decay) = self.history_decay {
            learner.keep_history(decay);
        }
        let Some(folder) = &self.history else { return Ok(()) };
        if !folder.join(CONFIG_FILE).is_file() {
            let error = anyhow::anyhow!(
                "{} holds no {CONFIG_FILE}; give a checkpoint to --history",
                folder.display()
            );
            return Err(error).or_usage();
        }
        let config = ModelConfig::read(folder).or_data()?;
        if config != *learner.config() {
            let error = anyhow::anyhow!(
                "the model in {} has another shape than the one in training; give an older checkpoint of the same \
                 model to --history",
                folder.display()
            );
            return Err(error).or_usage();
        }
        learner.keep_as_history(read_weights(folder, &config).or_data()?).or_data()
    }

    /// The history's settings, for `run.json`.
    pub fn history_settings(&self) -> serde_json::Value {
        json!({ "checkpoint": self.history, "decay": self.history_decay })
    }
}

/// The paper's share.
fn default_keep() -> anyhow::Result<KeepRatio> {
    KeepRatio::try_from(0.6).or_usage()
}

fn finite(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err("must be a finite number".to_owned()),
    }
}

fn decay(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number < 1.0 => Ok(number),
        _ => Err("must be above 0 and below 1, such as 0.99".to_owned()),
    }
}
