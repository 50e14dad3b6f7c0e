//! A Llama-style decoder and its selective training step, on Burn tensors.
//!
//! - [`config`]: the shape of a model, to and from Hugging Face's `config.json`;
//! - [`weights`]: every weight under its Hugging Face name, and its seeded start;
//! - [`checkpoint`]: those weights in safetensors files;
//! - `layers`: the decoder's operations, each with its gradient; `decoder`: the body made of them;
//! - `head`: the LM head, its losses and its gradient, in blocks of rows;
//! - [`learner`]: all of it behind [`Learner`](crate::learner::Learner).
//!
//! The body's gradient is written out next to each operation instead of being recorded by Burn's autodiff: under
//! autodiff attention is unfused, and its passes over `[rows, heads, len, len]` run on one core. Written out, and
//! in groups of rows side by side (see `parallel`), the body's forward and backward took 0.6 of autodiff's time
//! on two cores (16 x 256 tokens, hidden 128 and 256).

pub mod checkpoint;
pub mod config;
pub(crate) mod decoder;
mod head;
mod layers;
pub mod learner;
mod parallel;
pub mod weights;

pub use config::ModelConfig;
pub use learner::BurnLearner;
pub use weights::NamedTensor;
