//! Faults, drawn from a seed.

use std::time::Duration;

use crate::End;

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL to a daemon, which is started again.
    KillDaemon(usize),
    /// SIGSTOP to a daemon for longer than its session, then SIGCONT; others go on meanwhile.
    PauseDaemon(usize),
    /// SIGKILL to a daemon, which is started again when its open transaction has been given up.
    LoseDaemon(usize),
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
    /// SIGSTOP to a broker for so long, then SIGCONT.
    FreezeBroker(usize, Duration),
    /// A broker has no room for a record any more, ends, and is started where it has.
    FillDisk(usize),
    /// Leaders, those of the coordinators among them, are elected three times.
    MoveLeaders,
    /// What the transactions' coordinator is asked is kept back for so long, and comes late.
    HideCoordinator(Duration),
    /// Each frame between daemons and brokers is on its way for so long.
    DelayNetwork(Duration),
    /// Nothing passes between daemons and brokers for so long.
    SilenceNetwork(Duration),
    /// Connections between daemons and brokers are cut.
    CutNetwork,
    /// One direction of the connections between daemons and brokers is closed.
    HalfCloseNetwork(End),
    /// What is committed is removed from the documents topic.
    TrimRead,
    /// Records are removed from the documents topic before they were read; a person decides where to go on.
    TrimUnread,
    /// The topics get a partition more.
    AddPartition,
    /// Records that nobody can score.
    Poison,
}

/// A kind of fault, how often it is drawn among hundred, and how it is made.
type Kind = (usize, fn(&mut Draw) -> Fault);

const ALONE: [Kind; 19] = [
    (20, |draw| Fault::KillDaemon(draw.daemon())),
    (5, |draw| Fault::PauseDaemon(draw.daemon())),
    (2, |draw| Fault::LoseDaemon(draw.daemon())),
    (12, |draw| Fault::StopDaemon(draw.daemon())),
    (4, |_| Fault::JoinAndLeave),
    (3, |_| Fault::RebalanceStorm),
    (3, |draw| Fault::RestartBroker(draw.broker())),
    (3, |draw| Fault::KillBroker(draw.broker())),
    (4, |draw| Fault::FreezeBroker(draw.broker(), draw.millis(500..6000))),
    (2, |draw| Fault::FillDisk(draw.broker())),
    (4, |draw| Fault::HideCoordinator(draw.millis(1000..8000))),
    (5, |draw| Fault::DelayNetwork(draw.millis(20..200))),
    (4, |draw| Fault::SilenceNetwork(draw.millis(500..7000))),
    (9, |_| Fault::CutNetwork),
    (8, |draw| Fault::HalfCloseNetwork(if draw.random.bool() { End::Client } else { End::Broker })),
    (4, |_| Fault::TrimRead),
    (1, |_| Fault::TrimUnread),
    (1, |_| Fault::AddPartition),
    (6, |_| Fault::Poison),
];
/// Of brokers that copy each other's records.
const AMONG_SEVERAL: [Kind; 1] = [(6, |_| Fault::MoveLeaders)];

/// What faults are drawn with.
struct Draw {
    random: fastrand::Rng,
    daemons: usize,
    brokers: usize,
}

impl Draw {
    fn daemon(&mut self) -> usize {
        self.random.usize(..self.daemons)
    }

    fn broker(&mut self) -> usize {
        self.random.usize(1..=self.brokers)
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.random.u64(range))
    }
}

/// A source of faults: each kind once, in an order of its own, and then as often as its kind is due.
pub struct Faults {
    draw: Draw,
    kinds: Vec<Kind>,
    /// Those that have not come yet.
    first: Vec<Kind>,
}

impl Faults {
    /// The schedule of `seed` for `daemons` daemons and `brokers` brokers.
    pub fn new(seed: u64, daemons: usize, brokers: usize) -> Self {
        let mut draw = Draw { random: fastrand::Rng::with_seed(seed), daemons, brokers };
        let mut kinds = ALONE.to_vec();
        if brokers > 1 {
            kinds.extend(AMONG_SEVERAL);
        }
        let mut first = kinds.clone();
        draw.random.shuffle(&mut first);
        Self { draw, kinds, first }
    }

    /// The next one.
    pub fn draw(&mut self) -> Fault {
        if let Some((_, make)) = self.first.pop() {
            return make(&mut self.draw);
        }
        let shares: usize = self.kinds.iter().map(|(share, _)| share).sum();
        let mut ticket = self.draw.random.usize(..shares);
        let mut kinds = self.kinds.iter();
        loop {
            let (share, make) = kinds.next().expect("the ticket is below the sum of all shares");
            if ticket < *share {
                return make(&mut self.draw);
            }
            ticket -= share;
        }
    }

    /// Kinds that there are.
    pub fn kinds(brokers: usize) -> usize {
        ALONE.len() + if brokers > 1 { AMONG_SEVERAL.len() } else { 0 }
    }

    /// A span of time within these milliseconds.
    pub fn span(&mut self, millis: std::ops::Range<u64>) -> Duration {
        self.draw.millis(millis)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.draw.random.usize(..end)
    }
}

impl Fault {
    /// Whether it disturbs members of the group, for whose sessions others may have to wait.
    pub fn is_of_daemons(self) -> bool {
        matches!(
            self,
            Self::KillDaemon(_)
                | Self::PauseDaemon(_)
                | Self::LoseDaemon(_)
                | Self::StopDaemon(_)
                | Self::JoinAndLeave
                | Self::RebalanceStorm
                | Self::TrimUnread
        )
    }

    /// Its name, without what was drawn with it.
    pub fn kind(self) -> String {
        let whole = format!("{self:?}");
        whole.split('(').next().unwrap_or_default().to_owned()
    }
}
