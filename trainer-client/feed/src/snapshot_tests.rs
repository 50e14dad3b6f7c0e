//! Snapshots to files and back, and from one number of ranks to another.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{Bos, ContextPolicy};

use super::{Outline, RankSnapshot, Snapshot};
use crate::document::Document;
use crate::pack::Piece;
use crate::picture::PictureDocuments;
use crate::stream::{PartitionPosition, Position};

/// A document whose losses are numbers that decimals would not give back, and whose first has none.
fn document(number: u32, tokens: usize) -> Document {
    let losses = (0..tokens).map(|i| if i == 0 { f32::NAN } else { 1.0 / (number as f32 + i as f32) });
    let ids = (0..tokens as u32).map(|i| number * 100 + i).collect();
    Document::scored(format!("d{number}"), "s".into(), ids, losses.collect()).unwrap()
}

fn piece(number: u32) -> Piece {
    Piece { document: document(number, 4), start: 3 }
}

fn snapshot(world_size: u32) -> Snapshot {
    let rank = |rank: u32| {
        let place = PartitionPosition { epoch: 2, next_offset: i64::from(rank) + 5, end: Some(9) };
        RankSnapshot {
            position: Position {
                epoch: 2,
                partitions: BTreeMap::from([(rank as i32, place)]),
                next_partition: Some(rank as i32),
                documents: 10,
            },
            draws: 7,
            shuffled: (0..3).map(|n| document(10 * rank + n, 2 + n as usize)).collect(),
            finished: vec![vec![piece(10 * rank + 3), piece(10 * rank + 4)], vec![piece(10 * rank + 5)]],
            open: vec![piece(10 * rank + 6)],
        }
    };
    let picture = PictureDocuments::resumed(vec![document(99, 5)], 40);
    let policy = ContextPolicy { window: 256, stride: 128, bos: Bos::Document(1) };
    let contexts = BTreeMap::from([(Fingerprint::of_bytes(b"model"), policy)]);
    Snapshot { ranks: (0..world_size).map(rank).collect(), sources: vec!["s".into()], picture, contexts }
}

/// What two documents must share to be the same, bit by bit.
fn bits(document: &Document) -> (String, Vec<u32>, Vec<u32>) {
    let losses = document.reference().iter().map(|loss| loss.to_bits()).collect();
    (document.id().to_owned(), document.tokens().to_vec(), losses)
}

fn documents(snapshot: &Snapshot) -> Vec<(String, Vec<u32>, Vec<u32>)> {
    let pieces = |row: &Vec<Piece>| row.iter().map(|piece| bits(&piece.document)).collect::<Vec<_>>();
    let of_rank = |rank: &RankSnapshot| {
        let rows = rank.finished.iter().chain([&rank.open]).flat_map(pieces);
        rank.shuffled.iter().map(bits).chain(rows).collect::<Vec<_>>()
    };
    snapshot.ranks.iter().flat_map(of_rank).collect()
}

#[test]
fn a_snapshot_comes_back_from_its_files_bit_by_bit() {
    let before = snapshot(2);
    let (outline, bytes) = before.to_files().unwrap();
    let text = serde_json::to_string(&outline).unwrap();
    let outline: Outline = serde_json::from_str(&text).unwrap();
    let after = Snapshot::from_bytes(&outline, &bytes).unwrap();
    assert_eq!(documents(&after), documents(&before));
    assert_eq!(after.picture.chosen().iter().map(bits).collect::<Vec<_>>(), [bits(&document(99, 5))]);
    for (after, before) in after.ranks.iter().zip(&before.ranks) {
        assert_eq!((&after.position, after.draws), (&before.position, before.draws));
        assert!(after.finished.iter().flatten().all(|piece| piece.start == 3));
    }
    let other = snapshot(1).to_files().unwrap();
    assert!(Snapshot::from_bytes(&outline, &other.1).unwrap_err().to_string().contains("fewer documents"));
    assert!(Snapshot::from_bytes(&other.0, &bytes).unwrap_err().to_string().contains("more documents"));
    assert!(Snapshot::from_bytes(&outline, &bytes[..bytes.len() - 1]).is_err());
}

#[test]
fn another_number_of_ranks_has_every_document_once_and_knows_every_partition() {
    for (before, after) in [(2, 1), (2, 3), (3, 2), (1, 4)] {
        let old = snapshot(before);
        let new = old.clone().for_world_size(after);
        assert_eq!(new.ranks.len(), after);
        let mut sorted = [documents(&old), documents(&new)];
        for documents in &mut sorted {
            documents.sort();
        }
        assert_eq!(sorted[0], sorted[1]);
        for rank in &new.ranks {
            assert_eq!(rank.position.partitions.len(), before as usize);
            assert_eq!((rank.position.next_partition, rank.open.len()), (None, 0));
        }
    }
    let same = snapshot(2).for_world_size(2);
    assert_eq!(same.ranks[1].position, snapshot(2).ranks[1].position, "nothing changes");
}
