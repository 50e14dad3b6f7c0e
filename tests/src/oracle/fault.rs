//! Faults, drawn from a seed.

use std::time::Duration;

use super::load::Load;
use super::slot::Slot;
use crate::Kafka;

/// Longer than the group's session timeout, so that a paused daemon is thrown out and comes back as a zombie.
const ZOMBIE: Duration = Duration::from_secs(9);
const POISON: usize = 16;
/// Daemons that join in a storm.
const STORM: usize = 3;

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL to a daemon, which is started again.
    KillDaemon(usize),
    /// SIGSTOP to a daemon for longer than its session, then SIGCONT.
    PauseDaemon(usize),
    /// SIGTERM to a daemon, which must drain and exit 0, and is started again.
    StopDaemon(usize),
    /// One more daemon joins the group and leaves it.
    JoinAndLeave,
    /// Several daemons join the group and leave it, faster than it settles.
    RebalanceStorm,
    /// A broker is asked to stop, and started.
    RestartBroker(usize),
    /// SIGKILL to a broker, which is started again.
    KillBroker(usize),
    /// Records that nobody can score.
    Poison,
}

/// A source of faults.
pub struct Faults {
    random: fastrand::Rng,
}

impl Faults {
    /// The schedule of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed) }
    }

    /// The next fault among `daemons` daemons and `brokers` brokers.
    pub fn next(&mut self, daemons: usize, brokers: usize) -> Fault {
        let daemon = self.random.usize(..daemons);
        let broker = self.random.usize(1..=brokers);
        match self.random.u8(..20) {
            0..6 => Fault::KillDaemon(daemon),
            6..9 => Fault::PauseDaemon(daemon),
            9..12 => Fault::StopDaemon(daemon),
            12 => Fault::JoinAndLeave,
            13 => Fault::RebalanceStorm,
            14..16 => Fault::RestartBroker(broker),
            16..18 => Fault::KillBroker(broker),
            _ => Fault::Poison,
        }
    }

    fn wait(&mut self, milliseconds: std::ops::Range<u64>) {
        std::thread::sleep(Duration::from_millis(self.random.u64(milliseconds)));
    }

    /// Does it, and waits a moment of random length afterwards.
    pub fn inject(&mut self, fault: Fault, kafka: &Kafka, slots: &mut [Slot], load: &Load) {
        match fault {
            Fault::KillDaemon(index) => {
                slots[index].signal("KILL");
                self.wait(100..1500);
            }
            Fault::PauseDaemon(index) => {
                slots[index].signal("STOP");
                std::thread::sleep(ZOMBIE);
                slots[index].signal("CONT");
            }
            Fault::StopDaemon(index) => slots[index].terminate(),
            Fault::JoinAndLeave => {
                let mut extra = slots[0].sibling(slots.len());
                self.wait(2000..5000);
                extra.terminate();
            }
            Fault::RebalanceStorm => {
                let first = slots.len();
                let mut extras = Vec::new();
                for index in first..first + STORM {
                    extras.push(slots[0].sibling(index));
                    self.wait(100..1000);
                }
                for mut extra in extras {
                    extra.terminate();
                }
            }
            Fault::RestartBroker(node) => {
                kafka.stop(node);
                self.wait(200..3000);
                kafka.start_again();
            }
            Fault::KillBroker(node) => {
                kafka.kill(node);
                self.wait(200..3000);
                kafka.start_again();
            }
            Fault::Poison => load.poison(POISON),
        }
        self.wait(300..2500);
    }
}
