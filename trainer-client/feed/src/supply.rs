//! The micro-batches of one step after the other, from the streams of all ranks.
//!
//! A rank is one of several equal parts of the data, as in data-parallel training: it reads partitions of its own and has
//! a shuffle buffer and a packer of its own. All ranks of a run live in one process, which adds up their gradients.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::pack::{BatchShape, PackedBatch, Packer, Packing};
use crate::picture::PictureDocuments;
use crate::random::SplitMix64;
use crate::shuffle::ShuffleBuffer;
use crate::snapshot::{RankSnapshot, Snapshot};
use crate::stream::{DocumentStream, Position, StreamError};
use crate::telemetry::Buffered;

/// Packs the documents of every rank's stream.
#[derive(Debug)]
pub struct Supply {
    ranks: Vec<Rank>,
    picture: PictureDocuments,
}

#[derive(Debug)]
struct Rank {
    shuffle: ShuffleBuffer,
    packer: Packer,
    /// Documents packed so far; for a resumed run enough of them.
    documents: usize,
    has_ended: bool,
}

/// How a supply makes micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SupplyPlan {
    /// Shape of a micro-batch.
    pub shape: BatchShape,
    /// What is done where documents meet.
    pub packing: Packing,
    /// Documents in each rank's shuffle buffer; at most 1 leaves the streams' order as it is.
    pub shuffle_buffer: usize,
    /// Seed of the buffers' draws.
    pub seed: u64,
}

impl Supply {
    /// A supply for as many ranks as the snapshot has, holding what it holds.
    pub fn new(plan: &SupplyPlan, snapshot: Snapshot) -> Self {
        let rank = |(number, rank): (u64, RankSnapshot)| Rank {
            documents: if rank.position == Position::default() { 0 } else { usize::MAX },
            shuffle: ShuffleBuffer::new(plan.shuffle_buffer, SplitMix64::keyed(plan.seed, number).next_u64())
                .holding(rank.shuffled, rank.draws),
            packer: Packer::new(plan.shape).packing(plan.packing).holding(rank.finished, rank.open),
            has_ended: false,
        };
        Self { ranks: (0..).zip(snapshot.ranks).map(rank).collect(), picture: snapshot.picture }
    }

    /// The micro-batches of a step: `accumulate` of each rank, in the order of the ranks. A rank whose stream has
    /// ended gives what it has left, the last of them perhaps with fewer rows, and then none. When `stop` is set there are
    /// none at all, and nothing is taken.
    ///
    /// # Panics
    /// When there are not as many streams as ranks.
    pub fn next_batches(
        &mut self,
        streams: &mut [&mut dyn DocumentStream],
        accumulate: usize,
        stop: &AtomicBool,
    ) -> Result<Vec<PackedBatch>, StreamError> {
        assert_eq!(streams.len(), self.ranks.len(), "one stream a rank");
        // Nothing is taken before every rank has what it needs, so that an error or a stop loses nothing.
        for (rank, stream) in self.ranks.iter_mut().zip(streams) {
            // At first a document of every part, so that no step is taken before each has shown that it fits the run.
            let parts = stream.parts();
            while !rank.has_ended && (rank.documents < parts || !rank.packer.fills(accumulate)) {
                match rank.shuffle.next_document(*stream, stop)? {
                    Some(document) => {
                        self.picture.offer(&document);
                        rank.packer.push(&document);
                        rank.documents = rank.documents.saturating_add(1);
                    }
                    None if stop.load(Ordering::Relaxed) => return Ok(vec![]),
                    None => rank.has_ended = true,
                }
            }
        }
        let mut batches = Vec::with_capacity(accumulate * self.ranks.len());
        for (number, rank) in self.ranks.iter_mut().enumerate() {
            for _ in 0..accumulate {
                let packed = if rank.has_ended { rank.packer.flush() } else { rank.packer.next_batch() };
                batches.extend(packed.map(|packed| PackedBatch { rank: number, ..packed }));
            }
        }
        Ok(batches)
    }

    /// Takes back the micro-batches given out last.
    pub fn put_back(&mut self, batches: Vec<PackedBatch>) {
        for packed in batches.into_iter().rev() {
            self.ranks[packed.rank].packer.put_back(packed);
        }
    }

    /// Documents that wait here; a document in several pieces counts as often.
    pub fn buffered(&self) -> Buffered {
        let pieces =
            |rank: &Rank| rank.packer.finished().map(<[_]>::len).sum::<usize>() + rank.packer.open().len();
        Buffered {
            shuffle: self.ranks.iter().map(|rank| rank.shuffle.documents().len()).sum(),
            packing: self.ranks.iter().map(pieces).sum(),
        }
    }

    /// Documents chosen for the token picture so far.
    pub fn picture(&self) -> &PictureDocuments {
        &self.picture
    }

    /// Everything read and not given out, with the places of the streams that it was read from.
    pub fn snapshot(&self, streams: &[&mut dyn DocumentStream], sources: &[String]) -> Snapshot {
        let pairs = self.ranks.iter().zip(streams);
        let ranks = pairs.map(|(rank, stream)| RankSnapshot {
            position: stream.position(),
            draws: rank.shuffle.draws(),
            shuffled: rank.shuffle.documents().to_vec(),
            finished: rank.packer.finished().map(<[_]>::to_vec).collect(),
            open: rank.packer.open().to_vec(),
        });
        Snapshot {
            ranks: ranks.collect(),
            sources: sources.to_vec(),
            picture: self.picture.clone(),
            contexts: streams.iter().flat_map(|stream| stream.contexts()).collect(),
        }
    }
}

/// Micro-batches of this shape that a stream fills, counted by packing it.
pub fn count_batches(stream: &mut dyn DocumentStream, shape: BatchShape) -> Result<u64, StreamError> {
    let mut packer = Packer::new(shape);
    let mut batches = 0;
    while let Some(document) = stream.next_document()? {
        packer.push(&document);
        while packer.next_batch().is_some() {
            batches += 1;
        }
    }
    while packer.flush().is_some() {
        batches += 1;
    }
    Ok(batches)
}
