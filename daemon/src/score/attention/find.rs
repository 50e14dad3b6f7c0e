//! Looks for attention that is spelled out, by walking back and forth from each `Softmax`.
//!
//! ```text
//! query ──(scale)──────────────────────────> MatMul ─> (scale, soft cap, mask, casts) ─> Softmax ─> MatMul ─> output
//! key ────(scale, repeat of heads, turn)─────┘                                                      │
//! value ──(repeat of heads)─────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! What is found here is a guess: sizes, a scale and a soft cap. Whether one operator computes the same, mask and repeat
//! of heads included, is tried afterwards on the layer's own nodes (`trial.rs`).

use std::collections::HashSet;

use sluice_schemas::onnx::NodeProto;
use sluice_schemas::onnx::tensor_proto::DataType;

use super::dims::Dims;
use super::index::Index;
use super::shapes::Shapes;

/// Most nodes between a matrix product and the values that attention begins with.
const WALK_MAX: usize = 24;

/// How queries, keys or values lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// `[batch, length, heads * width]`
    Flat,
    /// `[batch, heads, length, width]`
    HeadsFirst,
    /// `[batch, length, heads, width]`
    HeadsLast,
}

/// Queries, keys or values.
#[derive(Clone, Debug)]
pub(super) struct Operand {
    /// The value's name.
    pub(super) value: String,
    /// How it lies in memory.
    pub(super) layout: Layout,
    /// Number of heads.
    pub(super) heads: i64,
}

/// One layer's attention, as it is spelled out.
#[derive(Clone, Debug)]
pub(super) struct Spelled {
    pub(super) query: Operand,
    pub(super) key: Operand,
    pub(super) value: Operand,
    /// Dimensions of a head.
    pub(super) width: i64,
    /// What products of queries and keys are multiplied by.
    pub(super) scale: f64,
    /// Bound of the scaled products, where they are capped softly.
    pub(super) soft_cap: Option<f64>,
    /// Element type of queries, keys and values.
    pub(super) element: DataType,
    /// The value that comes out: `[batch, heads, length, width]`.
    pub(super) output: String,
    /// Its element type.
    pub(super) output_element: DataType,
    /// Values that are computed from queries, keys and values on the way.
    pub(super) inside: HashSet<String>,
}

/// Recognises the attention around the node `softmax`, or says at which node that ended and why.
pub(super) fn around(
    index: &Index<'_>,
    shapes: &Shapes<'_>,
    settled: &HashSet<String>,
    softmax: &NodeProto,
) -> Result<Spelled, Unknown> {
    let mut inside = HashSet::new();
    let mut walk = Walk { index, shapes, settled, inside: &mut inside };
    let refuse = |node: &NodeProto, why: &'static str| Unknown { node: node.name().to_owned(), why };
    let first = softmax.input.first().map(String::as_str).unwrap_or_default();
    let Some(scores) = walk.scores(first, WALK_MAX) else {
        return Err(refuse(softmax, "which does not lead back to a product of queries and keys"));
    };
    let Some(weighted) = walk.weighted(softmax) else {
        return Err(refuse(softmax, "whose weights do not lead to a product with values"));
    };
    let product = scores.product;
    // A file may hold a product of anything.
    let ([queries, keys, ..], [_, values, ..]) = (&*product.input, &*weighted.input) else {
        return Err(refuse(product, "which lacks an input, or whose product with values does"));
    };
    let (query, q_scale) = walk.operand(queries, true);
    let (key, k_scale) = walk.operand(keys, true);
    let (value, _) = walk.operand(values, false);

    let heads = query.iter().find_map(|name| heads_first_or_last(shapes.dims(name)?));
    let Some((_, heads, width)) = heads.filter(|&(_, heads, width)| heads > 0 && width > 0) else {
        return Err(refuse(product, "whose queries do not show how many heads there are"));
    };
    let operand = |chain: &[String], known: Option<i64>| {
        chain.iter().rev().find_map(|name| {
            let (layout, heads) = match shapes.dims(name)?.as_slice() {
                [None, None, Some(all)] => (Layout::Flat, all / width),
                _ => heads_first_or_last(shapes.dims(name)?)
                    .filter(|&(.., of_head)| of_head == width)
                    .map(|(layout, heads, _)| (layout, heads))?,
            };
            known.is_none_or(|known| known == heads).then(|| Operand { value: name.clone(), layout, heads })
        })
    };
    let (Some(query), Some(key)) = (operand(&query, Some(heads)), operand(&key, None)) else {
        return Err(refuse(product, "whose queries or keys are not of heads of one width"));
    };
    let Some(value) = operand(&value, Some(key.heads)) else {
        return Err(refuse(weighted, "whose values are not of as many heads as the keys"));
    };
    if heads % key.heads.max(1) != 0 {
        return Err(refuse(product, "whose heads are no multiple of those of the keys"));
    }
    let elements = [&query, &key, &value].map(|operand| shapes.element(&operand.value));
    let output = weighted.output.first().cloned().unwrap_or_default();
    let (Some(element), Some(output_element)) = (elements[0], shapes.element(&output)) else {
        return Err(refuse(product, "whose element type is not known"));
    };
    if elements.iter().any(|of| *of != Some(element))
        || !matches!(element, DataType::Float | DataType::Float16 | DataType::Bfloat16)
    {
        return Err(refuse(product, "whose queries, keys and values are not of one floating-point type"));
    }
    Ok(Spelled {
        query,
        key,
        value,
        width,
        scale: scores.scale * q_scale * k_scale,
        soft_cap: scores.soft_cap,
        element,
        output,
        output_element,
        inside,
    })
}

/// Where recognising ended.
#[derive(Clone, Debug)]
pub(super) struct Unknown {
    /// The node's name.
    pub(super) node: String,
    /// What about it is not known.
    pub(super) why: &'static str,
}

/// Layout, heads and width of a value with four dimensions.
fn heads_first_or_last(dims: &Dims) -> Option<(Layout, i64, i64)> {
    match *dims.as_slice() {
        [None, Some(heads), None, Some(width)] => Some((Layout::HeadsFirst, heads, width)),
        [None, None, Some(heads), Some(width)] => Some((Layout::HeadsLast, heads, width)),
        _ => None,
    }
    .filter(|&(_, heads, width)| heads > 0 && width > 0)
}

/// What stands between the product of queries and keys and the softmax.
struct Scores<'a> {
    product: &'a NodeProto,
    scale: f64,
    soft_cap: Option<f64>,
}

struct Walk<'a, 'b> {
    index: &'b Index<'a>,
    shapes: &'b Shapes<'a>,
    /// Inputs that are an empty cache now.
    settled: &'b HashSet<String>,
    inside: &'b mut HashSet<String>,
}

impl<'a> Walk<'a, '_> {
    fn scores(&mut self, value: &str, left: usize) -> Option<Scores<'a>> {
        let node = self.index.producer(value)?;
        let left = left.checked_sub(1)?;
        let constant =
            |input: &String| self.shapes.scalar(input).is_some() || self.index.tensor(input).is_some();
        let found = match node.op_type() {
            "MatMul" if node.input.len() == 2 && !node.input.iter().any(constant) => {
                Some(Scores { product: node, scale: 1.0, soft_cap: None })
            }
            "Cast" | "Identity" | "Dropout" | "Reshape" => self.scores(node.input.first()?, left),
            "Mul" | "Div" => {
                let (carrier, factor) = self.scaled(node)?;
                if let Some(inner) = self.capped(carrier) {
                    let mut scores = self.scores(&inner, left)?;
                    scores.soft_cap = Some(factor);
                    Some(scores)
                } else {
                    let mut scores = self.scores(carrier, left)?;
                    scores.scale *= factor;
                    Some(scores)
                }
            }
            "Add" | "Where" | "Max" => {
                node.input.iter().filter(|input| !constant(input)).find_map(|input| self.scores(input, left))
            }
            _ => None,
        };
        if found.is_some() {
            self.inside.insert(value.to_owned());
        }
        found
    }

    /// The input of `node` that changes from run to run, and what it is multiplied by.
    fn scaled<'n>(&self, node: &'n NodeProto) -> Option<(&'n str, f64)> {
        let [one, other] = node.input.as_slice() else { return None };
        match (self.shapes.scalar(one), self.shapes.scalar(other)) {
            (None, Some(number)) if node.op_type() == "Mul" => Some((one, number)),
            (None, Some(number)) => Some((one, number.recip())),
            (Some(number), None) if node.op_type() == "Mul" => Some((other, number)),
            _ => None,
        }
    }

    /// What `tanh(x / cap)`, of which `value` is the whole, has as `x / cap`, where it is that.
    fn capped(&mut self, value: &str) -> Option<String> {
        let tanh = self.index.producer(value).filter(|node| node.op_type() == "Tanh")?;
        let divided = self.index.producer(tanh.input.first()?)?;
        let (inner, _) = self.scaled(divided)?;
        self.inside.extend([value.to_owned(), divided.output.first()?.clone()]);
        Some(inner.to_owned())
    }

    /// The product of the softmax's weights with the values.
    fn weighted(&mut self, softmax: &NodeProto) -> Option<&'a NodeProto> {
        let mut value = softmax.output.first()?.clone();
        for _ in 0..WALK_MAX {
            self.inside.insert(value.clone());
            let next = self.index.consumers(&value).find(|node| {
                matches!(node.op_type(), "Cast" | "Identity" | "Dropout" | "Where" | "MatMul")
            })?;
            if next.op_type() == "MatMul" {
                let is_weighted =
                    next.input.first() == Some(&value) && next.input.len() == 2 && !next.output.is_empty();
                return is_weighted.then_some(next);
            }
            value.clone_from(next.output.first()?);
        }
        None
    }

    /// The values from `start` back to where a matrix product, a rotation or a norm makes it, and what they are multiplied
    /// by on the way.
    fn operand(&mut self, start: &str, scales: bool) -> (Vec<String>, f64) {
        let mut chain = vec![start.to_owned()];
        let mut scale = 1.0;
        let mut scales_at = vec![scale];
        while chain.len() < WALK_MAX {
            let value = &chain[chain.len() - 1];
            let Some(node) = self.index.producer(value) else { break };
            let next = match node.op_type() {
                "Transpose" | "Reshape" | "Unsqueeze" | "Squeeze" | "Expand" | "Tile" | "Identity" => {
                    node.input.first().map(String::as_str)
                }
                "Mul" | "Div" if scales => self.scaled(node).map(|(carrier, factor)| {
                    scale *= factor;
                    carrier
                }),
                // An empty cache before what is new.
                "Concat" => match node.input.as_slice() {
                    [past, new] if self.settled.contains(past) => Some(new.as_str()),
                    _ => None,
                },
                _ => None,
            };
            let Some(next) = next.map(str::to_owned) else { break };
            chain.push(next);
            scales_at.push(scale);
        }
        // Of what lies deeper than the value that is taken, nothing counts.
        let deepest = chain.iter().rposition(|name| {
            self.shapes.dims(name).is_some_and(|dims| {
                heads_first_or_last(dims).is_some() || matches!(dims.as_slice(), [None, None, Some(_)])
            })
        });
        chain.truncate(deepest.map_or(0, |at| at + 1));
        let scale = chain.len().checked_sub(1).map_or(1.0, |at| scales_at[at]);
        self.inside.extend(chain.iter().cloned());
        (chain, scale)
    }
}
