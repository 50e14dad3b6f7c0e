//! Snapshots to bytes and back, in parts and whole, and those that no run can have left.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{Bos, ContextPolicy};

use super::{LaneSnapshot, Snapshot, SnapshotError};
use crate::cut::Piece;
use crate::document::Document;
use crate::pack::{BatchShape, Packing};
use crate::plan::{Identity, Plan};
use crate::stream::{Extent, Position, Shard};

const POLICY: ContextPolicy = ContextPolicy { window: 256, stride: 128, bos: Bos::Document(1) };

/// A document whose losses are numbers that decimals would not give back, and whose first has none.
fn document(number: u32, tokens: usize) -> Document {
    let losses = (0..tokens).map(|i| if i == 0 { f32::NAN } else { 1.0 / (number as f32 + i as f32) });
    let ids = (0..tokens as u32).map(|i| number * 100 + i).collect();
    let document = Document::scored(format!("d{number}"), "s".into(), ids, losses.collect()).unwrap();
    let document = if number.is_multiple_of(2) { document.with_context(POLICY) } else { document };
    if number.is_multiple_of(5) {
        document.with_attribute((0..tokens).map(|i| 1.0 / (7 + i) as f32).collect()).unwrap()
    } else {
        document
    }
}

fn piece(number: u32) -> Piece {
    let bos = number.is_multiple_of(3).then_some(1);
    Piece { document: document(number, 4), start: 3, first_predicted: 2, bos }
}

fn identity() -> Identity {
    let plan = Plan {
        topic: "t".into(),
        extent: Extent::UntilEnd { epochs: 2 },
        shape: BatchShape { rows: 2, len: 16 },
        packing: Packing::default(),
        micro_batches: 4,
        shuffle_buffer: 10,
        seed: 1,
    };
    Identity { tokenizer: Fingerprint::of_bytes(b"t"), reference_model: None, plan }
}

fn snapshot(lanes: usize) -> Snapshot {
    let lane = |lane: usize| {
        let number = 10 * lane as u32 + 1;
        LaneSnapshot {
            position: Position { epoch: 2, first_offset: 1, next_offset: 5, end: Some(9), documents: 10 },
            draws: 7,
            shuffled: (0..3).map(|n| document(number + n, 2 + n as usize)).collect(),
            finished: vec![vec![piece(number + 3), piece(number + 4)], vec![piece(number + 5)]],
            waiting: vec![piece(number + 6)],
        }
    };
    let contexts = BTreeMap::from([(Fingerprint::of_bytes(b"model"), POLICY)]);
    let held = (0..lanes).map(|number| (number, lane(number))).collect();
    Snapshot { identity: identity(), topic_id: Some("id".into()), step: 3, lanes, turn: 1, contexts, held }
}

/// Written out with all bits, because NaN is not equal to itself.
fn bits(snapshot: &Snapshot) -> String {
    let of = |document: &Document| {
        let losses: Vec<u32> = document.reference().iter().map(|loss| loss.to_bits()).collect();
        format!(
            "{} {} {:?} {losses:?} {:?} {:?}",
            document.id(),
            document.source(),
            document.tokens(),
            document.attribute(),
            document.context()
        )
    };
    let pieces = |pieces: &[Piece]| -> String {
        let of = |p: &Piece| format!("{} {} {} {:?};", of(&p.document), p.start, p.first_predicted, p.bos);
        pieces.iter().map(of).collect()
    };
    let lane = |(lane, held): (&usize, &LaneSnapshot)| {
        let shuffled: Vec<String> = held.shuffled.iter().map(of).collect();
        let rows: Vec<String> = held.finished.iter().map(|row| pieces(row)).collect();
        let waiting = pieces(&held.waiting);
        format!("{lane} {:?} {} {shuffled:?} {rows:?} {waiting}\n", held.position, held.draws)
    };
    let Snapshot { identity, topic_id, step, lanes, turn, contexts, held } = snapshot;
    format!("{identity:?} {topic_id:?} {step} {lanes} {turn} {contexts:?}\n")
        + &held.iter().map(lane).collect::<String>()
}

#[test]
fn a_snapshot_comes_back_from_its_bytes_bit_by_bit() {
    let before = snapshot(2);
    before.check(10_000).unwrap();
    let bytes = before.to_bytes().unwrap();
    assert_eq!(bits(&Snapshot::from_bytes(&bytes).unwrap()), bits(&before));
    for cut in 0..bytes.len() {
        assert!(Snapshot::from_bytes(&bytes[..cut]).is_err(), "cut after {cut} bytes");
    }
    // The first eight bytes and the names after them are the container's, whose spaces alone mean nothing.
    let flipped = |index: usize, bit: u8| {
        let mut flipped = bytes.clone();
        flipped[index] ^= 1 << bit;
        flipped
    };
    let is_data = |index: usize| index >= 8 + usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    for (index, bit) in (0..bytes.len()).flat_map(|index| (0..8).map(move |bit| (index, bit))) {
        match Snapshot::from_bytes(&flipped(index, bit)) {
            Ok(after) => assert_eq!(bits(&after), bits(&before), "bit {bit} of byte {index}"),
            Err(_) => continue,
        }
        assert!(!is_data(index), "bit {bit} of byte {index} was not seen");
    }
}

#[test]
fn the_parts_of_all_ranks_are_the_whole_whatever_their_number() {
    let whole = snapshot(4);
    for ranks in [1, 2, 4] {
        let part = |rank| {
            let part = whole.part(Shard::new(rank, ranks).unwrap());
            Snapshot::from_bytes(&part.to_bytes().unwrap()).unwrap()
        };
        let parts: Vec<Snapshot> = (0..ranks).rev().map(part).collect();
        assert!(parts.iter().all(|part| part.held.len() == 4 / ranks));
        let merged = Snapshot::merged(parts.clone()).unwrap();
        // Parts come in any order, and each is put in its place.
        assert_eq!(bits(&merged), bits(&whole));
        if ranks > 1 {
            let error = Snapshot::merged(parts[1..].to_vec()).unwrap_err();
            assert!(error.to_string().contains("held by 0 parts"), "{error}");
            let twice = Snapshot::merged(parts.iter().chain(&parts[..1]).cloned().collect()).unwrap_err();
            assert!(twice.to_string().contains("held by 2 parts"), "{twice}");
            let mut later = parts.clone();
            later[0].step = 2;
            assert!(matches!(Snapshot::merged(later), Err(SnapshotError::Parts("the step"))));
            let mut elsewhere = parts.clone();
            elsewhere[0].contexts.values_mut().for_each(|context| context.stride += 1);
            let elsewhere = Snapshot::merged(elsewhere).unwrap_err();
            assert!(elsewhere.to_string().contains("how the reference model saw"), "{elsewhere}");
            let mut other = parts;
            other[0].identity.plan.seed = 9;
            assert!(matches!(Snapshot::merged(other), Err(SnapshotError::Parts("the seed"))));
        }
    }
    assert!(Snapshot::merged(vec![]).is_err());
}

#[test]
fn what_no_run_can_have_left_is_refused_and_never_panics() {
    let refused = |change: &dyn Fn(&mut LaneSnapshot)| {
        let mut damaged = snapshot(1);
        change(damaged.held.get_mut(&0).unwrap());
        // It survives the bytes, and is found out all the same.
        let read = Snapshot::from_bytes(&damaged.to_bytes().unwrap()).unwrap();
        read.check(10_000).unwrap_err().to_string()
    };
    let empty = Document::plain("d0".into(), String::new(), vec![]);
    let of_none = Piece { document: empty, start: 0, first_predicted: 1, bos: None };
    assert!(refused(&|lane| lane.waiting.push(of_none.clone())).contains("predicts from the 1th on"));
    let unpredicted = Piece { first_predicted: 4, ..piece(1) };
    assert!(refused(&|lane| lane.finished[0].push(unpredicted.clone())).contains("predicts from the 4th on"));
    let without_context = Piece { first_predicted: 0, bos: None, ..piece(1) };
    assert!(refused(&|lane| lane.waiting.push(without_context.clone())).contains("predicts from the 0th on"));
    let long = Piece { document: document(3, 17), start: 0, first_predicted: 1, bos: None };
    assert!(refused(&|lane| lane.waiting.push(long.clone())).contains("a piece of 17 tokens"));
    assert!(
        refused(&|lane| lane.finished[0].extend([piece(5), piece(7), piece(8)])).contains("a sequence 16")
    );
    assert!(refused(&|lane| lane.finished.push(vec![])).contains("a row is empty"));
    assert!(refused(&|lane| lane.shuffled.push(document(100, 2))).contains("token id 10000 is beyond"));
    let foreign = Piece { bos: Some(10_000), ..piece(1) };
    assert!(refused(&|lane| lane.waiting.push(foreign.clone())).contains("BOS 10000 is beyond"));
}

#[test]
fn a_snapshot_is_gone_on_from_only_as_itself() {
    let whole = snapshot(4);
    let half = Shard::new(1, 2).unwrap();
    let check = |snapshot: &Snapshot, identity: &Identity, shard, lanes| {
        snapshot.check_for(identity, shard, lanes).map_err(|error| error.to_string())
    };
    assert_eq!(check(&whole, &identity(), Shard::WHOLE, 4), Ok(()));
    assert_eq!(check(&whole.part(half), &identity(), half, 4), Ok(()));
    assert_eq!(check(&whole, &identity(), Shard::WHOLE, 6), Ok(()), "lanes may come");
    assert!(check(&whole, &identity(), Shard::WHOLE, 3).unwrap_err().contains("4 lanes"));
    assert!(check(&whole.part(half), &identity(), Shard::WHOLE, 4).unwrap_err().contains("lane 0"));
    let mut other = identity();
    other.plan.seed = 9;
    assert!(check(&whole, &other, Shard::WHOLE, 4).unwrap_err().contains("the seed differs"));
    let tokenizer = Fingerprint::of_bytes(b"another");
    let error = check(&whole, &Identity { tokenizer, ..identity() }, Shard::WHOLE, 4).unwrap_err();
    assert!(error.contains("the tokenizer differs"), "{error}");
}
