//! Every weight of the decoder under its Hugging Face name, and its seeded start.

use std::collections::HashMap;
use std::f64::consts::TAU;

use anyhow::{Result, bail, ensure};
use burn::tensor::{Device, Tensor, TensorData};
use sluice_feed::random::SplitMix64;

use super::config::{INITIAL_DEVIATION, ModelConfig};
use super::host::to_host;
use crate::run::tensors::{NamedTensor, Pending};

/// Name and shape of a weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Hugging Face name.
    pub name: String,
    /// `[out, in]` for a matrix, `[width]` for a norm or a bias.
    pub shape: Vec<usize>,
}

/// One value for each weight that only some families have in their projections of queries, keys and values.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extras<T> {
    /// Qwen2: added to the projections.
    pub query_bias: Option<T>,
    pub key_bias: Option<T>,
    pub value_bias: Option<T>,
    /// Qwen3: of the root mean square norms of each head's query and key.
    pub query_norm: Option<T>,
    pub key_norm: Option<T>,
}

/// One value (a weight, its gradient, ...) for each weight of a decoder layer.
#[derive(Clone, Debug)]
pub(crate) struct Layer<T> {
    pub input_norm: T,
    pub query: T,
    pub key: T,
    pub value: T,
    pub output: T,
    pub mlp_norm: T,
    pub gate: T,
    pub up: T,
    pub down: T,
    pub extras: Extras<T>,
}

/// One value for each weight of a decoder.
#[derive(Clone, Debug)]
pub(crate) struct Weights<T> {
    pub embedding: T,
    pub layers: Vec<Layer<T>>,
    pub norm: T,
    /// None when the head is the embedding itself.
    pub head: Option<T>,
}

/// Names and shapes of all weights, in the order of [`Weights::into_vec`].
pub fn specs(config: &ModelConfig) -> Vec<Spec> {
    let ModelConfig { vocab_size, hidden_size: hidden, intermediate_size: inner, .. } = *config;
    let width = config.head_dim();
    let (query, kv) = (config.heads * width, config.kv_heads * width);
    let spec = |name: String, shape: &[usize]| Spec { name, shape: shape.to_vec() };
    let mut specs = vec![spec("model.embed_tokens.weight".to_owned(), &[vocab_size, hidden])];
    for layer in 0..config.layers {
        let mut add = |name: &str, shape: &[usize]| {
            specs.push(spec(format!("model.layers.{layer}.{name}"), shape));
        };
        add("input_layernorm.weight", &[hidden]);
        add("self_attn.q_proj.weight", &[query, hidden]);
        add("self_attn.k_proj.weight", &[kv, hidden]);
        add("self_attn.v_proj.weight", &[kv, hidden]);
        add("self_attn.o_proj.weight", &[hidden, query]);
        add("post_attention_layernorm.weight", &[hidden]);
        add("mlp.gate_proj.weight", &[inner, hidden]);
        add("mlp.up_proj.weight", &[inner, hidden]);
        add("mlp.down_proj.weight", &[hidden, inner]);
        if config.variant.qkv_bias {
            add("self_attn.q_proj.bias", &[query]);
            add("self_attn.k_proj.bias", &[kv]);
            add("self_attn.v_proj.bias", &[kv]);
        }
        if config.variant.qk_norm {
            add("self_attn.q_norm.weight", &[width]);
            add("self_attn.k_norm.weight", &[width]);
        }
    }
    specs.push(spec("model.norm.weight".to_owned(), &[hidden]));
    if !config.tie_word_embeddings {
        specs.push(spec("lm_head.weight".to_owned(), &[vocab_size, hidden]));
    }
    specs
}

impl ModelConfig {
    /// Number of weights, embeddings included.
    pub fn parameters(&self) -> usize {
        specs(self).iter().map(|spec| spec.shape.iter().product::<usize>()).sum()
    }
}

impl<T> Extras<T> {
    fn into_options(self) -> [Option<T>; 5] {
        let Self { query_bias, key_bias, value_bias, query_norm, key_norm } = self;
        [query_bias, key_bias, value_bias, query_norm, key_norm]
    }

    fn from_options([query_bias, key_bias, value_bias, query_norm, key_norm]: [Option<T>; 5]) -> Self {
        Self { query_bias, key_bias, value_bias, query_norm, key_norm }
    }
}

impl<T> Layer<T> {
    /// Builds from values in the order of [`specs`]; `next` gives the one that comes next.
    fn from_next(config: &ModelConfig, mut next: impl FnMut() -> Result<T>) -> Result<Self> {
        let variant = &config.variant;
        let layer = [next()?, next()?, next()?, next()?, next()?, next()?, next()?, next()?, next()?];
        let mut next_if = |has: bool| if has { next().map(Some) } else { Ok(None) };
        let extras = Extras {
            query_bias: next_if(variant.qkv_bias)?,
            key_bias: next_if(variant.qkv_bias)?,
            value_bias: next_if(variant.qkv_bias)?,
            query_norm: next_if(variant.qk_norm)?,
            key_norm: next_if(variant.qk_norm)?,
        };
        Ok(Self::from_parts(layer, extras))
    }

    fn from_parts(parts: [T; 9], extras: Extras<T>) -> Self {
        let [input_norm, query, key, value, output, mlp_norm, gate, up, down] = parts;
        Self { input_norm, query, key, value, output, mlp_norm, gate, up, down, extras }
    }

    fn into_parts(self) -> ([T; 9], Extras<T>) {
        let Self { input_norm, query, key, value, output, mlp_norm, gate, up, down, extras } = self;
        ([input_norm, query, key, value, output, mlp_norm, gate, up, down], extras)
    }

    /// Changes every weight.
    pub fn map(self, change: impl Fn(T) -> T) -> Self {
        let (parts, extras) = self.into_parts();
        let extras = Extras::from_options(extras.into_options().map(|extra| extra.map(&change)));
        Self::from_parts(parts.map(&change), extras)
    }

    /// Combines two layers of one shape weight by weight.
    pub fn zip_with(self, other: Self, combine: impl Fn(T, T) -> T) -> Self {
        let ((parts, extras), (others, other_extras)) = (self.into_parts(), other.into_parts());
        // Both arrays have the same length, so the fallbacks are never taken.
        let (mut others, mut other_extras) = (others.into_iter(), other_extras.into_options().into_iter());
        let parts = parts.map(|own| match others.next() {
            Some(other) => combine(own, other),
            None => own,
        });
        let extras = extras.into_options().map(|own| match (own, other_extras.next().flatten()) {
            (Some(own), Some(other)) => Some(combine(own, other)),
            (own, _) => own,
        });
        Self::from_parts(parts, Extras::from_options(extras))
    }

    fn into_values(self) -> impl Iterator<Item = T> {
        let (parts, extras) = self.into_parts();
        parts.into_iter().chain(extras.into_options().into_iter().flatten())
    }
}

impl<T> Weights<T> {
    /// Builds from values in the order of [`specs`], one for each spec.
    pub fn from_vec(config: &ModelConfig, values: Vec<T>) -> Result<Self> {
        let expected = specs(config).len();
        ensure!(values.len() == expected, "{} weights given, the model has {expected}", values.len());
        let mut values = values.into_iter();
        let mut next =
            || values.next().ok_or_else(|| anyhow::anyhow!("the model has more weights than were given"));
        let embedding = next()?;
        let mut layers = Vec::with_capacity(config.layers);
        for _ in 0..config.layers {
            layers.push(Layer::from_next(config, &mut next)?);
        }
        Ok(Self { embedding, layers, norm: next()?, head: next().ok() })
    }

    /// All values in the order of [`specs`].
    pub fn into_vec(self) -> Vec<T> {
        let mut values = vec![self.embedding];
        values.extend(self.layers.into_iter().flat_map(Layer::into_values));
        values.push(self.norm);
        values.extend(self.head);
        values
    }

    /// Changes every value.
    pub fn map(self, change: impl Fn(T) -> T) -> Self {
        Self {
            embedding: change(self.embedding),
            layers: self.layers.into_iter().map(|layer| layer.map(&change)).collect(),
            norm: change(self.norm),
            head: self.head.map(&change),
        }
    }

    /// Combines the values of two decoders of one shape, weight by weight.
    pub fn zip_with(self, other: Self, combine: impl Fn(T, T) -> T) -> Self {
        let layers = self.layers.into_iter().zip(other.layers);
        Self {
            embedding: combine(self.embedding, other.embedding),
            layers: layers.map(|(own, other)| own.zip_with(other, &combine)).collect(),
            norm: combine(self.norm, other.norm),
            head: self.head.zip(other.head).map(|(own, other)| combine(own, other)),
        }
    }

    /// All values, in the order of [`specs`].
    pub fn as_vec(&self) -> Vec<&T> {
        let mut values = vec![&self.embedding];
        for layer in &self.layers {
            let Layer { input_norm, query, key, value, output, mlp_norm, gate, up, down, extras } = layer;
            values.extend([input_norm, query, key, value, output, mlp_norm, gate, up, down]);
            let Extras { query_bias, key_bias, value_bias, query_norm, key_norm } = extras;
            values.extend([query_bias, key_bias, value_bias, query_norm, key_norm].into_iter().flatten());
        }
        values.push(&self.norm);
        values.extend(&self.head);
        values
    }

    /// All values, to be changed, in the order of [`specs`].
    pub fn as_vec_mut(&mut self) -> Vec<&mut T> {
        let mut values = vec![&mut self.embedding];
        for layer in &mut self.layers {
            let Layer { input_norm, query, key, value, output, mlp_norm, gate, up, down, extras } = layer;
            values.extend([input_norm, query, key, value, output, mlp_norm, gate, up, down]);
            let Extras { query_bias, key_bias, value_bias, query_norm, key_norm } = extras;
            values.extend([query_bias, key_bias, value_bias, query_norm, key_norm].into_iter().flatten());
        }
        values.push(&mut self.norm);
        values.extend(&mut self.head);
        values
    }

    /// The matrix that turns hidden states into logits, `[vocab, hidden]`.
    pub fn head(&self) -> &T {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Fresh weights: matrices normal(0, 0.02), norms 1, biases 0. The same seed gives the same bits, whatever else runs.
pub(crate) fn initial(config: &ModelConfig, seed: u64) -> Vec<NamedTensor> {
    let mut generator = NormalGenerator::new(seed);
    specs(config)
        .into_iter()
        .map(|Spec { name, shape }| {
            let count = shape.iter().product();
            let values = if shape.len() == 1 {
                vec![if name.ends_with("_proj.bias") { 0.0 } else { 1.0 }; count]
            } else {
                (0..count).map(|_| (generator.sample() * INITIAL_DEVIATION) as f32).collect()
            };
            NamedTensor { name, shape, values }
        })
        .collect()
}

/// Checks names, shapes and values against the model, and sorts in the order of [`specs`].
pub(crate) fn in_order(config: &ModelConfig, weights: Vec<NamedTensor>) -> Result<Vec<NamedTensor>> {
    let mut by_name: HashMap<_, _> =
        weights.into_iter().map(|weight| (weight.name.clone(), weight)).collect();
    let mut sorted = Vec::new();
    for Spec { name, shape } in specs(config) {
        let Some(weight) = by_name.remove(&name) else {
            bail!("weight {name} is missing: use the config.json that belongs to the weights");
        };
        ensure!(
            weight.shape == shape && weight.values.len() == shape.iter().product::<usize>(),
            "weight {name} has shape {:?}, the model needs {shape:?}: use the config.json that belongs to the weights",
            weight.shape
        );
        sorted.push(weight);
    }
    sorted.iter().try_for_each(|NamedTensor { name, values, .. }| check_values_finite(name, values))?;
    if let Some(name) = by_name.keys().min() {
        bail!("weight {name} is not part of this model: use the config.json that belongs to the weights");
    }
    Ok(sorted)
}

/// Refuses a weight that is not finite.
fn check_values_finite(name: &str, values: &[f32]) -> Result<()> {
    ensure!(
        values.iter().all(|value| value.is_finite()),
        "weight {name} holds values that are not finite: take an earlier checkpoint"
    );
    Ok(())
}

/// Puts host weights on a device, in the order of [`specs`], after checking them against the model.
/// Norms and biases become `[1, width]`, so that every weight is a matrix.
pub(crate) fn upload(
    config: &ModelConfig,
    weights: Vec<NamedTensor>,
    device: &Device,
) -> Result<Vec<Tensor<2>>> {
    let weights = in_order(config, weights)?.into_iter();
    let tensor = |NamedTensor { shape, values, .. }: NamedTensor| {
        Tensor::from_data(TensorData::new(values, as_matrix(&shape)), device)
    };
    Ok(weights.map(tensor).collect())
}

/// Copies tensors, in the order of [`specs`], to the host.
pub(crate) fn download(config: &ModelConfig, tensors: Vec<Tensor<2>>) -> Vec<NamedTensor> {
    let pairs = specs(config).into_iter().zip(tensors);
    pairs.map(|(Spec { name, shape }, tensor)| NamedTensor { name, shape, values: to_host(tensor) }).collect()
}

/// Tensors in the order of [`specs`] to be written, each copied to the host when it is its turn. One that holds a value
/// that is not finite fails then.
pub(crate) fn pending<'a>(
    config: &ModelConfig,
    prefix: &str,
    tensors: Vec<&'a Tensor<2>>,
) -> Vec<Pending<'a>> {
    let pairs = specs(config).into_iter().zip(tensors);
    let pending = pairs.map(|(Spec { name, shape }, tensor)| {
        let own = name.clone();
        Pending::new(format!("{prefix}{name}"), shape, move || {
            let values = to_host(tensor.clone());
            check_values_finite(&own, &values)?;
            Ok(values)
        })
    });
    pending.collect()
}

fn as_matrix(shape: &[usize]) -> [usize; 2] {
    match *shape {
        [rows, columns] => [rows, columns],
        _ => [1, shape.iter().product()],
    }
}

/// Normal deviates by Box and Muller's transform over `SplitMix64`.
struct NormalGenerator {
    bits: SplitMix64,
    spare: Option<f64>,
}

impl NormalGenerator {
    fn new(seed: u64) -> Self {
        Self { bits: SplitMix64::new(seed), spare: None }
    }

    /// Uniform in (0, 1]: never 0, whose logarithm is infinite.
    fn uniform(&mut self) -> f64 {
        ((self.bits.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn sample(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        let angle = TAU * self.uniform();
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_bits_in_every_version() {
        let mut generator = NormalGenerator::new(7);
        let weights = [(); 6].map(|()| (generator.sample() * INITIAL_DEVIATION) as f32);
        // From the first version that made weights.
        let expected = [0x3cdf_a3ed, 0x3b3d_6d46, 0xbc01_eed8, 0xbb95_2853, 0x38bc_ae8f, 0x3cce_5873];
        assert_eq!(weights.map(f32::to_bits), expected);
    }

    #[test]
    fn deviates_are_standard_normal() {
        let mut generator = NormalGenerator::new(7);
        let samples: Vec<f64> = (0..100_000).map(|_| generator.sample()).collect();
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let variance = samples.iter().map(|x| x * x).sum::<f64>() / samples.len() as f64;
        assert!(mean.abs() < 0.02, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.02, "variance {variance}");
    }
}
