//! How each fault is brought about.

use std::time::Duration;

use super::crew::Crew;
use super::fault::{Fault, Faults};
use super::load::Load;
use super::options::{SESSION, TRANSACTION};
use super::topics::{PARTITIONS_MAX, Topics};
use super::watch::Watch;
use crate::{Group, Kafka, Proxy, Request};

/// Longer than the session, so that a paused daemon is thrown out and comes back as a zombie.
const ZOMBIE: Duration = SESSION.saturating_add(Duration::from_millis(2500));
/// Longer than the open transaction of a daemon that is lost.
const LOSS: Duration = TRANSACTION.saturating_add(Duration::from_secs(4));
const POISON: usize = 16;
/// Daemons that join in a storm.
const STORM: usize = 3;
const ELECTIONS: usize = 3;
/// What a full disk has room for: less than a batch of records has beside its own header.
const ROOM: u64 = 100;

/// All that a fault may act on.
pub struct Scene<'a> {
    pub(super) kafka: &'a Kafka,
    pub(super) proxy: &'a Proxy,
    pub(super) topics: &'a Topics,
    pub(super) load: &'a Load,
    pub(super) watch: &'a Watch,
    pub(super) crew: Crew,
    /// Gaps that were made, and those of which a daemon has not said all that it should have.
    pub(super) gaps: usize,
    pub(super) unsaid: Vec<String>,
}

impl Scene<'_> {
    /// Does it, and waits a moment of random length afterwards.
    pub fn inject(&mut self, fault: Fault, faults: &mut Faults) {
        self.act(fault, faults);
        if fault.is_of_daemons() {
            self.watch.disturb();
        }
        self.crew.wait(faults.span(100..900));
    }

    fn act(&mut self, fault: Fault, faults: &mut Faults) {
        match fault {
            Fault::KillDaemon(index) => {
                self.crew.settle_one(index);
                self.crew.slot(index).kill();
            }
            Fault::PauseDaemon(index) => {
                // One at a time: with all of them away nothing could be expected of anybody.
                self.crew.settle();
                self.crew.slot(index).pause(ZOMBIE);
            }
            Fault::LoseDaemon(index) => {
                self.crew.settle();
                self.crew.slot(index).lose(LOSS);
            }
            Fault::StopDaemon(index) => {
                self.crew.settle_one(index);
                self.crew.slot(index).terminate();
            }
            Fault::JoinAndLeave => {
                let stranger = self.crew.stranger(0);
                self.watch.disturb();
                self.crew.wait(faults.span(1500..4000));
                self.crew.take_leave(stranger);
            }
            Fault::RebalanceStorm => {
                let mut strangers = Vec::new();
                for number in 0..STORM {
                    strangers.push(self.crew.stranger(number));
                    self.watch.disturb();
                    self.crew.wait(faults.span(100..800));
                }
                for stranger in strangers {
                    // One that leaves while it joins is missed only when its session is over.
                    self.crew.take_leave(stranger);
                    self.watch.disturb();
                }
            }
            Fault::Poison => self.load.poison(POISON),
            Fault::TrimRead => self.trim_read(),
            Fault::TrimUnread => self.make_gap(faults),
            Fault::AddPartition => self.add_partition(),
            Fault::CutNetwork => self.proxy.cut(),
            Fault::HalfCloseNetwork(end) => self.proxy.half_close(end),
            Fault::MoveLeaders => self.move_leaders(faults),
            Fault::RestartBroker(_)
            | Fault::KillBroker(_)
            | Fault::FreezeBroker(..)
            | Fault::FillDisk(_)
            | Fault::HideCoordinator(_)
            | Fault::DelayNetwork(_)
            | Fault::SilenceNetwork(_) => self.outage(fault, faults),
        }
    }

    /// A fault of the brokers or of the way to them, during which nothing is expected to come out.
    fn outage(&mut self, fault: Fault, faults: &mut Faults) {
        let (kafka, proxy) = (self.kafka, self.proxy);
        let down = faults.span(200..2000);
        let watch = self.watch;
        watch.unwell(|| {
            self.crew.during(|| {
                match fault {
                    Fault::RestartBroker(node) => {
                        kafka.stop(node);
                        std::thread::sleep(down);
                        kafka.start_again();
                    }
                    Fault::KillBroker(node) => {
                        kafka.kill(node);
                        std::thread::sleep(down);
                        kafka.start_again();
                    }
                    Fault::FillDisk(node) => {
                        kafka.fill_disk(node, ROOM);
                        std::thread::sleep(down);
                        kafka.start_again();
                    }
                    Fault::FreezeBroker(node, length) => {
                        let frozen = kafka.freeze(node);
                        std::thread::sleep(length);
                        drop(frozen);
                    }
                    Fault::HideCoordinator(length) => {
                        for kind in Request::OF_COORDINATOR {
                            proxy.hold(kind);
                        }
                        std::thread::sleep(length);
                        proxy.let_go(&Request::OF_COORDINATOR);
                    }
                    Fault::DelayNetwork(delay) => {
                        proxy.set_delay(delay);
                        std::thread::sleep(Duration::from_secs(2) + down);
                        proxy.set_delay(Duration::ZERO);
                    }
                    Fault::SilenceNetwork(length) => {
                        proxy.set_silent(true);
                        std::thread::sleep(length);
                        proxy.set_silent(false);
                    }
                    _ => unreachable!("{fault:?} is no outage"),
                }
                kafka.wait_until_well();
            });
        });
    }

    fn move_leaders(&mut self, faults: &mut Faults) {
        let (kafka, mut moved) = (self.kafka, 0);
        for _ in 0..ELECTIONS {
            let shift = faults.below(kafka.brokers);
            moved += self.crew.during(|| {
                kafka.elect(|topic, partition| {
                    ((topic.len() + partition as usize + shift) % kafka.brokers) as i32 + 1
                })
            });
            self.crew.wait(faults.span(50..500));
        }
        eprintln!("{moved} leaders moved");
    }

    fn trim_read(&self) {
        let topic = &self.topics.documents;
        // While an open transaction holds an offset up, nobody says what is committed.
        let Some(places) = Group::new(self.kafka, &self.topics.group, topic).places() else { return };
        let before: Vec<(i32, i64)> =
            places.iter().map(|(&partition, place)| (partition, place.committed)).collect();
        self.kafka.remove_records_of(topic, &before);
    }

    fn add_partition(&self) {
        let has = |topic: &str| self.kafka.leaders().keys().filter(|(name, _)| name == topic).count();
        let partitions = has(&self.topics.documents);
        if partitions < PARTITIONS_MAX {
            // Where they come out first, so that a partition and what is scored of it have one number.
            self.kafka.grow_topic(&self.topics.scored, partitions + 1);
            self.kafka.grow_topic(&self.topics.documents, partitions + 1);
        }
    }
}
