//! A model folder in the Hugging Face layout: `model.onnx`, its external data, `tokenizer.json`, `config.json`.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::onnx::tensor_proto::{DataLocation, DataType};
use sluice_schemas::onnx::{GraphProto, ModelProto, TensorProto};
use sluice_schemas::record::Precision;
use sluice_text::{TextTokenizer, json, refuse_pointer, refuse_pointer_in};

use super::attention::{self, AttentionReport, Surroundings};
use super::claims::Claims;
use super::findings::{self, Finding};
use super::graft::{GraftReport, HeadOptions, graft};
use super::identity::ModelIdentity;
use super::inputs;
use super::kind::{KindConfig, LogitsShape, ModelKind};
use super::limits::length_limits;
use super::model_config::ModelConfig;
use super::names::{ROWS_INPUT, TARGETS_INPUT};
use super::precision::precision;
use super::rotation::rotations;
use super::widen::widen;
use crate::batch::TokenClass;
use crate::device::Device;
use crate::exit::{DATA, ExitCode as _, ExitError, USAGE};

/// A reference model, read and given its loss head, ready for a session.
#[derive(Debug)]
pub struct Model {
    /// The rewritten ONNX model.
    pub onnx: ModelProto,
    /// Folder of the external data that the graph refers to, where it has any.
    pub data_folder: Option<PathBuf>,
    /// What was found in the graph and done to it.
    pub report: GraftReport,
    /// What makes its losses other than those of the model it was exported from.
    pub findings: Vec<Finding>,
    /// What became of its attention; nothing until [`Model::fuse_attention`] has looked.
    pub attention: Option<AttentionReport>,
    /// Inputs that the graph wants beside those of the loss head, with their element types.
    pub inputs: Vec<(String, DataType)>,
    /// Files of external data, as the graph names them.
    pub data_files: Vec<String>,
    /// Length beyond which the graph computes all rows of a batch in another way, where there is one: no row of a batch may be
    /// longer where another is not.
    pub length_limit: Option<usize>,
    /// What `config.json` says of attention.
    claims: Claims,
    /// The device that it was fitted to.
    pub device: Device,
    /// Whether it is a bfloat16 model that computes in float32, as it must on the CPU.
    pub widened: bool,
    /// What it says of a token.
    pub kind: ModelKind,
    /// The class that is asked for, of a token classifier; none until [`Model::choose_class`] was called.
    pub class: Option<TokenClass>,
    /// What records say of the model, and are checked against.
    pub identity: ModelIdentity,
    /// Longest sequence that the model was made for, where `config.json` says so.
    pub context_max: Option<u32>,
    /// Token that the model saw at the start of every document, where `config.json` names one.
    pub bos_token: Option<u32>,
}

impl Model {
    /// Reads the model in `folder`, grafts a loss head onto it for batches of any size, and fits it to what `device` can compute.
    pub fn load(folder: &Path, device: Device, entropies: bool) -> anyhow::Result<Self> {
        Self::load_for(folder, HeadOptions { entropies, ..HeadOptions::losses(device) })
    }

    /// The same with a loss head made for what is known of the batches.
    pub fn load_for(folder: &Path, options: HeadOptions) -> anyhow::Result<Self> {
        let device = options.device;
        if folder.is_file() {
            bail!(
                "{} is a file; `model.path` must name the folder that it lies in, {}",
                folder.display(),
                folder
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty())
                    .unwrap_or(Path::new("."))
                    .display()
            );
        }
        if !folder.is_dir() {
            bail!(
                "the model folder {} {}; `model.path` must name a folder with model.onnx, tokenizer.json and config.json",
                folder.display(),
                if folder.exists() { "is no folder" } else { "does not exist" }
            );
        }
        let path = folder.join("model.onnx");
        let bytes =
            Bytes::from(std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        refuse_pointer(&path, &bytes).exit_code(DATA)?;
        let graph_digest = Fingerprint::of_bytes(&bytes);
        let mut model = ModelProto::decode(bytes)
            .with_context(|| format!("{} is not an ONNX file, or is cut short", path.display()))
            .exit_code(DATA)?;

        let mut parts = vec![("model.onnx".to_owned(), graph_digest)];
        let data_folder = resolve_external_data(&mut model, folder, &mut parts)?;
        let config_path = folder.join("config.json");
        let claims = Claims::new(read_config(&config_path)?);
        let config = ModelConfig::new(claims.config())
            .with_context(|| config_path.display().to_string())
            .exit_code(DATA)?;
        let kind_config = KindConfig::new(claims.config());
        // Before anything in it is moved or widened.
        let arithmetic = model.graph.as_ref().map_or(Precision::F32, precision);
        let data_files = parts[1..].iter().map(|(name, _)| name.clone()).collect();
        // Before the loss head takes the logits' place.
        let logits = model.graph.as_ref().map(LogitsShape::of).unwrap_or_default();
        kind_config
            .refuse_text_classifier(&logits)
            .with_context(|| folder.display().to_string())
            .exit_code(DATA)?;
        let is_classifier = kind_config.is_classifier(&logits);
        let segments = model.graph.as_mut().filter(|_| is_classifier).and_then(inputs::settle_token_types);
        let Rewritten { mut report, mut findings, inputs, widened } =
            rewrite(&mut model, data_folder.as_deref(), options)
                .with_context(|| path.display().to_string())
                .exit_code(DATA)?;

        report.settled_inputs.extend(segments);
        findings.extend(findings::soft_cap(report.soft_cap, config.final_logit_softcapping));
        let length_limit = length_limit(&model, &claims).exit_code(DATA)?;
        if let Some(graph) = &model.graph {
            let rotations = rotations(graph, data_folder.as_deref()).exit_code(DATA)?;
            findings.extend(claims.rotation(&rotations, !length_limits(graph).is_empty()));
        }
        let kind = kind_config
            .kind(&logits, &report)
            .with_context(|| folder.display().to_string())
            .exit_code(DATA)?;
        // A classifier's logits say nothing of the vocabulary.
        let logits = report.vocabulary.filter(|_| !is_classifier);
        // Some models pad their head beyond the ids that their embedding knows; the smaller bound is safe.
        let vocabulary = match (logits, config.vocab_size) {
            (Some(head), Some(config)) => head.min(config),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => bail!(
                "neither {} nor the graph says how large the vocabulary is; add \"vocab_size\" to config.json",
                config_path.display()
            ),
        };
        if vocabulary == 0 {
            bail!("{} says that the vocabulary is empty (vocab_size 0)", config_path.display());
        }
        Ok(Self {
            onnx: model,
            data_folder,
            report,
            findings,
            attention: None,
            length_limit,
            claims,
            device,
            inputs,
            data_files,
            widened,
            kind,
            class: None,
            identity: ModelIdentity {
                fingerprint: Fingerprint::of_parts(&mut parts),
                tokenizer: TextTokenizer::read(&folder.join("tokenizer.json"))
                    .map_err(ExitError::from)?
                    .fingerprint(),
                vocabulary,
                precision: arithmetic,
            },
            context_max: config.max_position_embeddings,
            bos_token: config.bos_token(),
        })
    }
}

/// What `config.json` holds; nothing where there is none.
fn read_config(path: &Path) -> anyhow::Result<serde_json::Value> {
    if !path.exists() {
        return Ok(serde_json::json!({}));
    }
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    refuse_pointer(path, &bytes).exit_code(DATA)?;
    json::from_slice(&bytes).with_context(|| path.display().to_string()).exit_code(DATA)
}

impl Model {
    /// Chooses the class that `asked` stands for, of a token classifier, whose fingerprint covers it from here on; of a language
    /// model there is none to choose. `entropies`: whether they are asked for, which a class does not have.
    pub fn choose_class(&mut self, asked: &str, entropies: bool) -> anyhow::Result<()> {
        let class = self.kind.class(asked).exit_code(USAGE)?;
        if let Some(class) = &class {
            if entropies {
                return Err(anyhow!(
                    "score.entropies is true, and the model is a token classifier, whose records carry the probability of a \
                     class and no entropies: leave it out"
                ))
                .exit_code(USAGE);
            }
            let chosen = format!("{} {}", class.index, class.name);
            let mut parts = [
                ("model".to_owned(), self.identity.fingerprint),
                ("class".to_owned(), Fingerprint::of_bytes(chosen.as_bytes())),
            ];
            self.identity.fingerprint = Fingerprint::of_parts(&mut parts);
        }
        self.class = class;
        Ok(())
    }

    /// Lets the graph and its weights go, of which a session has a copy of its own; what else is known of the model stays.
    pub fn forget_graph(&mut self) {
        self.onnx = ModelProto::default();
    }

    /// Replaces attention that the graph spells out by one operator, layer by layer, where ONNX Runtime (from `library`)
    /// computes the same with both. What stays as it is becomes a finding. Fails where ONNX Runtime cannot be had.
    pub fn fuse_attention(&mut self, library: &Path) -> anyhow::Result<()> {
        let around = Surroundings {
            library,
            data_folder: self.data_folder.as_deref(),
            context_max: self.context_max,
            device: self.device,
            settled: &self.report.settled_inputs,
        };
        let report = attention::fuse(&mut self.onnx, around)?;
        // A mask of padding that nothing reads any more is not fed.
        self.inputs = model_inputs(&self.onnx);
        let mut nodes = self.onnx.graph.iter().flat_map(|graph| &graph.node);
        // The loss head's own `Min` bounds rows, not queries.
        let clips = nodes.any(|node| {
            matches!(node.op_type(), "Clip" | "Min" | "Max") && !node.name().starts_with("sluice/")
        });
        self.findings.extend(self.claims.attention(&report.layers, clips));
        self.findings.extend(report.left.iter().cloned().map(Finding::AttentionSpelledOut));
        self.attention = Some(report);
        Ok(())
    }
}

/// The one length at which the graph begins to compute in another way, as its nodes have it, else as `LongRoPE` has it.
fn length_limit(model: &ModelProto, claims: &Claims) -> anyhow::Result<Option<usize>> {
    let limits = model.graph.as_ref().map(length_limits).unwrap_or_default();
    let limits: Vec<i64> = if limits.is_empty() {
        claims.longrope_limit().into_iter().collect()
    } else {
        limits.into_iter().collect()
    };
    match limits.as_slice() {
        [] => Ok(None),
        [limit] => Ok(usize::try_from(*limit).ok()),
        several => bail!(
            "the graph changes what it computes at several lengths ({several:?}), so a document's losses would depend on its \
             batch; export the model for one range of lengths"
        ),
    }
}

/// What was found in a graph, and done to it.
#[derive(Debug)]
pub struct Rewritten {
    /// As [`Model::report`].
    pub report: GraftReport,
    /// As [`Model::findings`], as far as the graph shows them.
    pub findings: Vec<Finding>,
    /// As [`Model::inputs`].
    pub inputs: Vec<(String, DataType)>,
    /// As [`Model::widened`].
    pub widened: bool,
}

/// Grafts the loss head onto a graph whose external data lie in `data_folder`, and fits it to what the device can compute.
pub fn rewrite(
    model: &mut ModelProto,
    data_folder: Option<&Path>,
    options: HeadOptions,
) -> anyhow::Result<Rewritten> {
    let findings = match &model.graph {
        Some(graph) => findings::rounded_rotary_tables(graph, data_folder)?,
        None => Vec::new(),
    };
    let report = graft(model, options)?;
    let inputs = model_inputs(model);
    let widened = options.device == Device::Cpu && widen(model, DataType::Bfloat16);
    Ok(Rewritten { report, findings, inputs, widened })
}

fn model_inputs(model: &ModelProto) -> Vec<(String, DataType)> {
    let Some(graph) = model.graph.as_ref() else { return Vec::new() };
    inputs::wanted(graph)
        .filter(|input| !matches!(input.name(), ROWS_INPUT | TARGETS_INPUT))
        .map(|input| (input.name().to_owned(), inputs::element(input)))
        .collect()
}

/// Points every external tensor at the real file behind any link, and adds each file to the fingerprint's parts. The
/// folder that all of them lie in, at some depth, is what locations are relative to from here on.
///
/// ONNX Runtime refuses data files that are symbolic links, which is what a hub's cache folder is made of.
fn resolve_external_data(
    model: &mut ModelProto,
    folder: &Path,
    parts: &mut Vec<(String, Fingerprint)>,
) -> anyhow::Result<Option<PathBuf>> {
    let mut tensors = Vec::new();
    if let Some(graph) = model.graph.as_mut() {
        collect_external(graph, &mut tensors);
    }
    let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut locations = Vec::new();
    for tensor in tensors {
        let name = tensor.name().to_owned();
        let Some(entry) = tensor.external_data.iter_mut().find(|entry| entry.key() == "location") else {
            return Err(anyhow!("the external tensor `{name}` has no location")).exit_code(DATA);
        };
        let Some(location) = within(entry.value()) else {
            return Err(anyhow!(
                "the external data `{}` lies outside the model's folder; refusing to read it",
                entry.value()
            ))
            .exit_code(DATA);
        };
        if !files.contains_key(&location) {
            let real = real_file(folder, &location)?;
            parts.push((location.clone(), digest_file(&real)?));
            files.insert(location.clone(), real);
        }
        locations.push((entry, location));
    }
    let Some(data_folder) =
        files.values().filter_map(|file| file.parent()).map(Path::to_owned).reduce(|shared, parent| {
            let same = shared.components().zip(parent.components()).take_while(|(a, b)| a == b);
            same.map(|(part, _)| part).collect()
        })
    else {
        return Ok(None);
    };
    for (entry, location) in locations {
        let relative = files[&location].strip_prefix(&data_folder).ok().and_then(Path::to_str);
        let relative = relative.with_context(|| {
            format!("the external data {} has a name that is not UTF-8", files[&location].display())
        })?;
        entry.value = Some(relative.to_owned());
    }
    Ok(Some(data_folder))
}

/// A location within the folder, without the `.` and `..` that it may be spelt with; nothing where it leads out.
fn within(location: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in Path::new(location).components() {
        match part {
            Component::Normal(name) => parts.push(name.to_str()?),
            Component::CurDir => {}
            Component::ParentDir => drop(parts.pop()?),
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts.join("/"))
}

/// The file behind the external data that a graph in `folder` calls `location`.
fn real_file(folder: &Path, location: &str) -> anyhow::Result<PathBuf> {
    let real = folder.join(location).canonicalize().with_context(|| {
        format!("cannot find the model's external data `{location}` in {}", folder.display())
    })?;
    if !real.is_file() {
        bail!("the external data `{location}` is not a file");
    }
    Ok(real)
}

/// Adds every tensor of `graph` whose values stand in another file: weights, constants, and those of subgraphs.
fn collect_external<'a>(graph: &'a mut GraphProto, tensors: &mut Vec<&'a mut TensorProto>) {
    let is_external = |tensor: &&mut TensorProto| tensor.data_location() == DataLocation::External;
    tensors.extend(graph.initializer.iter_mut().filter(is_external));
    for attribute in graph.node.iter_mut().flat_map(|node| &mut node.attribute) {
        tensors.extend(attribute.t.as_mut().filter(is_external));
        if let Some(inner) = attribute.g.as_mut() {
            collect_external(inner, tensors);
        }
    }
}

fn digest_file(path: &Path) -> anyhow::Result<Fingerprint> {
    let cannot_read = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(cannot_read)?;
    refuse_pointer_in(path, &mut file).with_context(cannot_read).exit_code(DATA)?;
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher).with_context(cannot_read)?;
    Ok(Fingerprint::from(<[u8; 32]>::from(hasher.finalize())))
}
