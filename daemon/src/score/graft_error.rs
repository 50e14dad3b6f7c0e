//! Everything for which a graph is refused.

/// First opset in which Squeeze and ReduceSum take their axes as inputs and LogSoftmax works on one axis.
pub(super) const OPSET_MIN: i64 = 13;

/// Why a graph has no place for a loss head.
#[derive(Debug, thiserror::Error)]
pub enum GraftError {
    /// A file without a graph.
    #[error("the ONNX file holds no graph")]
    NoGraph,
    /// A model that is no language model, or was exported without its head.
    #[error(
        "the graph has no output named `logits` (its outputs: {outputs}); export the model as a causal language model, or for token \
         classification"
    )]
    NoLogits {
        /// The outputs there are.
        outputs: String,
    },
    /// An opset from before the operators that the head is made of.
    #[error("the graph uses opset {found} of the standard domain; export it with opset {OPSET_MIN} or later")]
    OldOpset {
        /// The graph's opset.
        found: i64,
    },
    /// Something between the head and the logits that cannot be moved.
    #[error(
        "cannot graft a loss head: looking back from `logits` for the head's matrix product, met node `{node}` \
         ({op_type}), {why}"
    )]
    UnknownHead {
        /// The node's name.
        node: String,
        /// Its operator.
        op_type: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Activations that are quantized by a scale which is taken from a whole batch, padding included.
    #[error(
        "node `{node}` ({op_type}) quantizes by a scale taken from the whole batch, so a document's losses would change with \
         what shares its batch; quantize the weights alone (MatMulNBits), or export the model in float16 or bfloat16"
    )]
    QuantizedByBatch {
        /// The node's name.
        node: String,
        /// Its operator.
        op_type: String,
    },
    /// An input that Sluice neither feeds nor can make constant.
    #[error("the model wants an input `{name}`, {why}")]
    UnknownInput {
        /// The input's name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
}
