//! Faults, drawn from a seed.

use std::time::Duration;

use super::load::Load;
use super::slot::Slot;
use crate::Kafka;

/// Longer than the group's session timeout, so that a paused daemon is thrown out and comes back as a zombie.
const ZOMBIE: Duration = Duration::from_secs(9);
const POISON: usize = 15;

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
    /// The broker is asked to stop, and started.
    RestartBroker,
    /// SIGKILL to the broker, which is started again.
    KillBroker,
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

    /// The next fault among `daemons` daemons.
    pub fn next(&mut self, daemons: usize) -> Fault {
        let daemon = self.random.usize(..daemons);
        match self.random.u8(..20) {
            0..6 => Fault::KillDaemon(daemon),
            6..9 => Fault::PauseDaemon(daemon),
            9..12 => Fault::StopDaemon(daemon),
            12..14 => Fault::JoinAndLeave,
            14..16 => Fault::RestartBroker,
            16..18 => Fault::KillBroker,
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
            Fault::RestartBroker => {
                kafka.command("stop");
                self.wait(200..3000);
                kafka.command("start");
            }
            Fault::KillBroker => {
                kafka.command("kill");
                self.wait(200..3000);
                kafka.command("start");
            }
            Fault::Poison => load.poison(POISON),
        }
        self.wait(300..2500);
    }
}
