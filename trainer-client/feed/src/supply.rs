//! The micro-batches of one step after the other, from lanes.
//!
//! A lane is a partition of the topic with all that belongs to it: how far it has been read, its share of the shuffle
//! buffer, and its packer. Lanes are dealt to ranks, and micro-batches are numbered over lanes ([`crate::turns`]), so
//! neither a micro-batch nor its number depends on how many ranks there are.

use std::collections::BTreeMap;

use crate::batch::PackedBatch;
use crate::pack::{Packer, empty_batch};
use crate::plan::Plan;
use crate::random::SplitMix64;
use crate::shuffle::ShuffleBuffer;
use crate::snapshot::{LaneSnapshot, Snapshot};
use crate::stream::{DocumentStream, Next, Shard, StreamError};
use crate::turns::{Outlook, RankState, Turns};

/// What the ranks' outlooks on the next step come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agreed {
    /// Every rank has what it needs: [`Supply::take`] gives the step's micro-batches.
    Ready,
    /// A lane has ended, so others must give more, or a rank still waits for documents: fill and agree once more.
    Again,
    /// All lanes have ended and nothing is left of them.
    Ended,
    /// A rank was asked to stop; nothing has been taken.
    Stopped,
    /// A rank has failed.
    Failed,
    /// Ranks have read documents of different references, which no step may learn from together.
    SeveralReferences,
}

/// Documents that were read and not yet given out, by where they wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffered {
    /// In shuffle buffers.
    pub shuffle: usize,
    /// As pieces in the packers.
    pub packing: usize,
}

/// Packs the documents of a rank's lanes.
#[derive(Clone, Debug)]
pub struct Supply {
    plan: Plan,
    shard: Shard,
    turns: Turns,
    /// The turns before the micro-batches given out last.
    before: Option<Turns>,
    /// Steps whose micro-batches were given out.
    step: u64,
    /// The rank's own lanes, by number.
    lanes: BTreeMap<usize, Lane>,
}

#[derive(Clone, Debug)]
struct Lane {
    shuffle: ShuffleBuffer,
    packer: Packer,
    /// Whether a document has shown that the lane fits the run; true of one that is gone on with.
    has_shown: bool,
    has_ended: bool,
}

impl Lane {
    /// Whether it has what a step takes that `count` of its micro-batches are for, or will never have more.
    fn is_ready(&self, count: usize) -> bool {
        self.has_ended || (self.has_shown && self.packer.fills(count))
    }
}

impl Supply {
    /// The supply of a rank that reads `lanes` lanes together with others, from the start of the run, or from where a
    /// snapshot stands.
    pub fn new(plan: Plan, shard: Shard, lanes: usize, snapshot: Option<&Snapshot>) -> Self {
        let none = BTreeMap::new();
        let held = snapshot.map_or(&none, |snapshot| &snapshot.held);
        let (turn, step) = snapshot.map_or((0, 0), |snapshot| (snapshot.turn, snapshot.step));
        let buffer = plan.shuffle_buffer_of_lane(lanes);
        let lane = |number: usize| {
            let seed = SplitMix64::keyed(plan.seed, number as u64).next_u64();
            let (shuffle, packer) =
                (ShuffleBuffer::new(buffer, seed), Packer::new(plan.shape).packing(plan.packing));
            let lane = match held.get(&number).cloned() {
                None => Lane { shuffle, packer, has_shown: false, has_ended: false },
                Some(LaneSnapshot { position, draws, shuffled, finished, waiting }) => Lane {
                    shuffle: shuffle.holding(shuffled, draws),
                    packer: packer.holding(finished, waiting),
                    has_shown: position.documents > 0,
                    has_ended: false,
                },
            };
            (number, lane)
        };
        let own = shard.own(lanes).map(lane).collect();
        Self { turns: Turns::new(lanes, turn), before: None, step, lanes: own, plan, shard }
    }

    /// Reads until the rank's lanes have what the next step takes of them, as far as is known of the other ranks' lanes,
    /// and before the first step a document of each, so that no step is taken before every lane has shown that it fits the
    /// run. What a lane holds is not changed by a stop or an error in another one.
    pub fn fill(&mut self, stream: &mut dyn DocumentStream) -> Result<Outlook, StreamError> {
        let wanted = self.turns.lanes_of_next(self.plan.micro_batches);
        let lanes = self.turns.lanes();
        for (&number, lane) in &mut self.lanes {
            let count = wanted.iter().filter(|&&wanted| wanted == number).count();
            while !lane.is_ready(count) {
                match lane.shuffle.next_document(|| stream.next_document(number))? {
                    Next::Document(document) => {
                        lane.packer.push(&document);
                        lane.has_shown = true;
                    }
                    Next::Ended => {
                        lane.packer.close();
                        lane.has_ended = true;
                    }
                    Next::Stopped => return Ok(Outlook::new(RankState::Stopped, lanes, std::iter::empty())),
                }
            }
        }
        let ended = self.lanes.iter().filter(|(_, lane)| lane.has_ended);
        let left = ended.map(|(&number, lane)| (number, lane.packer.batches()));
        Ok(Outlook::new(RankState::Well, lanes, left))
    }

    /// Takes in what the outlooks of all ranks come to.
    pub fn agree(&mut self, outlook: &Outlook) -> Agreed {
        match outlook.state() {
            RankState::Failed => return Agreed::Failed,
            RankState::Stopped => return Agreed::Stopped,
            // What lanes have left is not known of all ranks.
            RankState::Waiting => return Agreed::Again,
            RankState::Well if outlook.has_several_references() => return Agreed::SeveralReferences,
            RankState::Well => {}
        }
        if self.turns.learn(outlook) {
            Agreed::Again
        } else if self.turns.lanes_of_next(1).is_empty() {
            Agreed::Ended
        } else {
            Agreed::Ready
        }
    }

    /// The rank's micro-batches of the next step, once all ranks are [`Agreed::Ready`]. At the end of the data they may be
    /// fewer, the last of a lane perhaps with fewer rows; but every rank is given as many as any other, and has some
    /// without tokens for it.
    pub fn take(&mut self) -> Vec<PackedBatch> {
        self.before = Some(self.turns.clone());
        let turns = self.turns.take(self.plan.micro_batches);
        self.step += 1;
        let mut of_ranks = vec![0; self.shard.world_size()];
        let mut taken = Vec::new();
        for (number, &lane) in turns.iter().enumerate() {
            of_ranks[self.shard.rank_of(lane)] += 1;
            if let Some(own) = self.lanes.get_mut(&lane) {
                let packed = own.packer.next_batch();
                taken.extend(packed.map(|packed| PackedBatch { lane, number: Some(number), ..packed }));
            }
        }
        taken.resize_with(of_ranks.into_iter().max().unwrap_or(0), || empty_batch(self.plan.shape));
        taken
    }

    /// Takes back the micro-batches given out last.
    pub fn put_back(&mut self, batches: Vec<PackedBatch>) {
        for packed in batches.into_iter().rev().filter(|packed| packed.number.is_some()) {
            if let Some(lane) = self.lanes.get_mut(&packed.lane) {
                lane.packer.put_back(packed);
            }
        }
        if let Some(before) = self.before.take() {
            self.turns = before;
            self.step -= 1;
        }
    }

    /// How the micro-batches are made.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Steps whose micro-batches were given out since the start of the run.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The lane whose turn is next.
    pub fn turn(&self) -> usize {
        self.turns.next()
    }

    /// Lanes of all ranks.
    pub fn lanes(&self) -> usize {
        self.turns.lanes()
    }

    /// Documents that wait here; a document in several pieces counts as often.
    pub fn buffered(&self) -> Buffered {
        let pieces =
            |lane: &Lane| lane.packer.finished().map(<[_]>::len).sum::<usize>() + lane.packer.waiting().len();
        Buffered {
            shuffle: self.lanes.values().map(|lane| lane.shuffle.documents().len()).sum(),
            packing: self.lanes.values().map(pieces).sum(),
        }
    }

    /// Documents handed out by the stream to the rank's lanes since the start of the run.
    pub fn documents(&self, stream: &dyn DocumentStream) -> u64 {
        self.lanes.keys().map(|&lane| stream.position(lane).documents).sum()
    }

    /// Everything read by the rank's lanes and not given out, with the places that it was read up to.
    pub fn snapshot(&self, stream: &dyn DocumentStream) -> BTreeMap<usize, LaneSnapshot> {
        let snapshot = |(&number, lane): (&usize, &Lane)| {
            let lane = LaneSnapshot {
                position: stream.position(number),
                draws: lane.shuffle.draws(),
                shuffled: lane.shuffle.documents().to_vec(),
                finished: lane.packer.finished().map(<[_]>::to_vec).collect(),
                waiting: lane.packer.waiting().cloned().collect(),
            };
            (number, lane)
        };
        self.lanes.iter().map(snapshot).collect()
    }
}

#[cfg(test)]
#[path = "supply_tests.rs"]
mod tests;
