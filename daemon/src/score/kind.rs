//! What a model is, a causal language model or a token classifier, and which of its classes is asked for.

use std::collections::BTreeMap;

use anyhow::bail;
use sluice_schemas::onnx::{GraphProto, type_proto};

use super::graft::LOGITS;
use crate::batch::TokenClass;

/// What the name of a token classifier's architecture ends with, in `config.json`.
const CLASSIFIER: &str = "ForTokenClassification";
/// What a label that only says that nothing was found is called: by the IOB scheme (Ramshaw and Marcus, arXiv
/// cmp-lg/9505040), and in sentiment and yes-or-no tasks.
const NOTHING_FOUND: [&str; 5] = ["o", "negative", "false", "no", "none"];

/// What a model says of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelKind {
    /// The probability of the next one.
    CausalLm,
    /// Its class.
    TokenClassifier {
        /// Names of the classes, by index. A single one is yes or no: its probability is the sigmoid of its logit.
        labels: Vec<String>,
    },
}

/// What of `config.json` tells a classifier from a language model.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(super) struct KindConfig {
    architectures: Option<Vec<String>>,
    id2label: Option<BTreeMap<String, String>>,
}

impl KindConfig {
    /// Whether the model is a token classifier: as its architecture says, else as the shape of its logits does, `[batch,
    /// length]` or one logit for each label.
    pub(super) fn is_classifier(&self, graph: &GraphProto) -> bool {
        if let Some(names @ [_, ..]) = self.architectures.as_deref() {
            return names.iter().any(|name| name.ends_with(CLASSIFIER));
        }
        let Some(shape) = logits_shape(graph) else { return false };
        let is_labelled =
            |logits: i64| self.id2label.as_ref().is_some_and(|labels| labels.len() as i64 == logits);
        match shape.as_slice() {
            [_, _] => true,
            [_, _, Some(logits)] => is_labelled(*logits),
            _ => false,
        }
    }

    /// Names of so many classes; those that `id2label` has no name for are called as transformers calls them.
    pub(super) fn labels(&self, classes: u32) -> anyhow::Result<Vec<String>> {
        if let Some(labels) = &self.id2label
            && labels.len() != classes as usize
        {
            bail!(
                "config.json names {} classes (id2label), and the graph has {classes}: they are not of one model",
                labels.len()
            );
        }
        let name = |index: u32| {
            let named = self.id2label.as_ref().and_then(|labels| labels.get(&index.to_string()));
            named.cloned().unwrap_or_else(|| format!("LABEL_{index}"))
        };
        Ok((0..classes).map(name).collect())
    }
}

/// Sizes of the logits' dimensions; nothing where the graph does not say how many there are.
fn logits_shape(graph: &GraphProto) -> Option<Vec<Option<i64>>> {
    use sluice_schemas::onnx::tensor_shape_proto::dimension::Value::{DimParam, DimValue};
    let logits = graph.output.iter().find(|output| output.name() == LOGITS)?;
    let Some(type_proto::Value::TensorType(tensor)) = logits.r#type.as_ref()?.value.as_ref() else {
        return None;
    };
    let size = |value: &Option<_>| match value {
        Some(DimValue(size)) => Some(*size),
        Some(DimParam(_)) | None => None,
    };
    Some(tensor.shape.as_ref()?.dim.iter().map(|dim| size(&dim.value)).collect())
}

impl ModelKind {
    /// The class that `asked` (`model.class`) stands for, by its name or its index; nothing for a language model. Which side
    /// the model sees is not known yet. An error lists what there is to choose from.
    pub fn class(&self, asked: &str) -> anyhow::Result<Option<TokenClass>> {
        let Self::TokenClassifier { labels } = self else {
            if !asked.is_empty() {
                bail!(
                    "model.class is `{asked}`, and the model is a causal language model, which has no classes: leave it out, or \
                     serve a token classifier (\"architectures\" in its config.json ends with {CLASSIFIER})"
                );
            }
            return Ok(None);
        };
        let choices = || {
            let listed = labels.iter().enumerate().map(|(index, label)| format!("{label} ({index})"));
            listed.collect::<Vec<_>>().join(", ")
        };
        let index = if asked.is_empty() {
            match positive(labels) {
                Some(index) => index,
                None => bail!(
                    "the model is a token classifier of {} classes; set model.class (--model-class) to the name or index of \
                     the one whose probability is wanted: {}",
                    labels.len(),
                    choices()
                ),
            }
        } else {
            // A name comes first: a label may be a number.
            let by_name: Vec<usize> =
                labels.iter().enumerate().filter(|(_, label)| *label == asked).map(|(at, _)| at).collect();
            let by_index = asked.parse().ok().filter(|&index: &usize| index < labels.len());
            match (by_name.as_slice(), by_index) {
                (&[index], _) | ([], Some(index)) => index,
                ([_, _, ..], _) => bail!(
                    "model.class is `{asked}`, which several classes are called; give an index: {}",
                    choices()
                ),
                ([], None) => bail!(
                    "model.class is `{asked}`, which no class of the model is; give the name or index of one of: {}",
                    choices()
                ),
            }
        };
        Ok(Some(TokenClass { index: index as u32, name: labels[index].clone(), both_sides: true }))
    }
}

/// The class that is meant where none is named: the only one, or of two the one beside a label that says that nothing was found.
fn positive(labels: &[String]) -> Option<usize> {
    let is_nothing = |label: &str| NOTHING_FOUND.contains(&label.to_lowercase().as_str());
    match labels {
        [_] => Some(0),
        [one, other] => match (is_nothing(one), is_nothing(other)) {
            (true, false) => Some(1),
            (false, true) => Some(0),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use sluice_schemas::graph::{Dim, tensor_info};
    use sluice_schemas::onnx::tensor_proto::DataType;

    use super::*;

    fn classifier(labels: &[&str]) -> ModelKind {
        ModelKind::TokenClassifier { labels: labels.iter().map(|&label| label.to_owned()).collect() }
    }

    #[test]
    fn a_class_is_chosen_by_name_or_index_and_the_choices_are_listed() {
        let three = classifier(&["O", "toxic", "7"]);
        let index = |kind: &ModelKind, asked: &str| kind.class(asked).unwrap().unwrap().index;
        assert_eq!([index(&three, "toxic"), index(&three, "1"), index(&three, "7")], [1, 1, 2]);
        for asked in ["", "Toxic", "3", "-1"] {
            let error = three.class(asked).unwrap_err().to_string();
            assert!(error.contains("O (0), toxic (1), 7 (2)"), "{error}");
        }
        for (labels, wanted) in [
            (&["toxic"][..], Some(0)),
            (&["O", "toxic"], Some(1)),
            (&["POSITIVE", "NEGATIVE"], Some(0)),
            (&["LABEL_0", "LABEL_1"], None),
            (&["O", "NEGATIVE"], None),
        ] {
            let chosen = classifier(labels).class("").map(|class| class.unwrap().index as usize).ok();
            assert_eq!(chosen, wanted, "{labels:?}");
        }
        let error = classifier(&["a", "a"]).class("a").unwrap_err().to_string();
        assert!(error.contains("several") && error.contains("a (0), a (1)"), "{error}");
        assert_eq!(ModelKind::CausalLm.class("").unwrap(), None);
        assert!(ModelKind::CausalLm.class("toxic").unwrap_err().to_string().contains("no classes"));
    }

    #[test]
    fn a_classifier_is_told_by_its_architecture_else_by_its_logits() {
        let graph = |dims: &[Dim<'_>]| GraphProto {
            output: vec![tensor_info(LOGITS, DataType::Float, dims)],
            ..GraphProto::default()
        };
        let [batch, length] = ["batch", "length"].map(Dim::Named);
        let three = graph(&[batch, length, Dim::Fixed(3)]);
        let flat = graph(&[batch, length]);
        let is = |config: serde_json::Value, graph: &GraphProto| {
            serde_json::from_value::<KindConfig>(config).unwrap().is_classifier(graph)
        };
        let labels = serde_json::json!({"0": "O", "1": "a", "2": "b"});
        assert!(is(serde_json::json!({"architectures": ["BertForTokenClassification"]}), &three));
        assert!(!is(serde_json::json!({"architectures": ["LlamaForCausalLM"], "id2label": labels}), &three));
        assert!(is(serde_json::json!({"id2label": labels}), &three));
        assert!(!is(serde_json::json!({"architectures": []}), &three));
        assert!(is(serde_json::json!({"architectures": null}), &flat));
        let two = serde_json::from_value::<KindConfig>(serde_json::json!({"id2label": labels})).unwrap();
        assert_eq!(two.labels(3).unwrap(), ["O", "a", "b"]);
        assert!(two.labels(2).unwrap_err().to_string().contains("names 3 classes"));
        assert_eq!(KindConfig::default().labels(2).unwrap(), ["LABEL_0", "LABEL_1"]);
    }
}
