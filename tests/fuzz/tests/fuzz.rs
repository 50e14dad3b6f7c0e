//! Each target on its corpus, and on what a seeded hand makes of it. `ops/fuzz` goes on for longer, led by coverage.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use sluice_fuzz::TARGETS;

/// Changes of each input of a corpus; all targets together take some seconds.
const CHANGES: usize = 2000;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Some bytes overwritten, cut out, doubled, or spliced in from another input.
fn changed(random: &mut fastrand::Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..random.usize(1..6) {
        let at = random.usize(..=bytes.len());
        let len = random.usize(..=16.min(bytes.len() - at));
        match random.u8(..5) {
            0 => bytes[at..at + len].iter_mut().for_each(|byte| *byte = random.u8(..)),
            1 => bytes[at..at + len].iter_mut().for_each(|byte| *byte ^= 1 << random.u8(..8)),
            2 => drop(bytes.drain(at..at + len)),
            3 => {
                let part = bytes[at..at + len].to_vec();
                drop(bytes.splice(at..at, part));
            }
            _ => {
                let from = random.usize(..=other.len());
                let part = other[from..other.len().min(from + 64)].to_vec();
                drop(bytes.splice(at..at + len, part));
            }
        }
    }
    bytes
}

#[test]
fn whatever_the_bytes_are_an_answer_comes_of_them() {
    for (name, target) in TARGETS {
        let inputs = corpus(name);
        assert!(inputs.len() > 3, "the corpus of {name} is missing");
        let mut random = fastrand::Rng::with_seed(7);
        for input in &inputs {
            target(input);
            for _ in 0..CHANGES {
                let other = &inputs[random.usize(..inputs.len())];
                target(&changed(&mut random, input, other));
            }
        }
    }
}

#[test]
fn a_corpus_has_what_is_right_too() {
    // Where every input is refused at once, nothing behind the first check is tried.
    use prost::Message as _;
    use sluice_daemon::score::graft::{HeadOptions, graft};
    use sluice_schemas::record::{ScoredDocument, TokenizedDocument};
    let records = corpus("records");
    assert!(records.iter().any(|bytes| TokenizedDocument::decode(bytes.clone().into()).is_ok()));
    assert!(records.iter().any(|bytes| ScoredDocument::decode(bytes.clone().into()).is_ok()));
    let grafted = corpus("graph").iter().any(|bytes| {
        let mut model = sluice_schemas::onnx::ModelProto::decode(&bytes[1..]).unwrap();
        graft(&mut model, HeadOptions::losses(sluice_daemon::device::Device::Cpu)).is_ok()
    });
    assert!(grafted);
}
