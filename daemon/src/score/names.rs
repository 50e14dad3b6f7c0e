//! Names of inputs and outputs: those of a causal language model that Sluice feeds, and those of its loss head.

/// Input of token ids, int32 or int64 `[batch, sequence]`.
pub const TOKEN_IDS: &str = "input_ids";
/// Input that marks real tokens, int32 or int64 `[batch, sequence]`.
pub const ATTENTION_MASK: &str = "attention_mask";
/// Input of positions, int32 or int64 `[batch, sequence]`.
pub const POSITION_IDS: &str = "position_ids";

/// Input of segments, of which a text by itself is the first, int32 or int64 `[batch, sequence]`; of token classifiers.
pub const TOKEN_TYPE_IDS: &str = "token_type_ids";

/// Input of flat positions (`row * length + position`) whose next token, or class, is scored, int64 `[n]`, `n >= 1`.
pub const ROWS_INPUT: &str = "sluice_rows";
/// Input of the token ids that those positions predict, or of the class, int64 `[n]`.
pub const TARGETS_INPUT: &str = "sluice_targets";
/// Output of losses in nats, float32 `[n]`.
pub const LOSS_OUTPUT: &str = "sluice_loss";
/// Output of entropies in nats, float32 `[n]`, where they were asked for.
pub const ENTROPY_OUTPUT: &str = "sluice_entropy";
/// Output of the number of positions that the head was given, int64 `[1]`.
pub const POSITIONS_OUTPUT: &str = "sluice_positions";
