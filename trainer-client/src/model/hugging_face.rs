//! A model's shape to and from Hugging Face's `config.json`. What else a published folder holds is in
//! [`carried`](super::carried).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use sluice_text::{json, refuse_pointer};

use super::config::{
    CONFIG_FILE, INITIAL_DEVIATION, ModelConfig, Scales, Variant, default_rms_norm_eps, default_rope_theta,
};
use super::rope::{RopeScaling, yarn_attention_factor};

/// The families that this decoder computes, by `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Granite,
}

impl Family {
    fn of(model_type: &str) -> Result<Self> {
        match model_type {
            "llama" => Ok(Self::Llama),
            "mistral" => Ok(Self::Mistral),
            "qwen2" => Ok(Self::Qwen2),
            "qwen3" => Ok(Self::Qwen3),
            "granite" => Ok(Self::Granite),
            _ => bail!(
                "model_type is \"{model_type}\", and the decoder computes llama, mistral, qwen2, qwen3 and granite alone: \
                 start from a model of those"
            ),
        }
    }
}

/// The keys of `config.json` that decide how a model computes, under Hugging Face's names and defaults.
#[derive(Deserialize)]
struct HuggingFaceConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    original_max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    partial_rotary_factor: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    sliding_window: Sliding,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    embedding_multiplier: Option<f64>,
    attention_multiplier: Option<f64>,
    residual_multiplier: Option<f64>,
    logits_scaling: Option<f64>,
    quantization_config: Option<Value>,
}

/// Tokens that a token sees. Absent is not the same as null: families have defaults.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(from = "Option<usize>")]
enum Sliding {
    #[default]
    Absent,
    Given(Option<usize>),
}

impl From<Option<usize>> for Sliding {
    fn from(given: Option<usize>) -> Self {
        Self::Given(given)
    }
}

impl Sliding {
    /// What is given, or 4,096, the default of all families that have such a thing.
    fn or_default(self) -> Option<usize> {
        match self {
            Self::Absent => Some(4096),
            Self::Given(given) => given,
        }
    }
}

/// `rope_scaling`, or the `rope_parameters` of transformers 5.
#[derive(Deserialize)]
#[allow(clippy::struct_field_names, reason = "they are the file's")]
struct Rope {
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    attention_factor: Option<f64>,
    truncate: Option<bool>,
    full_attention: Option<Value>,
    sliding_attention: Option<Value>,
}

impl Rope {
    /// The scaling that it asks for. `longest` is the model's longest sequence, `original` what stands outside.
    fn scaling(&self, longest: usize, original: Option<usize>) -> Result<RopeScaling> {
        if self.full_attention.is_some() || self.sliding_attention.is_some() {
            bail!("rotary embeddings differ from layer to layer, which is not implemented");
        }
        let kind = self.rope_type.as_deref().or(self.old_type.as_deref()).unwrap_or("default");
        let need = |name: &str, value: Option<f64>| {
            value.with_context(|| format!("rotary embeddings are scaled (\"{kind}\") without {name}"))
        };
        let original = original.or(self.original_max_position_embeddings).unwrap_or(longest);
        Ok(match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: need("factor", self.factor)? },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor", self.factor)?,
                low_freq_factor: need("low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", self.high_freq_factor)?,
                original_max_position_embeddings: original,
            },
            "yarn" => {
                let factor = self.factor.unwrap_or(longest as f64 / original as f64);
                let of = |mscale| yarn_attention_factor(factor, mscale);
                // A zero counts as none, as in Python.
                let inferred = match (self.mscale, self.mscale_all_dim) {
                    (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => of(mscale) / of(all),
                    _ => of(1.0),
                };
                let or = |value: Option<f64>, default| value.filter(|&v| v != 0.0).unwrap_or(default);
                RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: or(self.beta_fast, 32.0),
                    beta_slow: or(self.beta_slow, 1.0),
                    attention_factor: self.attention_factor.unwrap_or(inferred),
                    truncate: self.truncate.unwrap_or(true),
                }
            }
            _ => bail!(
                "rotary embeddings are scaled (\"{kind}\"), and only default, linear, llama3 and yarn are implemented"
            ),
        })
    }
}

impl HuggingFaceConfig {
    /// Tokens that a token sees at most, where some layer sees fewer than all before it.
    fn sliding_window(&self, family: Family) -> Option<usize> {
        match family {
            Family::Llama | Family::Granite => None,
            Family::Mistral => self.sliding_window.or_default(),
            Family::Qwen2 | Family::Qwen3 => {
                let slides = self.use_sliding_window.unwrap_or(false);
                self.sliding_window.or_default().filter(|_| slides)
            }
        }
    }

    fn refuse_what_is_not_implemented(&self) -> Result<()> {
        if let Some(activation) = &self.hidden_act {
            ensure!(activation == "silu", "hidden_act is \"{activation}\", but only \"silu\" is implemented");
        }
        for (key, bias) in [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)] {
            ensure!(!bias.unwrap_or(false), "{key} is true, but only Qwen2's biases are implemented");
        }
        ensure!(
            self.quantization_config.is_none(),
            "the weights are quantized (quantization_config): take the model as it was before, in 16 or 32 bits"
        );
        let others = |kind: &&String| !matches!(kind.as_str(), "full_attention" | "sliding_attention");
        if let Some(kind) = self.layer_types.iter().flatten().find(others) {
            bail!("layer_types names \"{kind}\", which is not implemented");
        }
        let ropes = [&self.rope_scaling, &self.rope_parameters].into_iter().flatten();
        let partial = ropes.filter_map(|rope| rope.partial_rotary_factor).chain(self.partial_rotary_factor);
        #[allow(clippy::float_cmp, reason = "1 is what the file says")]
        if let Some(factor) = partial.into_iter().find(|&factor| factor != 1.0) {
            bail!("partial_rotary_factor is {factor}, but heads that turn in part are not implemented");
        }
        Ok(())
    }
}

impl ModelConfig {
    /// Reads `config.json` in `folder`; fails if it is not a model that this decoder computes exactly.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        let json = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        refuse_pointer(&path, &json)?;
        Self::from_hugging_face(&json).with_context(|| format!("cannot use {}", path.display()))
    }

    /// Parses a Hugging Face `config.json`. A window that slides over the tokens bounds the longest sequence: up to there
    /// it changes nothing.
    pub fn from_hugging_face(json: &[u8]) -> Result<Self> {
        // Of a key that stands there twice the last one counts, as for Python.
        let file: HuggingFaceConfig = json::from_slice(json)
            .or_else(|error| {
                json::from_slice::<Value>(json).and_then(serde_json::from_value).map_err(|_| error)
            })
            .context("not a configuration of a language model")?;
        let family = Family::of(&file.model_type)?;
        file.refuse_what_is_not_implemented()?;
        let longest = file.max_position_embeddings.unwrap_or(match family {
            Family::Llama | Family::Granite => 2048,
            Family::Mistral => 4096 * 32,
            Family::Qwen2 | Family::Qwen3 => 32_768,
        });
        // What transformers 5 writes counts for more.
        let rope = file.rope_parameters.as_ref().or(file.rope_scaling.as_ref());
        let rope_scaling = match rope {
            Some(rope) => rope.scaling(longest, file.original_max_position_embeddings)?,
            None => RopeScaling::Default,
        };
        let rope_theta = rope.and_then(|rope| rope.rope_theta).or(file.rope_theta);
        let scales = if family == Family::Granite {
            Scales {
                embedding: file.embedding_multiplier.unwrap_or(1.0),
                attention: Some(file.attention_multiplier.unwrap_or(1.0)),
                residual: file.residual_multiplier.unwrap_or(1.0),
                logits: file.logits_scaling.unwrap_or(1.0),
            }
        } else {
            Scales::default()
        };
        let divided = file.hidden_size.checked_div(file.num_attention_heads).unwrap_or(0);
        let head_dim = file.head_dim.or((family == Family::Qwen3).then_some(128));
        let config = Self {
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            layers: file.num_hidden_layers,
            heads: file.num_attention_heads,
            kv_heads: file.num_key_value_heads.unwrap_or(match family {
                Family::Llama | Family::Granite => file.num_attention_heads,
                Family::Mistral => 8,
                Family::Qwen2 | Family::Qwen3 => 32,
            }),
            max_position_embeddings: longest.min(file.sliding_window(family).unwrap_or(longest)),
            rope_theta: rope_theta.unwrap_or_else(default_rope_theta),
            rms_norm_eps: file.rms_norm_eps.unwrap_or_else(default_rms_norm_eps),
            tie_word_embeddings: file.tie_word_embeddings.unwrap_or(false),
            variant: Variant {
                head_dim: head_dim.filter(|&width| {
                    width != divided || !file.hidden_size.is_multiple_of(file.num_attention_heads.max(1))
                }),
                qkv_bias: family == Family::Qwen2,
                qk_norm: family == Family::Qwen3,
                rope_scaling,
                scales,
            },
        };
        config.validate()?;
        Ok(config)
    }

    /// The `model_type` and architecture that compute such a model. Nothing tells a Mistral from a Llama.
    fn architecture(&self) -> (&'static str, &'static str) {
        let Variant { qkv_bias, qk_norm, scales, .. } = &self.variant;
        if *qk_norm {
            ("qwen3", "Qwen3ForCausalLM")
        } else if *qkv_bias {
            ("qwen2", "Qwen2ForCausalLM")
        } else if *scales == Scales::default() {
            ("llama", "LlamaForCausalLM")
        } else {
            ("granite", "GraniteForCausalLM")
        }
    }

    /// The text of a Hugging Face `config.json` for such a model in single precision, made by nobody else. No token begins
    /// or ends a text, as nothing is known of any; where the key is absent, transformers takes Llama's own.
    pub fn to_hugging_face(&self) -> String {
        let (model_type, architecture) = self.architecture();
        let mut value = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim(),
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "attention_dropout": 0.0,
            "initializer_range": INITIAL_DEVIATION,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": true,
            "bos_token_id": null,
            "eos_token_id": null,
            // transformers reads `dtype` from version 4.56 on and `torch_dtype` before.
            "dtype": "float32",
            "torch_dtype": "float32",
        });
        if self.variant.rope_scaling != RopeScaling::Default {
            value["rope_scaling"] = json!(self.variant.rope_scaling);
        }
        let Scales { embedding, attention, residual, logits } = self.variant.scales;
        if model_type == "granite" {
            value["embedding_multiplier"] = embedding.into();
            value["attention_multiplier"] = attention.unwrap_or_else(|| self.attention_scale()).into();
            value["residual_multiplier"] = residual.into();
            value["logits_scaling"] = logits.into();
        }
        format!("{value:#}\n")
    }
}
