//! Who a reference model is.

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::Precision;

/// What records and checks need to know of a reference model.
#[derive(Clone, Copy, Debug)]
pub struct ModelIdentity {
    /// Fingerprint over the graph and its external data.
    pub fingerprint: Fingerprint,
    /// Fingerprint of `tokenizer.json`.
    pub tokenizer: Fingerprint,
    /// Number of token ids that the model knows.
    pub vocabulary: u32,
    /// Arithmetic of the weights.
    pub precision: Precision,
}
