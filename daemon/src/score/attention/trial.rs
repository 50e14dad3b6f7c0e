//! Tries whether one operator computes what a layer's attention does: both run in ONNX Runtime on the same queries, keys
//! and values, at lengths on both sides of every number that the layer's nodes hold, with padding and without.
//!
//! A mask can be spelled in more ways than anybody can list. So nothing is read out of its nodes; they are run.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::Tensor;
use prost::Message as _;
use sluice_schemas::graph::{Dim, GraphBuilder, tensor_info};
use sluice_schemas::onnx::tensor_proto::DataType;
use sluice_schemas::onnx::{ModelProto, OperatorSetIdProto, ValueInfoProto};

use super::dims::{Dims, product};
use super::excerpt::Excerpt;
use super::find::Spelled;
use super::operator::{Lengths, MICROSOFT, Operator, build};
use crate::score::environment::environment;
use crate::score::inputs::element;
use crate::score::names::{ATTENTION_MASK, POSITION_IDS};
use crate::score::widen::widen;

const FUSED: &str = "sluice/trial/fused";
/// Most by which results may differ, whose size is about one. A mask, a scale or an order of heads that is not the same
/// changes them by far more.
const DIFFERENCE_MAX: f32 = 5e-4;
/// Largest size of queries and keys in a trial, by which soft caps show.
const SIZES: [f32; 2] = [1.5, 8.0];
/// Most bytes of a layer's products of queries and keys in a trial.
const PRODUCTS_BYTES_MAX: i64 = 256 << 20;

/// Most numbers of one operand.
const NUMBERS_MAX: usize = 1 << 27;

/// What a trial needs beside the layer.
pub(super) struct Bench<'a> {
    /// ONNX Runtime.
    pub(super) library: &'a Path,
    /// Folder of the model's external data.
    pub(super) data_folder: Option<&'a Path>,
    /// Longest sequence that the model was made for.
    pub(super) context_max: Option<u32>,
    /// The model's file format and operator sets.
    pub(super) ir_version: Option<i64>,
    pub(super) opsets: Vec<OperatorSetIdProto>,
}

/// Says why `operator` cannot stand for the layer, where it cannot. Fails where ONNX Runtime cannot be had.
pub(super) fn differs(
    bench: &Bench<'_>,
    excerpt: &Excerpt,
    spelled: &Spelled,
    operator: Operator,
) -> anyhow::Result<Option<String>> {
    let longest = bench.context_max.map_or(i64::MAX, i64::from);
    // Twice: a limit may be made of two numbers.
    let long = excerpt.length_max.saturating_mul(2).saturating_add(2).min(longest);
    let products = long.saturating_mul(long).saturating_mul(spelled.query.heads);
    if products.saturating_mul(size_of::<f32>() as i64) > PRODUCTS_BYTES_MAX {
        return Ok(Some(format!(
            "names the number {}, which may be a limit of its window and is too long to try",
            excerpt.length_max
        )));
    }
    // Whatever ONNX Runtime does not like about the layer's nodes by themselves, the model keeps them.
    let mut session = match session(bench, excerpt, spelled, operator)? {
        Ok(session) => session,
        Err(error) => return Ok(Some(format!("cannot be tried by itself ({error:#})"))),
    };
    let short = longest.min(7);
    let rows = vec![short, (short - 3).max(1), 1];
    let trials = [(rows.clone(), SIZES[0]), (rows, SIZES[1]), (vec![long], SIZES[0])];
    for (rows, size) in trials {
        match difference(&mut session, excerpt, spelled, &rows, size) {
            Ok(found) if found <= DIFFERENCE_MAX => {}
            Ok(found) => {
                let longest = rows.iter().max().unwrap_or(&0);
                return Ok(Some(format!(
                    "is not plain causal attention: results differ by {found:.1e} in rows of up to {longest} tokens"
                )));
            }
            Err(error) => return Ok(Some(format!("cannot be tried by itself ({error:#})"))),
        }
    }
    Ok(None)
}

/// A session that computes the attention both ways, in single precision.
fn session(
    bench: &Bench<'_>,
    excerpt: &Excerpt,
    spelled: &Spelled,
    operator: Operator,
) -> anyhow::Result<anyhow::Result<Session>> {
    let environment = environment(bench.library)?;
    let mut graph = excerpt.graph.clone();
    let mut builder = GraphBuilder::new("sluice/trial/");
    let lengths = Lengths::new(&mut builder);
    build(&mut builder, operator, spelled, &lengths, FUSED);
    let (nodes, initializers) = builder.finish();
    graph.node.extend(nodes);
    graph.initializer.extend(initializers);
    let names = ["batch", "heads", "length", "width"].map(Dim::Named);
    graph.output =
        [&*spelled.output, FUSED].map(|output| tensor_info(output, spelled.output_element, &names)).into();
    let mut model = ModelProto {
        ir_version: bench.ir_version,
        opset_import: bench.opsets.clone(),
        graph: Some(graph),
        ..Default::default()
    };
    admit(&mut model, operator);
    for narrow in [DataType::Bfloat16, DataType::Float16] {
        widen(&mut model, narrow);
    }
    let open = || -> anyhow::Result<Session> {
        let fail = |error: &dyn std::fmt::Display| anyhow!("{error}");
        let mut builder = Session::builder(&environment)?
            // The nodes as they are: what an optimizer makes of them is not what is asked here.
            .with_optimization_level(GraphOptimizationLevel::Disable)
            .map_err(|error| fail(&error))?
            .with_intra_threads(1)
            .map_err(|error| fail(&error))?;
        if let Some(folder) = bench.data_folder.and_then(Path::to_str) {
            builder = builder
                .with_config_entry("session.model_external_initializers_file_folder_path", folder)
                .map_err(|error| fail(&error))?;
        }
        Ok(builder.commit_from_memory(&model.encode_to_vec())?)
    };
    Ok(open())
}

/// Makes `model` one that may hold `operator`.
pub(super) fn admit(model: &mut ModelProto, operator: Operator) {
    let is = |import: &&mut OperatorSetIdProto, domain: &str| {
        import.domain() == domain || (domain.is_empty() && import.domain() == "ai.onnx")
    };
    let (domain, version, ir_version) = match operator {
        Operator::GroupQuery => (MICROSOFT, 1, 0),
        Operator::Standard => ("", 23, 11),
    };
    match model.opset_import.iter_mut().find(|import| is(import, domain)) {
        Some(import) => import.version = import.version.max(Some(version)),
        None => model
            .opset_import
            .push(OperatorSetIdProto { domain: Some(domain.to_owned()), version: Some(version) }),
    }
    model.ir_version = model.ir_version.max(Some(ir_version));
}

/// Largest difference between both ways on real positions of rows of the lengths `rows`, padded on the right.
fn difference(
    session: &mut Session,
    excerpt: &Excerpt,
    spelled: &Spelled,
    rows: &[i64],
    size: f32,
) -> anyhow::Result<f32> {
    let length = rows.iter().copied().max().unwrap_or(1);
    let batch = rows.len() as i64;
    let mut feed: Vec<(String, SessionInputValue<'_>)> = Vec::new();
    for input in &excerpt.graph.input {
        let name = input.name();
        if let Some(dims) = excerpt.operands.get(name) {
            let is_value = name == spelled.value.value;
            let size = if is_value { SIZES[0] } else { size };
            feed.push((name.to_owned(), numbers(dims, batch, length, size, feed.len() as u64)?));
        } else if let Some(dims) = excerpt.shapes_only.get(name) {
            feed.push((name.to_owned(), numbers(dims, batch, length, 0.0, 0)?));
        } else {
            feed.push((name.to_owned(), tokens(input, rows, length)?));
        }
    }
    let outputs = session.run(feed)?;
    let (shape, spelled_out) = outputs[spelled.output.as_str()].try_extract_tensor::<f32>()?;
    let (_, fused) = outputs[FUSED].try_extract_tensor::<f32>()?;
    let heads = spelled.query.heads;
    if **shape != [batch, heads, length, spelled.width] || fused.len() != spelled_out.len() {
        return Err(anyhow!("its result has the shape {shape:?}"));
    }
    let width = spelled.width as usize;
    let positions = spelled_out.chunks_exact(width).zip(fused.chunks_exact(width)).enumerate();
    let mut worst = 0.0_f32;
    for (at, (one, other)) in positions {
        let (row, position) = (at as i64 / length / heads, at as i64 % length);
        if position < rows[row as usize] {
            let largest = one.iter().zip(other).map(|(one, other)| (one - other).abs());
            // A difference that is no number is one.
            worst = largest.fold(worst, |worst, one| if one <= worst { worst } else { one });
            if worst.is_nan() {
                return Ok(f32::INFINITY);
            }
        }
    }
    Ok(worst)
}

/// Numbers between `-size` and `size`, the same in every run, in the shape that `dims` has at this batch and length.
fn numbers(
    dims: &Dims,
    batch: i64,
    length: i64,
    size: f32,
    seed: u64,
) -> anyhow::Result<SessionInputValue<'static>> {
    let mut free = [batch, length].into_iter();
    let shape: Vec<i64> = dims
        .iter()
        .map(|known| known.or_else(|| free.next()))
        .collect::<Option<_>>()
        .context("more than the batch and the length change from run to run")?;
    let count = product(&shape).and_then(|count| usize::try_from(count).ok());
    let count = count.filter(|&count| count <= NUMBERS_MAX).context("its operands are too large to try")?;
    // Knuth's linear congruential generator (MMIX).
    let mut state = seed + 1;
    let values: Vec<f32> = (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * size
        })
        .collect();
    Ok(Tensor::from_array((shape, values))?.into())
}

/// Token ids, masks or positions of rows of these lengths.
fn tokens(input: &ValueInfoProto, rows: &[i64], length: i64) -> anyhow::Result<SessionInputValue<'static>> {
    let values = rows.iter().flat_map(|&row| {
        (0..length).map(move |position| match input.name() {
            ATTENTION_MASK => i64::from(position < row),
            POSITION_IDS => position,
            _ => 1,
        })
    });
    let shape = vec![rows.len() as i64, length];
    Ok(match element(input) {
        DataType::Int32 => {
            Tensor::from_array((shape, values.map(|value| value as i32).collect::<Vec<_>>()))?.into()
        }
        _ => Tensor::from_array((shape, values.collect::<Vec<_>>()))?.into(),
    })
}
