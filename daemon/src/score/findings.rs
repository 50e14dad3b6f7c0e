//! What about a model makes its losses other than those of the model it was exported from.

use std::fmt;
use std::path::Path;

use anyhow::Context as _;
use half::{bf16, f16};
use sluice_schemas::onnx::tensor_proto::DataLocation;
use sluice_schemas::onnx::{GraphProto, TensorProto};

use super::attention::Left;
use super::constant::{constant_tensor, floats, inlined};

/// Something a user should know before trusting a model's losses. It stops nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    /// The rotary frequencies were rounded to 16 bits by the export, so that angles are wrong where positions are
    /// large: seen to cost 0.7 nats at 2,048 tokens.
    RotaryTableRounded {
        /// Name of the tensor.
        tensor: String,
        /// The format it was rounded to.
        format: &'static str,
    },
    /// `config.json` asks for a soft cap on the logits, and the graph has none.
    SoftCapMissing {
        /// The bound that `config.json` asks for.
        wanted: f32,
    },
    /// The graph caps the logits at another bound than `config.json` says.
    SoftCapDiffers {
        /// The bound in the graph.
        found: f32,
        /// The bound that `config.json` asks for.
        wanted: f32,
    },
    /// Attention of some layers is not what one operator computes, so that it runs without a fused kernel: right, and slow
    /// where sequences are long.
    AttentionSpelledOut(Left),
    /// The graph's attention or rotation is not what `config.json` says, so that it is another model.
    ConfigDiffers {
        /// The key of `config.json`.
        key: &'static str,
        /// What it says.
        says: String,
        /// What the graph does.
        graph: String,
    },
}

impl Finding {
    /// A short stable name, for logs and scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::RotaryTableRounded { .. } => "rotary_table_rounded",
            Self::SoftCapMissing { .. } => "soft_cap_missing",
            Self::SoftCapDiffers { .. } => "soft_cap_differs",
            Self::AttentionSpelledOut(_) => "attention_spelled_out",
            Self::ConfigDiffers { .. } => "config_differs",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RotaryTableRounded { tensor, format } => write!(
                f,
                "the rotary frequencies `{tensor}` were rounded to {format}, so losses of long windows are wrong; \
                 export the model in float32 and convert it afterwards, or keep `inv_freq` in float32"
            ),
            Self::SoftCapMissing { wanted } => write!(
                f,
                "config.json says final_logit_softcapping {wanted}, and the graph does not cap its logits; export \
                 it with the cap"
            ),
            Self::SoftCapDiffers { found, wanted } => write!(
                f,
                "the graph caps its logits at {found}, and config.json says final_logit_softcapping {wanted}"
            ),
            Self::AttentionSpelledOut(Left { layers, node, why }) => write!(
                f,
                "the attention of {} stays spelled out: node `{node}`, {why}; its losses are right, and it is slow; for \
                 a fused operator export the model with `python -m onnxruntime_genai.models.builder -i MODEL -o OUT -p fp16 -e \
                 cuda` (on the CPU `-p fp32 -e cpu`)",
                spans(layers)
            ),
            Self::ConfigDiffers { key, says, graph } => write!(
                f,
                "config.json says {key} {says}, and the graph {graph}, so its losses are those of another model; export it \
                 with an exporter that knows {key}, or mend config.json where that is wrong"
            ),
        }
    }
}

/// Layers as people write them: `layers 0 to 3 and 5`.
fn spans(layers: &[usize]) -> String {
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for &layer in layers {
        match spans.last_mut() {
            Some((_, last)) if *last + 1 == layer => *last = layer,
            _ => spans.push((layer, layer)),
        }
    }
    let spans: Vec<String> = spans
        .into_iter()
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first} to {last}") })
        .collect();
    let noun = if layers.len() == 1 { "layer" } else { "layers" };
    match spans.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{noun} {} and {last}", rest.join(", ")),
        _ => format!("{noun} {}", spans.join("")),
    }
}

/// What `config.json`'s soft cap and the graph's say of each other.
pub(super) fn soft_cap(found: Option<f32>, wanted: Option<f32>) -> Option<Finding> {
    match (found, wanted) {
        (None, Some(wanted)) => Some(Finding::SoftCapMissing { wanted }),
        // The graph's constant may be in half precision.
        (Some(found), Some(wanted)) if (found - wanted).abs() > wanted * 1e-3 => {
            Some(Finding::SoftCapDiffers { found, wanted })
        }
        _ => None,
    }
}

/// The tables of rotary frequencies in `graph` that were rounded to 16 bits. Those in external data are read from
/// `data_folder`, which the graph's locations are relative to.
pub(super) fn rounded_rotary_tables(
    graph: &GraphProto,
    data_folder: Option<&Path>,
) -> anyhow::Result<Vec<Finding>> {
    let named = graph.initializer.iter().map(|tensor| (tensor.name(), tensor));
    let constants = graph.node.iter().filter_map(|node| Some((node.name(), constant_tensor(node)?)));
    let mut found = Vec::new();
    for (name, tensor) in named.chain(constants).filter(|(_, tensor)| may_be_frequencies(tensor)) {
        let values = match data_folder {
            Some(folder) if tensor.data_location() == DataLocation::External => floats(
                &inlined(tensor, folder)
                    .with_context(|| format!("cannot read `{name}` from the model's external data"))?,
            ),
            _ => floats(tensor),
        };
        if let Some(format) = values.filter(|values| are_frequencies(values)).and_then(|v| rounded_to(&v)) {
            found.push(Finding::RotaryTableRounded { tensor: name.to_owned(), format });
        }
    }
    Ok(found)
}

/// Whether a tensor has the size of half a head's width: one row.
pub(super) fn may_be_frequencies(tensor: &TensorProto) -> bool {
    const SIZES: std::ops::RangeInclusive<i64> = 4..=512;
    let size: i64 = tensor.dims.iter().product();
    tensor.dims.iter().filter(|&&dim| dim > 1).count() == 1 && SIZES.contains(&size)
}

/// Whether values look like `theta ^ (-2 i / width)`: from 1 down, never up.
pub(super) fn are_frequencies(values: &[f32]) -> bool {
    values.first() == Some(&1.0) && values.windows(2).all(|pair| pair[0] > pair[1] && pair[1] > 0.0)
}

/// The 16-bit format that holds every one of `values` exactly. Frequencies computed in 32 bits fit none.
fn rounded_to(values: &[f32]) -> Option<&'static str> {
    let exact = |round: fn(f32) -> f32| values.iter().all(|&value| round(value).to_bits() == value.to_bits());
    // float16 holds most of what bfloat16 does in this range, so the narrower one is asked first.
    if exact(|value| bf16::from_f32(value).to_f32()) {
        Some("bfloat16")
    } else if exact(|value| f16::from_f32(value).to_f32()) {
        Some("float16")
    } else {
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use sluice_schemas::graph::raw_tensor;
    use sluice_schemas::onnx::StringStringEntryProto;
    use sluice_schemas::onnx::tensor_proto::DataType;

    use super::*;

    fn table(dims: &[i64], round: fn(f32) -> f32) -> GraphProto {
        let values =
            (0..32).map(|i| round((f64::from(10_000).powf(-f64::from(i) / 32.0)) as f32).to_le_bytes());
        let raw: Vec<u8> = values.flatten().collect();
        let tensor = TensorProto {
            name: Some("inv_freq".to_owned()),
            ..raw_tensor(DataType::Float, dims, raw.into())
        };
        GraphProto { initializer: vec![tensor], ..Default::default() }
    }

    #[test]
    fn a_rounded_table_is_named_and_a_whole_one_is_not() {
        let rounded_rotary_tables = |graph: &GraphProto| rounded_rotary_tables(graph, None).unwrap();
        assert_eq!(rounded_rotary_tables(&table(&[32], |value| value)), []);
        for dims in [&[32][..], &[1, 32, 1][..]] {
            let half = rounded_rotary_tables(&table(dims, |value| f16::from_f32(value).to_f32()));
            assert_eq!(half[0].code(), "rotary_table_rounded");
            assert!(half[0].to_string().contains("`inv_freq` were rounded to float16"));
        }
        let brain = rounded_rotary_tables(&table(&[32], |value| bf16::from_f32(value).to_f32()));
        assert!(brain[0].to_string().contains("bfloat16"));
    }

    #[test]
    fn a_table_in_external_data_is_read_from_there() {
        let folder = tempfile::tempdir().unwrap();
        let mut graph = table(&[32], |value| f16::from_f32(value).to_f32());
        let tensor = &mut graph.initializer[0];
        let raw = tensor.raw_data.take().unwrap();
        std::fs::write(folder.path().join("weights.bin"), [&[0; 8][..], &raw].concat()).unwrap();
        tensor.data_location = Some(DataLocation::External.into());
        tensor.external_data = [("location", "weights.bin"), ("offset", "8")]
            .map(|(key, value)| StringStringEntryProto {
                key: Some(key.to_owned()),
                value: Some(value.to_owned()),
            })
            .into();
        let found = rounded_rotary_tables(&graph, Some(folder.path())).unwrap();
        assert_eq!(found.iter().map(Finding::code).collect::<Vec<_>>(), ["rotary_table_rounded"]);
        std::fs::write(folder.path().join("weights.bin"), [0; 8]).unwrap();
        let error = rounded_rotary_tables(&graph, Some(folder.path())).unwrap_err();
        assert!(format!("{error:#}").contains("cannot read `inv_freq`"), "{error:#}");
    }

    #[test]
    fn a_soft_cap_must_be_the_one_of_the_configuration() {
        assert_eq!(soft_cap(Some(30.0), None), None);
        assert_eq!(soft_cap(Some(30.0), Some(30.0)), None);
        assert_eq!(soft_cap(None, Some(30.0)), Some(Finding::SoftCapMissing { wanted: 30.0 }));
        assert_eq!(soft_cap(Some(50.0), Some(30.0)).map(|finding| finding.code()), Some("soft_cap_differs"));
    }
}
