//! Ranks that share a stream's lanes, against one that has them all.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier, Mutex};

use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{Bos, ContextPolicy};

use crate::batch::PackedBatch;
use crate::document::Document;
use crate::feed::{Alone, Feed, Group, Step};
use crate::pack::{BatchShape, Packing};
use crate::plan::Plan;
use crate::random::SplitMix64;
use crate::snapshot::Snapshot;
use crate::stream::{Contexts, DocumentStream, Extent, Next, Position, Shard, StreamError};

/// Lanes in memory.
#[derive(Clone)]
struct Lanes {
    documents: Vec<Vec<Document>>,
    read: BTreeMap<usize, usize>,
    /// Documents after which it stops, over all lanes.
    stop_after: usize,
    fail_after: usize,
}

impl Lanes {
    /// Lanes of these lengths; documents of 2 to 20 tokens.
    fn new(lengths: &[usize]) -> Self {
        let mut generator = SplitMix64::keyed(8, 0);
        let mut document = |lane: usize, number: usize| {
            let length = 2 + generator.below(19) as u32;
            let first = (lane * 100_000 + number * 100) as u32;
            Document::plain(format!("{lane}/{number}"), String::new(), (first..first + length).collect())
        };
        let documents = lengths.iter().enumerate();
        let documents =
            documents.map(|(lane, &n)| (0..n).map(|number| document(lane, number)).collect()).collect();
        Self { documents, read: BTreeMap::new(), stop_after: usize::MAX, fail_after: usize::MAX }
    }

    fn standing_at(&self, snapshot: &Snapshot) -> Self {
        let read = snapshot.held.iter().map(|(&lane, held)| (lane, held.position.documents as usize));
        Self { read: read.collect(), ..self.clone() }
    }
}

impl DocumentStream for Lanes {
    fn lanes(&self) -> usize {
        self.documents.len()
    }

    fn next_document(&mut self, lane: usize) -> Result<Next, StreamError> {
        let all: usize = self.read.values().sum();
        if all >= self.fail_after {
            return Err(StreamError::ReaderGone("t".into()));
        }
        if all >= self.stop_after {
            return Ok(Next::Stopped);
        }
        let read = self.read.entry(lane).or_default();
        let next = self.documents[lane].get(*read).cloned();
        *read += usize::from(next.is_some());
        Ok(next.map_or(Next::Ended, Next::Document))
    }

    fn position(&self, lane: usize) -> Position {
        let documents = self.read.get(&lane).copied().unwrap_or(0) as u64;
        Position { documents, ..Position::default() }
    }

    fn reference_model(&self) -> Option<Fingerprint> {
        None
    }
}

fn plan(micro_batches: usize) -> Plan {
    Plan {
        topic: "t".into(),
        extent: Extent::UntilEnd { epochs: 1 },
        shape: BatchShape { rows: 2, len: 24 },
        packing: Packing::default(),
        micro_batches,
        shuffle_buffer: 30,
        seed: 3,
    }
}

fn feed(lanes: &Lanes, micro_batches: usize, shard: Shard, snapshot: Option<&Snapshot>) -> Feed {
    let stream = snapshot.map_or(lanes.clone(), |snapshot| lanes.standing_at(snapshot));
    Feed::over(Box::new(stream), plan(micro_batches), shard, snapshot, Fingerprint::of_bytes(b"t"))
}

/// Ranks in threads that meet at a barrier.
struct Meeting {
    barrier: Arc<Barrier>,
    values: Arc<Mutex<Vec<i64>>>,
}

impl Group for Meeting {
    fn minimum(&mut self, values: &mut [i64]) -> Result<(), String> {
        self.barrier.wait();
        self.values.lock().unwrap().clear();
        self.barrier.wait();
        {
            let mut shared = self.values.lock().unwrap();
            if shared.is_empty() {
                shared.extend_from_slice(values);
            }
            for (shared, value) in shared.iter_mut().zip(values.iter()) {
                *shared = (*shared).min(*value);
            }
        }
        self.barrier.wait();
        values.copy_from_slice(&self.values.lock().unwrap());
        Ok(())
    }
}

/// What each step of `ranks` ranks gives, by number, after at most `steps` steps, and the ranks' snapshots by then.
fn run(
    lanes: &Lanes,
    micro_batches: usize,
    ranks: usize,
    from: Option<&Snapshot>,
    steps: usize,
) -> (Vec<Vec<PackedBatch>>, Snapshot) {
    let meeting = (Arc::new(Barrier::new(ranks)), Arc::new(Mutex::new(vec![])));
    let of_rank = |rank: usize| {
        let (barrier, values) = meeting.clone();
        let lanes = lanes.clone();
        let from = from.cloned();
        std::thread::spawn(move || {
            let shard = Shard::new(rank, ranks).unwrap();
            let part = from.as_ref().map(|snapshot| snapshot.part(shard));
            let mut feed = feed(&lanes, micro_batches, shard, part.as_ref());
            let mut group = Meeting { barrier, values };
            let mut taken = Vec::new();
            while taken.len() < steps {
                match feed.next_step(&mut group).unwrap() {
                    Step::Batches(batches) => taken.push(batches),
                    Step::Ended => break,
                    Step::Stopped => panic!("nobody asked"),
                }
            }
            (taken, feed.snapshot())
        })
    };
    let threads: Vec<_> = (0..ranks).map(of_rank).collect();
    let (taken, snapshots): (Vec<_>, Vec<_>) =
        threads.into_iter().map(|thread| thread.join().unwrap()).unzip();
    let count = taken[0].len();
    let step = |step: usize| {
        let sizes: Vec<usize> = taken.iter().map(|rank: &Vec<Vec<PackedBatch>>| rank[step].len()).collect();
        assert!(sizes.iter().all(|size| *size == sizes[0]), "no rank has a micro-batch more: {sizes:?}");
        let mut batches: Vec<_> = taken.iter().flat_map(|rank| rank[step].clone()).collect();
        for packed in batches.iter().filter(|packed| packed.number.is_none()) {
            assert_eq!((packed.batch.predictions(), packed.batch.rows), (0, 2));
        }
        batches.retain(|packed| packed.number.is_some());
        batches.sort_by_key(|packed| packed.number);
        batches
    };
    assert!(taken.iter().all(|rank| rank.len() == count));
    ((0..count).map(step).collect(), Snapshot::merged(snapshots).unwrap())
}

/// Written out, because NaN is not equal to itself.
fn shown(steps: &[Vec<PackedBatch>]) -> Vec<String> {
    steps.iter().map(|step| format!("{step:?}")).collect()
}

#[test]
fn the_order_of_micro_batches_is_the_same_on_any_number_of_ranks_and_after_any_resume() {
    for (lengths, micro_batches) in [
        (&[90, 90, 90, 90, 90, 90][..], 6),
        (&[200, 3, 0, 60, 61, 120][..], 6),
        (&[0, 0, 0, 0, 0, 40][..], 12),
        (&[31, 2, 90, 7, 55, 4][..], 18),
    ] {
        let lanes = Lanes::new(lengths);
        let (whole, _) = run(&lanes, micro_batches, 1, None, usize::MAX);
        let mut ids: Vec<_> =
            whole.iter().flatten().flat_map(|packed| packed.rows.iter().flatten()).collect();
        ids.sort_by_key(|piece| piece.document.id().to_owned());
        let all: usize = lengths.iter().sum();
        assert_eq!(ids.len(), all, "every document once; none is longer than a row");
        for ranks in [2, 3, 6] {
            assert_eq!(
                shown(&run(&lanes, micro_batches, ranks, None, usize::MAX).0),
                shown(&whole),
                "{ranks} ranks"
            );
        }
        for stop in 0..whole.len() {
            let ranks = [1, 2, 3, 6][stop % 4];
            let (before, snapshot) = run(&lanes, micro_batches, ranks, None, stop);
            let snapshot = Snapshot::from_bytes(&snapshot.to_bytes().unwrap()).unwrap();
            snapshot.check(1_000_000).unwrap();
            let others = [3, 6, 1, 2][stop % 4];
            let (after, _) = run(&lanes, micro_batches, others, Some(&snapshot), usize::MAX);
            let both = [shown(&before), shown(&after)].concat();
            assert_eq!(both, shown(&whole), "{ranks} ranks, and {others} after step {stop}");
        }
    }
}

#[test]
fn lanes_take_turns() {
    let (steps, _) = run(&Lanes::new(&[300, 300, 300]), 4, 1, None, 3);
    let lanes: Vec<usize> = steps.iter().flatten().map(|packed| packed.lane).collect();
    assert_eq!(lanes, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]);
    let numbers: Vec<Option<usize>> = steps[1].iter().map(|packed| packed.number).collect();
    assert_eq!(numbers, [Some(0), Some(1), Some(2), Some(3)]);
}

#[test]
fn a_stop_takes_nothing_and_what_was_put_back_comes_again() {
    let lanes = Lanes::new(&[120, 120]);
    let (whole, _) = run(&lanes, 2, 1, None, usize::MAX);
    for stop_after in 0..80 {
        let stopping = Lanes { stop_after, ..lanes.clone() };
        let mut first = feed(&stopping, 2, Shard::WHOLE, None);
        let mut taken = Vec::new();
        loop {
            match first.next_step(&mut Alone).unwrap() {
                Step::Batches(batches) => {
                    first.put_back(batches);
                    let Step::Batches(again) = first.next_step(&mut Alone).unwrap() else {
                        panic!("they were there")
                    };
                    taken.push(again);
                }
                Step::Stopped => break,
                Step::Ended => panic!("{stop_after} documents are not all"),
            }
        }
        let (after, _) = run(&lanes, 2, 1, Some(&first.snapshot()), usize::MAX);
        assert_eq!([shown(&taken), shown(&after)].concat(), shown(&whole), "stopped after {stop_after}");
    }
}

#[test]
fn a_rank_that_fails_or_stops_is_heard_of_by_the_others() {
    for (is_failure, said) in [(true, "another rank of the group has failed"), (false, "")] {
        let meeting = (Arc::new(Barrier::new(2)), Arc::new(Mutex::new(vec![])));
        let of_rank = |rank: usize| {
            let (barrier, values) = meeting.clone();
            std::thread::spawn(move || {
                let limit = if rank == 1 { 20 } else { usize::MAX };
                let (stop_after, fail_after) =
                    if is_failure { (usize::MAX, limit) } else { (limit, usize::MAX) };
                let lanes = Lanes { stop_after, fail_after, ..Lanes::new(&[500, 500]) };
                let mut feed = feed(&lanes, 2, Shard::new(rank, 2).unwrap(), None);
                let mut group = Meeting { barrier, values };
                loop {
                    match feed.next_step(&mut group) {
                        Ok(Step::Batches(_)) => {}
                        Ok(Step::Stopped) => return String::new(),
                        Ok(Step::Ended) => panic!("500 documents are not all"),
                        Err(error) => return error.to_string(),
                    }
                }
            })
        };
        let threads: Vec<_> = (0..2).map(of_rank).collect();
        let ends: Vec<String> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(ends[0].contains(said), "{ends:?}");
        assert_eq!(ends[1].is_empty(), !is_failure, "{ends:?}");
    }
}

/// Lanes of which each holds documents of a reference model of its own.
struct Scored {
    lanes: Lanes,
    shown: usize,
    takes_several: bool,
}

impl DocumentStream for Scored {
    fn lanes(&self) -> usize {
        self.lanes.lanes()
    }

    fn next_document(&mut self, lane: usize) -> Result<Next, StreamError> {
        self.shown = lane;
        self.lanes.next_document(lane)
    }

    fn position(&self, lane: usize) -> Position {
        self.lanes.position(lane)
    }

    fn contexts(&self) -> Contexts {
        let context = ContextPolicy { window: 8, stride: 4, bos: Bos::None };
        self.reference_model().map(|model| (model, context)).into_iter().collect()
    }

    fn reference_model(&self) -> Option<Fingerprint> {
        Some(Fingerprint::of_bytes(&[self.shown as u8]))
    }

    fn takes_several_models(&self) -> bool {
        self.takes_several
    }
}

#[test]
fn ranks_that_saw_another_one_of_several_models_each_leave_one_checkpoint() {
    let merged = |takes_several| {
        let part = |rank| {
            let lanes = Lanes::new(&[90, 90]);
            let stream = Box::new(Scored { lanes, shown: 0, takes_several });
            let shard = Shard::new(rank, 2).unwrap();
            let mut feed = Feed::over(stream, plan(2), shard, None, Fingerprint::of_bytes(b"t"));
            feed.fill().unwrap();
            feed.snapshot()
        };
        Snapshot::merged(vec![part(0), part(1)])
    };
    let whole = merged(true).unwrap();
    assert_eq!((whole.identity.reference_model, whole.contexts.len()), (None, 2));
    let refused = merged(false).unwrap_err();
    assert!(refused.to_string().contains("the reference model differs"), "{refused}");
}

#[test]
fn ranks_refuse_together_what_one_would_have_refused_alone() {
    for takes_several in [false, true] {
        let meeting = (Arc::new(Barrier::new(2)), Arc::new(Mutex::new(vec![])));
        let of_rank = |rank: usize| {
            let (barrier, values) = meeting.clone();
            std::thread::spawn(move || {
                let stream = Box::new(Scored { lanes: Lanes::new(&[90, 90]), shown: 0, takes_several });
                let shard = Shard::new(rank, 2).unwrap();
                let mut feed = Feed::over(stream, plan(2), shard, None, Fingerprint::of_bytes(b"t"));
                feed.next_step(&mut Meeting { barrier, values })
            })
        };
        let threads: Vec<_> = (0..2).map(of_rank).collect();
        for thread in threads {
            match thread.join().unwrap() {
                Ok(step) => assert!(takes_several && matches!(step, Step::Batches(_))),
                Err(error) => assert!(!takes_several && matches!(error, StreamError::SeveralReferences)),
            }
        }
    }
}
