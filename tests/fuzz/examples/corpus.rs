//! Makes the corpora of `records` and `graph` from golden values, small: `cargo run --example corpus`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use prost::Message as _;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::onnx::{GraphProto, ModelProto};
use sluice_schemas::record::{
    Bos, ContextPolicy, LossFormat, Losses, Precision, ScoredDocument, TokenIds, TokenizedDocument,
};

/// Values of a tensor that are kept: shapes and short constants matter to the graft, and weights do not.
const VALUES_BYTES_MAX: usize = 64;

/// One of each kind of export; those of older exporters are long.
const MODELS: [&str; 8] = [
    "exports/genai-gemma2-fp32",
    "exports/genai-llama-fp16",
    "exports/optimum-llama-past",
    "exports/torch-dynamo-llama",
    "exports/torch-dynamo-llama-brain",
    "exports/torch-dynamo-llama-tied",
    "exports/torch-dynamo-phi",
    "exports/genai-llama-bf16",
];

fn main() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).unwrap();
    for (name, tokens, bos) in
        [("narrow", vec![1, 2, 300], Bos::None), ("wide", vec![70_000, 2], Bos::Window(7))]
    {
        let document = TokenizedDocument {
            id: name.to_owned(),
            tokens: TokenIds::new(&tokens),
            tokenizer: Fingerprint::of_bytes(b"t"),
            source: "web".to_owned(),
            attributes: BTreeMap::from([("lang".to_owned(), "en".to_owned())]),
        };
        write(&format!("records/{name}-document"), &document.encode());
        let mut losses = vec![1.5; tokens.len()];
        if bos == Bos::None {
            losses[0] = f32::NAN;
        }
        let format = if bos == Bos::None { LossFormat::F32 } else { LossFormat::F16 };
        let scored = ScoredDocument {
            document,
            reference_losses: Losses::new(&losses, format).unwrap(),
            reference_entropies: Some(Losses::new(&losses, format).unwrap()),
            reference_model: Fingerprint::of_bytes(b"m"),
            context: ContextPolicy { window: 64, stride: 32, bos },
            precision: Precision::Bf16,
        };
        write(&format!("records/{name}-scored"), &scored.encode());
    }

    let golden = folder.join("../../golden");
    for name in MODELS {
        let model = golden.join(name);
        let bytes = std::fs::read(model.join("model.onnx")).unwrap();
        let mut proto = ModelProto::decode(bytes.as_slice()).unwrap();
        strip(proto.graph.as_mut().unwrap());
        let bytes = [vec![0], proto.encode_to_vec()].concat();
        write(&format!("graph/{}", model.file_name().unwrap().to_str().unwrap()), &bytes);
    }
}

/// Takes the weights away, and the documentation.
fn strip(graph: &mut GraphProto) {
    for tensor in &mut graph.initializer {
        if tensor.raw_data().len() > VALUES_BYTES_MAX {
            tensor.raw_data = None;
        }
    }
    for node in &mut graph.node {
        for attribute in &mut node.attribute {
            if let Some(inner) = attribute.g.as_mut() {
                strip(inner);
            }
        }
    }
}
