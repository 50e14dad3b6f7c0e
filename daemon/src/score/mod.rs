//! The scorer: batches of windows in, one loss for each token asked for out. Kafka is unknown here.

pub mod attention;
mod claims;
mod constant;
pub mod documents;
mod environment;
pub mod findings;
pub mod graft;
mod graft_error;
mod head;
mod identity;
mod inputs;
pub mod kind;
mod limits;
pub mod model;
mod model_config;
pub mod model_thread;
pub mod names;
pub mod placement;
pub mod policy;
mod precision;
mod rotation;
pub mod runtime;
pub mod self_test;
pub mod warm_up;
mod widen;

use anyhow::{Context as _, bail};
use ort::session::{RunOptions, Session, SessionInputValue};
use ort::value::TensorRef;
use sluice_schemas::onnx::tensor_proto::DataType;

use crate::batch::{Batch, Ladder, Window};
pub use identity::ModelIdentity;
use model::Model;
use names::{
    ATTENTION_MASK, ENTROPY_OUTPUT, LOSS_OUTPUT, POSITION_IDS, POSITIONS_OUTPUT, ROWS_INPUT, TARGETS_INPUT,
    TOKEN_IDS,
};
use placement::Placement;
use runtime::SessionOptions;

/// Length of the row that shows what runs where; what a model is made of does not change with it.
const PLACEMENT_TOKENS: usize = 8;

/// Losses, and entropies where they were asked for, in the order of a batch's targets; nats.
#[derive(Debug, Default)]
pub struct Scores {
    /// `-log P(target | what stands before it)`; of a token classifier `-log P(class | all that it sees)`.
    pub losses: Vec<f32>,
    /// Entropy of the distribution that the target was drawn from; empty where not asked for.
    pub entropies: Vec<f32>,
}

/// The probability that a loss in nats is of: `p = exp(-loss)`, within 0 to 1; NaN stays NaN.
pub fn probability(loss: f32) -> f32 {
    // The loss of a class that is nearly certain may be rounded to just below 0.
    (-loss).exp().clamp(0.0, 1.0)
}

/// What turns batches into losses: the reference model, or something that stands in for it in a measurement.
pub trait Score: Send {
    /// Scores every target of `batch`, in order.
    fn score(&mut self, batch: &Batch) -> anyhow::Result<Scores>;
}

/// Whether the model failed because the device had no memory left, which a smaller batch may cure.
pub fn is_out_of_memory(error: &anyhow::Error) -> bool {
    // ONNX Runtime has one error code for everything that goes wrong in a run, so its words decide: those of its arena,
    // of the C++ library, of CUDA and of cuBLAS.
    const WORDS: [&str; 6] = [
        "failed to allocate memory",
        "available memory of",
        "bad_alloc",
        "out of memory",
        "cuda failure 2:",
        "alloc_failed",
    ];
    let message = format!("{error:#}").to_lowercase();
    WORDS.iter().any(|words| message.contains(words))
}

/// The inputs that Sluice knows how to fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    TokenIds,
    AttentionMask,
    PositionIds,
}

/// A reference model on its device. One thread owns it.
#[derive(Debug)]
pub struct Scorer {
    session: Session,
    inputs: Vec<(Input, String, DataType)>,
    entropies: bool,
}

impl Scorer {
    /// Opens a session for `model`; an input that Sluice cannot fill is an error.
    pub fn new(model: &Model, options: &SessionOptions, entropies: bool) -> anyhow::Result<Self> {
        let mut inputs = Vec::new();
        for (name, element) in &model.inputs {
            let input = match name.as_str() {
                TOKEN_IDS => Input::TokenIds,
                ATTENTION_MASK => Input::AttentionMask,
                POSITION_IDS => Input::PositionIds,
                _ => bail!("the model wants an input `{name}`, which Sluice does not feed"),
            };
            if !matches!(element, DataType::Int32 | DataType::Int64) {
                bail!("the model's input `{name}` has elements of {element:?}; int32 and int64 are known");
            }
            inputs.push((input, name.clone(), *element));
        }
        if !inputs.iter().any(|(input, ..)| *input == Input::TokenIds) {
            bail!("the model has no input named `input_ids`");
        }
        Ok(Self { session: runtime::open_session(model, options)?, inputs, entropies })
    }
}

impl Scorer {
    /// Runs a short row and says on which provider each node ran.
    pub fn placement(&mut self) -> anyhow::Result<Placement> {
        let window = Window::whole(0, vec![0; PLACEMENT_TOKENS].into(), None);
        let batch = Batch::new(vec![window], Ladder::new(PLACEMENT_TOKENS, 1));
        let folder = tempfile::tempdir().context(
            "cannot make a folder for ONNX Runtime's profile; name one that can be written to as TMPDIR",
        )?;
        let mut options = RunOptions::new()?;
        options.enable_profiling(folder.path().join("batch"))?;
        self.run(&batch, &options)?;
        // ONNX Runtime ends the file's name with the time.
        let file = std::fs::read_dir(folder.path())?
            .next()
            .context("ONNX Runtime wrote no profile of a batch")??;
        Placement::from_profile(&std::fs::read(file.path())?)
    }

    fn run(&mut self, batch: &Batch, options: &RunOptions) -> anyhow::Result<Scores> {
        if batch.targets.is_empty() {
            return Ok(Scores::default());
        }
        let shape = [batch.padded_rows, batch.padded_len];
        // One buffer for each input, alive until the run is over.
        let filled: Vec<Integers<'_>> = self
            .inputs
            .iter()
            .map(|(input, _, element)| {
                let values = match input {
                    Input::TokenIds => &batch.tokens,
                    Input::AttentionMask => &batch.attention_mask,
                    Input::PositionIds => &batch.position_ids,
                };
                Integers::new(values, *element)
            })
            .collect();
        let mut feed: Vec<(&str, SessionInputValue<'_>)> = Vec::new();
        for ((_, name, _), values) in self.inputs.iter().zip(&filled) {
            let tensor: SessionInputValue<'_> = match values {
                Integers::Long(values) => TensorRef::from_array_view((shape, *values))?.into(),
                Integers::Short(values) => TensorRef::from_array_view((shape, values.as_slice()))?.into(),
            };
            feed.push((name, tensor));
        }
        let asked = [batch.targets.len()];
        feed.push((ROWS_INPUT, TensorRef::from_array_view((asked, batch.target_rows.as_slice()))?.into()));
        feed.push((TARGETS_INPUT, TensorRef::from_array_view((asked, batch.targets.as_slice()))?.into()));

        let outputs = self.session.run_with_options(feed, options).context("the model failed on a batch")?;
        let (_, positions) =
            outputs[POSITIONS_OUTPUT].try_extract_tensor::<i64>().context("the loss head's positions")?;
        if positions != [batch.tokens.len() as i64] {
            bail!(
                "the model has hidden states of {} positions for {} tokens; it was exported to generate (with logits \
                 of the last position alone), so export it without that",
                positions.first().unwrap_or(&0),
                batch.tokens.len()
            );
        }
        let (_, losses) =
            outputs[LOSS_OUTPUT].try_extract_tensor::<f32>().context("the loss head's output")?;
        let entropies = if self.entropies {
            outputs[ENTROPY_OUTPUT]
                .try_extract_tensor::<f32>()
                .context("the loss head's entropies")?
                .1
                .to_vec()
        } else {
            Vec::new()
        };
        if losses.len() != batch.targets.len() {
            bail!("the model returned {} losses for {} tokens", losses.len(), batch.targets.len());
        }
        Ok(Scores { losses: losses.to_vec(), entropies })
    }
}

impl Score for Scorer {
    fn score(&mut self, batch: &Batch) -> anyhow::Result<Scores> {
        self.run(batch, &RunOptions::new()?)
    }
}

/// An input's values in the width that the model wants.
enum Integers<'a> {
    Long(&'a [i64]),
    Short(Vec<i32>),
}

impl<'a> Integers<'a> {
    fn new(values: &'a [i64], element: DataType) -> Self {
        if element == DataType::Int32 {
            Self::Short(values.iter().map(|&value| value as i32).collect())
        } else {
            Self::Long(values)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::probability;

    #[test]
    fn a_probability_lies_between_0_and_1() {
        let bits = [f32::INFINITY, 0.0, -0.0, -1e-6].map(|loss| probability(loss).to_bits());
        assert_eq!(bits, [0.0_f32, 1.0, 1.0, 1.0].map(f32::to_bits));
        assert!((probability(2.0_f32.ln()) - 0.5).abs() < 1e-6);
        assert!(probability(f32::NAN).is_nan());
    }
}
