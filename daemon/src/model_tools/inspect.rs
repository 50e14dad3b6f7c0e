//! `sluiced model inspect`: what was found in a model folder, and what is done to it.

use std::path::PathBuf;

use anyhow::anyhow;
use serde_json::{Value, json};
use sluice_text::output::print_line;

use crate::device::Device;
use crate::exit::{ExitCode as _, NO_INPUT, USAGE};
use crate::reference::onnxruntime_library;
use crate::score::Scorer;
use crate::score::kind::ModelKind;
use crate::score::model::Model;
use crate::score::placement::Kind;
use crate::score::runtime::SessionOptions;

/// What `sluiced model inspect` was asked for.
#[derive(Clone, Debug)]
pub struct Inspect {
    /// Folder of the model.
    pub folder: PathBuf,
    /// Path of ONNX Runtime's library; empty for the environment's, as `model.onnxruntime`.
    pub library: PathBuf,
    /// The device to run it on; without one it is looked at as for the CPU, and not run.
    pub device: Option<String>,
    /// The class of a token classifier, as `model.class`.
    pub class: Option<String>,
    /// Whether JSON is printed.
    pub json: bool,
}

/// Prints what was found in a model and what was done to it; with a device, what of it runs where.
pub fn inspect(asked: &Inspect) -> anyhow::Result<()> {
    let device = asked.device.as_deref().unwrap_or("cpu");
    let device = device.parse::<Device>().map_err(|error| anyhow!(error)).exit_code(USAGE)?;
    let library = onnxruntime_library(&asked.library);
    let mut model = Model::load(&asked.folder, device, false).exit_code(NO_INPUT)?;
    match &asked.class {
        Some(class) => model.choose_class(class, false)?,
        // Where none is meant, the classes are still listed.
        None => drop(model.choose_class("", false)),
    }
    let fused = model.fuse_attention(&library);
    let mut description = describe(&model);
    if asked.device.is_some() {
        fused.exit_code(NO_INPUT)?;
        description.push(("placement", placement(&model, device, library, asked.json)?));
    } else if let Err(error) = fused {
        // The rest can be said without ONNX Runtime.
        tracing::warn!("attention was not looked at: {error:#}");
    }
    let page = if asked.json {
        let fields: serde_json::Map<_, _> =
            description.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        serde_json::to_string_pretty(&fields)?
    } else {
        description.iter().flat_map(|(key, value)| lines(key, value)).collect::<Vec<_>>().join("\n")
    };
    // Whoever has closed the pipe has seen enough.
    print_line(&page)?;
    Ok(())
}

/// Runs a short row on `device`, and lists what ran where.
fn placement(model: &Model, device: Device, library: PathBuf, as_json: bool) -> anyhow::Result<Value> {
    let options = SessionOptions { library, device, threads: 0, device_memory_bytes: 0 };
    let placement = Scorer::new(model, &options, false).exit_code(NO_INPUT)?.placement()?;
    if let Err(misplaced) = placement.check(device) {
        tracing::warn!("{misplaced}");
    }
    let rows = placement.rows().map(|(kind, nodes, _)| {
        let Kind { provider, operator, element } = kind;
        if as_json {
            json!({"provider": provider, "operator": operator, "element": element, "nodes": nodes})
        } else {
            json!(format!("{provider}: {operator} of {element} x {nodes}"))
        }
    });
    Ok(rows.collect())
}

/// What a model's attention is, in a line for each operator.
fn attention(model: &Model) -> Value {
    let Some(report) = &model.attention else { return Value::Null };
    let exported =
        report.exported.iter().map(|(operator, count)| format!("{operator} x {count}, as exported"));
    let fused =
        report.fused.iter().map(|(operator, count)| format!("{operator} x {count}, fused as it was loaded"));
    let left =
        report.left.iter().map(|left| format!("spelled out x {}, see the findings", left.layers.len()));
    exported.chain(fused).chain(left).collect()
}

/// What is found under a key, a line for each value, of which the first names the key.
fn lines(key: &str, value: &Value) -> Vec<String> {
    let values = match value {
        Value::Array(values) if values.is_empty() => vec!["none".to_owned()],
        Value::Array(values) => values.iter().map(text).collect(),
        one => vec![text(one)],
    };
    let name = key.replace('_', " ");
    let names = std::iter::once(name.as_str()).chain(std::iter::repeat(""));
    names.zip(values).map(|(name, value)| format!("{name:<16}{value}")).collect()
}

/// A value as people read it; of an object, its fields in the order of their names.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "unknown".to_owned(),
        Value::String(text) => text.clone(),
        Value::Object(fields) => fields.values().map(text).collect::<Vec<_>>().join(": "),
        other => other.to_string(),
    }
}

fn describe(model: &Model) -> Vec<(&'static str, Value)> {
    let report = &model.report;
    let fed = model
        .inputs
        .iter()
        .map(|(name, element)| json!({"input": name, "is": format!("fed, {element:?}").to_lowercase()}));
    let settled = report.settled_inputs.iter().map(|(name, what)| json!({"input": name, "is": what}));
    let findings =
        model.findings.iter().map(|finding| json!({"code": finding.code(), "text": finding.to_string()}));
    let or_none = |value: Option<Value>| value.unwrap_or_else(|| json!("none"));
    vec![
        ("fingerprint", json!(fingerprint(model))),
        ("tokenizer", json!(model.identity.tokenizer.to_string())),
        ("kind", kind(model)),
        ("opset", json!(report.opset)),
        ("inputs", fed.chain(settled).collect()),
        ("head", json!(report.head)),
        ("after_the_head", json!(report.after_head)),
        ("soft_cap", or_none(report.soft_cap.map(|cap| json!(cap)))),
        ("vocabulary", json!(model.identity.vocabulary)),
        ("weights", json!(format!("{:?}", model.identity.precision).to_lowercase())),
        (
            "computes",
            json!(if model.widened { "in f32, for the CPU has no bfloat16" } else { "as exported" }),
        ),
        ("attention", attention(model)),
        ("length_limit", or_none(model.length_limit.map(|limit| json!(limit)))),
        ("external_data", json!(model.data_files)),
        ("context", json!(model.context_max)),
        ("bos_token", or_none(model.bos_token.map(|token| json!(token)))),
        ("findings", findings.collect()),
    ]
}

/// The fingerprint that records carry. Until a classifier's class is chosen there is none.
fn fingerprint(model: &Model) -> String {
    if matches!(model.kind, ModelKind::TokenClassifier { .. }) && model.class.is_none() {
        return "depends on the class; give one of the classes below as --model-class".to_owned();
    }
    model.identity.fingerprint.to_string()
}

/// What a model says of a token; of a classifier, a line for each class, the one that is asked for marked.
fn kind(model: &Model) -> Value {
    let ModelKind::TokenClassifier { labels } = &model.kind else { return json!("causal language model") };
    let chosen = model.class.as_ref().map(|class| class.index as usize);
    let class = |(index, label): (usize, &String)| {
        let mark = if chosen == Some(index) { ", whose probability is recorded" } else { "" };
        format!("class {index}: {label}{mark}")
    };
    std::iter::once("token classifier".to_owned()).chain(labels.iter().enumerate().map(class)).collect()
}
