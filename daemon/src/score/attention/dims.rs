//! Arithmetic of shapes, of which some sizes are not known.

/// Sizes of a value's dimensions; nothing for one that changes from run to run.
pub(super) type Dims = Vec<Option<i64>>;

/// Operators whose first output has the shape of their first input.
pub(super) fn keeps_shape(op: &str) -> bool {
    matches!(
        op,
        "Cast"
            | "Identity"
            | "Neg"
            | "Not"
            | "Sqrt"
            | "Reciprocal"
            | "Exp"
            | "Log"
            | "Tanh"
            | "Sigmoid"
            | "Relu"
            | "Gelu"
            | "Erf"
            | "Sin"
            | "Cos"
            | "Abs"
            | "IsNaN"
            | "Softmax"
            | "Clip"
            | "Trilu"
            | "CumSum"
            | "Dropout"
            | "QuickGelu"
            | "LayerNormalization"
            | "RMSNormalization"
            | "SimplifiedLayerNormalization"
            | "SkipLayerNormalization"
            | "SkipSimplifiedLayerNormalization"
            | "RotaryEmbedding"
            | "QuantizeLinear"
            | "DequantizeLinear"
            | "DynamicQuantizeLinear"
    )
}

/// The product of sizes, where it is no larger than a number can be.
pub(super) fn product(sizes: &[i64]) -> Option<i64> {
    sizes.iter().try_fold(1_i64, |product, &size| product.checked_mul(size))
}

/// An axis that may count from the end.
pub(super) fn place(axis: i64, rank: usize) -> Option<usize> {
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(axis).ok().filter(|&axis| axis < rank)
}

/// Sizes with a dimension of one at each of `axes`.
pub(super) fn unsqueezed(dims: &Dims, axes: &[i64]) -> Option<Dims> {
    let rank = dims.len() + axes.len();
    let axes: Vec<usize> = axes.iter().map(|&axis| place(axis, rank)).collect::<Option<_>>()?;
    let mut rest = dims.iter();
    (0..rank).map(|at| if axes.contains(&at) { Some(Some(1)) } else { rest.next().copied() }).collect()
}

/// Sizes without the dimensions at `axes`.
pub(super) fn squeezed(dims: &Dims, axes: &[i64]) -> Option<Dims> {
    let axes: Vec<usize> = axes.iter().map(|&axis| place(axis, dims.len())).collect::<Option<_>>()?;
    Some(dims.iter().enumerate().filter(|(at, _)| !axes.contains(at)).map(|(_, size)| *size).collect())
}

/// Sizes of two values that spread over each other, as ONNX (and numpy) has it.
pub(super) fn broadcast(one: &Dims, other: &Dims) -> Option<Dims> {
    let rank = one.len().max(other.len());
    let size = |dims: &Dims, at: usize| (at + dims.len()).checked_sub(rank).map_or(Some(1), |at| dims[at]);
    (0..rank)
        .map(|at| match (size(one, at), size(other, at)) {
            (Some(1), size) | (size, Some(1)) => Some(size),
            (Some(one), Some(other)) if one != other => None,
            (Some(size), _) | (_, Some(size)) => Some(Some(size)),
            (None, None) => Some(None),
        })
        .collect()
}

/// Sizes of a matrix product.
pub(super) fn multiplied(one: &Dims, other: &Dims) -> Option<Dims> {
    let (_, one_outer) = one.split_last()?;
    let (&columns, rest) = other.split_last()?;
    let (_, other_outer) = rest.split_last()?;
    let (&rows, one_outer) = one_outer.split_last()?;
    let mut dims = broadcast(&one_outer.to_vec(), &other_outer.to_vec())?;
    dims.extend([rows, columns]);
    Some(dims)
}
