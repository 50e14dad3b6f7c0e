//! What `config.json` says of a model's attention and rotation, beside what its graph does. An exporter that does not know a
//! model's window, cap or scaling leaves it out without a word, and losses are then those of another model.

use serde_json::Value;

use super::findings::Finding;

/// A bound in a layer's attention, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Bound<T> {
    /// There may be one.
    #[default]
    Unknown,
    /// There is none.
    Without,
    /// There is this one.
    Of(T),
}

impl<T> From<Option<T>> for Bound<T> {
    fn from(bound: Option<T>) -> Self {
        bound.map_or(Self::Without, Self::Of)
    }
}

/// What is known of the attention of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerFacts {
    /// Tokens that a token sees, itself included; without one it sees all before it.
    pub window: Bound<i64>,
    /// Bound of the scaled products of queries and keys.
    pub soft_cap: Bound<f64>,
    /// Whether something else is added to them, such as a bias that falls with the distance; nothing where it is not known.
    pub biased: Option<bool>,
}

/// Rotary frequencies of a graph: one table of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rotation {
    /// Angles from one position to the next, of each pair of dimensions.
    pub(super) frequencies: Vec<f64>,
    /// What cosines and sines are multiplied by.
    pub(super) factor: f64,
}

/// Share by which a frequency may differ, which 16 bits round, from that which a configuration stands for.
const ROUNDING: f64 = 0.01;

/// What GPT-2, MPT and BLOOM call `max_position_embeddings`.
const LONGEST: [&str; 4] = ["n_positions", "n_ctx", "max_seq_len", "seq_length"];

/// `config.json` of a causal language model, or of its text part.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    config: Value,
}

impl Claims {
    /// Takes a configuration, in which the keys of `text_config` stand for those that are not there themselves, and other
    /// families' names of a key for the common one.
    pub(super) fn new(mut config: Value) -> Self {
        if let Some(Value::Object(text)) = config.get_mut("text_config").map(Value::take)
            && let Some(whole) = config.as_object_mut()
        {
            for (key, value) in text {
                if whole.get(&key).is_none_or(Value::is_null) {
                    whole.insert(key, value);
                }
            }
        }
        let longest = LONGEST.iter().map(|key| &config[*key]).find(|value| value.is_u64()).cloned();
        if let (Some(longest), Some(whole)) = (longest, config.as_object_mut()) {
            let known = whole.entry("max_position_embeddings").or_insert(Value::Null);
            if known.is_null() {
                *known = longest;
            }
        }
        Self { config }
    }

    /// The configuration with the text part's keys in their places.
    pub(super) fn config(&self) -> &Value {
        &self.config
    }

    /// Window of the layers that have one, where it is shorter than what the model was made for.
    fn window(&self) -> Option<i64> {
        let window = self.config["sliding_window"].as_i64().filter(|&window| window > 0)?;
        let is_used = self.config["use_sliding_window"].as_bool().unwrap_or(true);
        let longest = self.config["max_position_embeddings"].as_i64().unwrap_or(i64::MAX);
        (is_used && window < longest && self.windowed_layers() != Some(0)).then_some(window)
    }

    /// How many layers have a window, where the configuration lists them.
    fn windowed_layers(&self) -> Option<usize> {
        let types = self.config["layer_types"].as_array()?;
        Some(types.iter().filter(|of| of.as_str() == Some("sliding_attention")).count())
    }

    /// The kind of scaling of rotary angles.
    fn scaling(&self) -> Option<(&str, &Value)> {
        let scaling = ["rope_scaling", "rope_parameters"]
            .iter()
            .map(|key| &self.config[key])
            .find(|of| of.is_object())?;
        let kind = scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str())?;
        (kind != "default").then_some((kind, scaling))
    }

    /// Longest sequence that is rotated by the short table of `LongRoPE`.
    pub(super) fn longrope_limit(&self) -> Option<i64> {
        let (_, scaling) = self.scaling().filter(|(kind, _)| matches!(*kind, "longrope" | "su"))?;
        let key = "original_max_position_embeddings";
        let limit = self.config[key].as_i64().or_else(|| scaling[key].as_i64())?;
        let longest = self.config["max_position_embeddings"].as_i64().unwrap_or(i64::MAX);
        (limit > 0 && limit < longest).then_some(limit)
    }

    /// What the graph's attention is not, of what is said.
    pub(super) fn attention(&self, layers: &[LayerFacts], clips: bool) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut differs = |key: &'static str, says: String, graph: String| {
            findings.push(Finding::ConfigDiffers { key, says, graph });
        };
        if !layers.is_empty() && layers.iter().all(|layer| layer.window != Bound::Unknown) {
            let windows = layers.iter().filter_map(|layer| match layer.window {
                Bound::Of(window) => Some(window),
                _ => None,
            });
            let of_graph: Vec<i64> = windows.collect();
            let wanted = self.window();
            let has = || match of_graph.first() {
                None => "lets every token see all before it".to_owned(),
                Some(window) => {
                    format!("has a window of {window} in {} of {} layers", of_graph.len(), layers.len())
                }
            };
            match (wanted, of_graph.first()) {
                (Some(wanted), None) => differs("sliding_window", wanted.to_string(), has()),
                (Some(wanted), Some(_)) if of_graph.iter().any(|&window| window != wanted) => {
                    differs("sliding_window", wanted.to_string(), has());
                }
                (Some(_), Some(_)) => {
                    if let Some(count) = self.windowed_layers().filter(|&count| count != of_graph.len()) {
                        differs("layer_types", format!("{count} layers with a window"), has());
                    }
                }
                (None, _) => {}
            }
        }
        if let Some(wanted) = self.config["attn_logit_softcapping"].as_f64() {
            let other = layers.iter().find_map(|layer| match layer.soft_cap {
                Bound::Without => Some("does not cap its scores".to_owned()),
                Bound::Of(cap) if (cap - wanted).abs() > wanted * 1e-3 => {
                    Some(format!("caps its scores at {cap}"))
                }
                _ => None,
            });
            if let Some(graph) = other {
                differs("attn_logit_softcapping", wanted.to_string(), graph);
            }
        }
        let is_known_unbiased = !layers.is_empty() && layers.iter().all(|layer| layer.biased == Some(false));
        if self.config["alibi"].as_bool() == Some(true) && is_known_unbiased {
            differs("alibi", "true".to_owned(), "adds no bias to its scores".to_owned());
        }
        if let (Some(bound), false) = (self.config["clip_qkv"].as_f64(), clips) {
            differs("clip_qkv", bound.to_string(), "clips nothing".to_owned());
        }
        findings
    }

    /// What the graph's rotations are not, of what is said. `switches`: whether it takes another table beyond some length.
    pub(super) fn rotation(&self, rotations: &[Rotation], switches: bool) -> Option<Finding> {
        let (kind, _) = self.scaling()?;
        let differs = |graph: &str| {
            Some(Finding::ConfigDiffers {
                key: "rope_scaling",
                says: kind.to_owned(),
                graph: graph.to_owned(),
            })
        };
        match kind {
            "linear" | "llama3" | "yarn" => {
                let is_plain = |rotation: &Rotation| self.is_plain(rotation);
                let all_plain = !rotations.is_empty() && rotations.iter().all(is_plain);
                if all_plain { differs("rotates without scaling") } else { None }
            }
            "longrope" | "su" if self.longrope_limit().is_some() && !switches && rotations.len() == 1 => {
                differs("has one table of angles for all lengths")
            }
            _ => None,
        }
    }

    /// Whether angles are `theta ^ (-2 i / width)` (Su et al., arXiv 2104.09864, section 3.2.2) and nothing is scaled.
    fn is_plain(&self, rotation: &Rotation) -> bool {
        let theta = ["rope_scaling", "rope_parameters"]
            .iter()
            .find_map(|key| self.config[key]["rope_theta"].as_f64());
        let theta = self.config["rope_theta"].as_f64().or(theta).unwrap_or(10_000.0);
        let width = (2 * rotation.frequencies.len()) as f64;
        let near = |found: f64, wanted: f64| (found - wanted).abs() <= wanted * ROUNDING;
        let mut pairs = rotation.frequencies.iter().enumerate();
        near(rotation.factor, 1.0)
            && pairs.all(|(i, &found)| near(found, theta.powf(-2.0 * i as f64 / width)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const PLAIN: LayerFacts =
        LayerFacts { window: Bound::Without, soft_cap: Bound::Without, biased: Some(false) };

    fn keys(config: Value, layers: &[LayerFacts]) -> Vec<&'static str> {
        let found = Claims::new(config).attention(layers, false);
        let key = |finding: Finding| match finding {
            Finding::ConfigDiffers { key, .. } => key,
            other => other.code(),
        };
        found.into_iter().map(key).collect()
    }

    #[test]
    fn a_key_is_known_by_the_names_that_families_have_for_it() {
        let longest = |config: Value| Claims::new(config).config()["max_position_embeddings"].clone();
        assert_eq!(longest(json!({"n_positions": 1024, "n_ctx": 1024})), 1024);
        assert_eq!(longest(json!({"text_config": {"n_ctx": 512}})), 512);
        assert_eq!(longest(json!({"max_position_embeddings": 2048, "n_ctx": 1024})), 2048);
        assert_eq!(longest(json!({"seq_length": "long"})), Value::Null);
    }

    #[test]
    fn what_a_configuration_asks_for_and_a_graph_has_not_is_named() {
        let windowed = LayerFacts { window: Bound::Of(8), ..PLAIN };
        let capped = LayerFacts { soft_cap: Bound::Of(50.0), ..PLAIN };
        let unknown = LayerFacts::default();
        let types = ["sliding_attention", "full_attention"];
        let cases = [
            (json!({"sliding_window": 8}), vec![PLAIN], vec!["sliding_window"]),
            (json!({"sliding_window": 8}), vec![windowed], vec![]),
            (json!({"sliding_window": 9}), vec![windowed], vec!["sliding_window"]),
            (json!({"sliding_window": 8}), vec![unknown, PLAIN], vec![]),
            (json!({"sliding_window": 8}), vec![], vec![]),
            (json!({"sliding_window": null}), vec![PLAIN], vec![]),
            (json!({"sliding_window": 64, "max_position_embeddings": 64}), vec![PLAIN], vec![]),
            (json!({"sliding_window": 8, "use_sliding_window": false}), vec![PLAIN], vec![]),
            (json!({"text_config": {"sliding_window": 8}}), vec![PLAIN], vec!["sliding_window"]),
            (json!({"sliding_window": 8, "layer_types": types}), vec![windowed, PLAIN], vec![]),
            (
                json!({"sliding_window": 8, "layer_types": types}),
                vec![windowed, windowed],
                vec!["layer_types"],
            ),
            (json!({"sliding_window": 8, "layer_types": ["full_attention"]}), vec![PLAIN], vec![]),
            (json!({"attn_logit_softcapping": 50.0}), vec![PLAIN], vec!["attn_logit_softcapping"]),
            (json!({"attn_logit_softcapping": 50.0}), vec![capped], vec![]),
            (json!({"attn_logit_softcapping": 30.0}), vec![capped], vec!["attn_logit_softcapping"]),
            (json!({"attn_logit_softcapping": 50.0}), vec![unknown], vec![]),
            (json!({"alibi": true}), vec![PLAIN], vec!["alibi"]),
            (json!({"alibi": true}), vec![unknown], vec![]),
            (json!({"alibi": false}), vec![PLAIN], vec![]),
            (json!({"clip_qkv": 8.0}), vec![PLAIN], vec!["clip_qkv"]),
        ];
        for (config, layers, wanted) in cases {
            assert_eq!(keys(config.clone(), &layers), wanted, "{config}");
        }
        assert!(Claims::new(json!({"clip_qkv": 8.0})).attention(&[PLAIN], true).is_empty());
    }

    #[test]
    fn a_scaling_that_the_angles_do_not_show_is_named() {
        let plain = |theta: f64| Rotation {
            frequencies: (0..8).map(|i| theta.powf(-f64::from(i) / 8.0)).collect(),
            factor: 1.0,
        };
        let scaled = Rotation {
            frequencies: plain(10_000.0).frequencies.iter().map(|f| f / 4.0).collect(),
            factor: 1.0,
        };
        let yarn = Rotation { factor: 1.14, ..plain(10_000.0) };
        let config = |kind: &str| json!({"rope_scaling": {"rope_type": kind}, "max_position_embeddings": 64});
        let differs =
            |config: Value, rotations: &[Rotation]| Claims::new(config).rotation(rotations, false).is_some();
        for kind in ["linear", "llama3", "yarn"] {
            assert!(differs(config(kind), &[plain(10_000.0)]), "{kind}");
            assert!(!differs(config(kind), std::slice::from_ref(&scaled)), "{kind}");
            assert!(!differs(config(kind), &[]), "{kind}");
        }
        assert!(!differs(config("yarn"), &[yarn]));
        assert!(!differs(config("default"), &[plain(10_000.0)]));
        assert!(!differs(json!({}), &[plain(10_000.0)]));
        let theta = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear"}});
        assert!(differs(theta, &[plain(5e5)]));
        let long = json!({
            "rope_scaling": {"type": "longrope"},
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 32,
        });
        let claims = Claims::new(long);
        assert_eq!(claims.longrope_limit(), Some(32));
        assert!(claims.rotation(&[plain(10_000.0)], false).is_some());
        assert!(claims.rotation(&[plain(10_000.0)], true).is_none());
        assert!(claims.rotation(&[plain(10_000.0), scaled], false).is_none());
    }
}
