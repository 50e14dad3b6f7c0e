//! What a model is, a causal language model or a token classifier, and which of its classes is asked for.

use std::collections::BTreeMap;

use anyhow::{Context as _, anyhow, bail};
use serde_json::Value;
use sluice_schemas::onnx::{GraphProto, type_proto};

use super::graft::{GraftReport, LOGITS};
use super::model_config::key;
use crate::batch::TokenClass;

/// What the name of a token classifier's architecture ends with, in `config.json`.
const CLASSIFIER: &str = "ForTokenClassification";
/// The same of a model that classifies whole texts.
const TEXT_CLASSIFIER: &str = "ForSequenceClassification";
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

/// What of `config.json` tells a classifier from a language model. A language model needs none of it, so what has another shape
/// counts as absent, and is an error of a classifier alone.
#[derive(Debug)]
pub(super) struct KindConfig {
    architectures: anyhow::Result<Option<Vec<String>>>,
    id2label: anyhow::Result<Option<BTreeMap<String, String>>>,
}

impl KindConfig {
    pub(super) fn new(config: &Value) -> Self {
        Self { architectures: key(config, "architectures"), id2label: key(config, "id2label") }
    }

    fn architectures(&self) -> &[String] {
        self.architectures.as_ref().ok().and_then(Option::as_deref).unwrap_or_default()
    }

    /// Whether the model is a token classifier: as its architecture says, else as the shape of its logits does, `[batch,
    /// length]` or one logit for each label. Of the first, [`KindConfig::kind`] asks more.
    pub(super) fn is_classifier(&self, logits: &LogitsShape) -> bool {
        if let names @ [_, ..] = self.architectures() {
            return names.iter().any(|name| name.ends_with(CLASSIFIER));
        }
        let labels = self.id2label.as_ref().ok().and_then(Option::as_ref).map(BTreeMap::len);
        match logits.0.as_slice() {
            [_, _] => true,
            [_, _, Some(logits)] => labels.is_some_and(|labels| labels as i64 == *logits),
            _ => false,
        }
    }

    /// Refuses a model of whole texts that says so, before anything else of its graph is found not to fit.
    pub(super) fn refuse_text_classifier(&self, logits: &LogitsShape) -> anyhow::Result<()> {
        let is_of_texts = self.architectures().iter().any(|name| name.ends_with(TEXT_CLASSIFIER));
        if is_of_texts && logits.is_flat() {
            let classes = logits.0.last().copied().flatten();
            return Err(of_whole_texts(&classes.map_or_else(|| "classes".to_owned(), |n| n.to_string())));
        }
        Ok(())
    }

    /// The kind of a model whose logits had this shape, and in whose graph `report` was found.
    pub(super) fn kind(self, logits: &LogitsShape, report: &GraftReport) -> anyhow::Result<ModelKind> {
        const UNREAD: &str = "config.json of a token classifier cannot be read; correct or remove the key";
        let is_classifier = self.is_classifier(logits);
        if !is_classifier {
            return Ok(ModelKind::CausalLm);
        }
        if logits.is_flat() {
            logits.check_flat(report)?;
        }
        let Some(classes) = report.vocabulary.filter(|&classes| classes > 0) else {
            bail!(
                "the model is a token classifier, and its graph does not say how many classes it has: the last dimension of \
                 `logits` is no number, and the weight of its head, {}, cannot be found; export it with logits of [batch, \
                 length, classes], where classes is a number",
                report.head
            );
        };
        self.architectures.context(UNREAD)?;
        Ok(ModelKind::TokenClassifier { labels: labels(self.id2label.context(UNREAD)?.as_ref(), classes)? })
    }
}

/// Names of so many classes; those that `id2label` has no name for are called as transformers calls them.
fn labels(id2label: Option<&BTreeMap<String, String>>, classes: u32) -> anyhow::Result<Vec<String>> {
    if let Some(labels) = id2label
        && labels.len() != classes as usize
    {
        bail!(
            "config.json names {} classes (id2label), and the graph has {classes}: they are not of one model",
            labels.len()
        );
    }
    let name = |index: u32| {
        let named = id2label.and_then(|labels| labels.get(&index.to_string()));
        named.cloned().unwrap_or_else(|| format!("LABEL_{index}"))
    };
    Ok((0..classes).map(name).collect())
}

/// Sizes of the logits' dimensions, where they are numbers; empty where the graph does not say how many there are.
#[derive(Debug, Default)]
pub(super) struct LogitsShape(Vec<Option<i64>>);

impl LogitsShape {
    pub(super) fn of(graph: &GraphProto) -> Self {
        Self(logits_shape(graph).unwrap_or_default())
    }

    fn is_flat(&self) -> bool {
        self.0.len() == 2
    }

    /// Of logits of two dimensions: that the second is the length of a row. A sequence classifier has its classes there.
    fn check_flat(&self, report: &GraftReport) -> anyhow::Result<()> {
        let last = self.0.last().copied().flatten();
        match (report.columns, last) {
            (Some(1), last) if last != Some(1) => Ok(()),
            (None, _) => bail!(
                "the logits have two dimensions, and whether they are [batch, length] cannot be told, for the weight of the \
                 model's head, {}, cannot be found; export it with logits of [batch, length, 1]",
                report.head
            ),
            (Some(columns), _) => Err(of_whole_texts(&columns.to_string())),
        }
    }
}

fn of_whole_texts(classes: &str) -> anyhow::Error {
    anyhow!(
        "the logits are [batch, {classes}], which is one answer for a whole text, as a sequence classifier gives it; Sluice needs \
         one for each token: export a token classifier, with logits of [batch, length, classes], or a causal language model"
    )
}

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
    /// How many classes a loss can be asked for: of a single logit no (1) beside yes (0); of a language model none.
    pub fn class_targets(&self) -> u32 {
        match self {
            Self::CausalLm => 0,
            Self::TokenClassifier { labels } => (labels.len() as u32).max(2),
        }
    }

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

    use serde_json::json;
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

    fn shape(dims: &[Dim<'_>]) -> LogitsShape {
        LogitsShape::of(&GraphProto {
            output: vec![tensor_info(LOGITS, DataType::Float, dims)],
            ..GraphProto::default()
        })
    }

    const BATCH: Dim<'static> = Dim::Named("batch");
    const LENGTH: Dim<'static> = Dim::Named("length");

    /// What the graft says of a head of so many columns, of which the graph declares `vocabulary` logits.
    fn report(columns: Option<u32>, vocabulary: Option<u32>) -> GraftReport {
        GraftReport {
            opset: 17,
            head: "last (MatMul)".to_owned(),
            after_head: vec![],
            soft_cap: None,
            vocabulary,
            columns,
            settled_inputs: vec![],
        }
    }

    #[test]
    fn a_classifier_is_told_by_its_architecture_else_by_its_logits() {
        let three = shape(&[BATCH, LENGTH, Dim::Fixed(3)]);
        let flat = shape(&[BATCH, LENGTH]);
        let is = |config: Value, shape: &LogitsShape| KindConfig::new(&config).is_classifier(shape);
        let labels = json!({"0": "O", "1": "a", "2": "b"});
        assert!(is(json!({"architectures": ["BertForTokenClassification"]}), &three));
        assert!(!is(json!({"architectures": ["LlamaForCausalLM"], "id2label": labels}), &three));
        assert!(is(json!({"id2label": labels}), &three));
        assert!(!is(json!({"architectures": []}), &three));
        assert!(is(json!({"architectures": null}), &flat));

        let found = |config: Value, classes| {
            KindConfig::new(&config).kind(&three, &report(Some(classes), Some(classes)))
        };
        let named = json!({"architectures": ["BertForTokenClassification"], "id2label": labels});
        assert_eq!(found(named.clone(), 3).unwrap(), classifier(&["O", "a", "b"]));
        assert!(found(named, 2).unwrap_err().to_string().contains("names 3 classes"));
        let unnamed = json!({"architectures": ["BertForTokenClassification"]});
        assert_eq!(found(unnamed, 2).unwrap(), classifier(&["LABEL_0", "LABEL_1"]));
    }

    #[test]
    fn keys_of_another_shape_are_absent_unless_the_model_is_a_classifier() {
        let three = shape(&[BATCH, LENGTH, Dim::Fixed(3)]);
        let flat = shape(&[BATCH, LENGTH]);
        let (of_three, single) = (report(Some(3), Some(3)), report(Some(1), Some(1)));
        for config in [
            json!({"id2label": ["O", "a", "b"]}),
            json!({"id2label": {"0": 1, "1": 2, "2": 3}}),
            json!({"architectures": "LlamaForCausalLM"}),
            json!({"architectures": ["LlamaForCausalLM"], "id2label": 3}),
        ] {
            assert_eq!(KindConfig::new(&config).kind(&three, &of_three).unwrap(), ModelKind::CausalLm);
        }
        for (config, shape, report, name) in [
            (json!({"id2label": ["toxic"]}), &flat, &single, "`id2label`"),
            (json!({"architectures": "BertForTokenClassification"}), &flat, &single, "`architectures`"),
            (
                json!({"architectures": ["BertForTokenClassification"], "id2label": [1, 2, 3]}),
                &three,
                &of_three,
                "`id2label`",
            ),
        ] {
            let error = format!("{:#}", KindConfig::new(&config).kind(shape, report).unwrap_err());
            assert!(error.contains(name) && error.contains("config.json"), "{error}");
        }
    }

    #[test]
    fn logits_of_two_dimensions_are_of_tokens_only_with_a_head_of_one_column() {
        let kind = |config: &Value, shape: &LogitsShape, report: &GraftReport| {
            KindConfig::new(config).kind(shape, report)
        };
        let flat = shape(&[BATCH, LENGTH]);
        let nothing = json!({});
        assert_eq!(kind(&nothing, &flat, &report(Some(1), Some(1))).unwrap(), classifier(&["LABEL_0"]));
        let (two, one) = (shape(&[BATCH, Dim::Fixed(2)]), shape(&[BATCH, Dim::Fixed(1)]));
        let refused = |error: anyhow::Error, classes: &str| {
            let error = error.to_string();
            assert!(error.contains(&format!("[batch, {classes}]")), "{error}");
            assert!(error.contains("a whole text") && error.contains("[batch, length, classes]"), "{error}");
        };
        for (shape, columns) in [(&two, 2), (&flat, 2), (&one, 1)] {
            let error = kind(&nothing, shape, &report(Some(columns), Some(columns))).unwrap_err();
            refused(error, &columns.to_string());
        }
        let of_texts = KindConfig::new(&json!({"architectures": ["BertForSequenceClassification"]}));
        for (shape, classes) in [(&two, "2"), (&one, "1"), (&flat, "classes")] {
            refused(of_texts.refuse_text_classifier(shape).unwrap_err(), classes);
        }
        // Of logits for each token the graph is believed.
        let three = shape(&[BATCH, LENGTH, Dim::Fixed(3)]);
        of_texts.refuse_text_classifier(&three).unwrap();
        // A weight that cannot be found: nobody is told to export what they have.
        let error = kind(&nothing, &flat, &report(None, None)).unwrap_err().to_string();
        assert!(
            error.contains("last (MatMul)") && error.contains("with logits of [batch, length, 1]"),
            "{error}"
        );
        let named = json!({"architectures": ["BertForTokenClassification"]});
        let open = shape(&[BATCH, LENGTH, Dim::Named("classes")]);
        let error = kind(&named, &open, &report(None, None)).unwrap_err().to_string();
        assert!(error.contains("classes is a number") && !error.contains("[batch, length]"), "{error}");
        // A language model may have its logits in two dimensions.
        let causal = json!({"architectures": ["LlamaForCausalLM"]});
        assert_eq!(kind(&causal, &flat, &report(Some(512), Some(512))).unwrap(), ModelKind::CausalLm);
    }
}
