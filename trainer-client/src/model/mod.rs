//! A Llama-style decoder and its selective training step, on Burn tensors.
//!
//! - [`config`]: the shape of a model; [`hugging_face`]: to and from Hugging Face's `config.json`; [`rope`]: rotary
//!   frequencies;
//! - [`weights`]: every weight under its Hugging Face name, and its seeded start;
//! - [`cost`]: floating point operations of training and scoring, from the shapes alone;
//! - [`checkpoint`]: those weights in a folder; [`carried`]: what goes along with them; [`optimizer`]: AdamW;
//! - `layers`: the decoder's operations, each with its gradient; `norm`: the norm, `projection`: what some families add to
//!   projections; `attention`: what a token looks at, in blocks; `decoder`: the body made of them;
//! - [`backward`]: what a gradient flows through; `rows`: the rows of matrices that it flows into;
//! - [`device`]: where a model computes, and in which precision;
//! - `host`: values between a device and this process's memory; `counters`: how often a device was waited for;
//! - `kernels`: what the CPU does in one pass over slices where tensor operations take several;
//! - `embedding`: the gradient of the embedding; `head`: the LM head, its losses and its gradient, in blocks of the
//!   vocabulary;
//! - [`learner`]: all of it behind [`Learner`](crate::training::learner::Learner).
//!
//! The body's gradient is written out next to each operation instead of being recorded by Burn's autodiff, which keeps what
//! no gradient needs and knows no operation of `kernels`. Groups of rows run side by side (see `parallel`).

mod attention;
pub mod backward;
pub mod carried;
pub mod checkpoint;
pub mod config;
pub mod cost;
mod counters;
pub(crate) mod decoder;
pub mod device;
mod embedding;
mod head;
mod host;
pub mod hugging_face;
pub(crate) mod kernels;
mod layers;
pub mod learner;
mod norm;
pub mod optimizer;
mod parallel;
mod projection;
pub mod rope;
mod rows;
pub mod weights;

pub use crate::run::tensors::NamedTensor;
pub use backward::Backward;
pub use config::{ModelConfig, Variant};
pub use device::{Device, DeviceName, Precision};
pub use learner::BurnLearner;
