//! The oracle: documents with known ids and known losses, daemons on a real Kafka, a seeded schedule of faults, and
//! afterwards a look at what a `read_committed` reader finds.
//!
//! Every document that the broker has acknowledged is an obligation: exactly once in the union of the scored and the
//! dead-letter topic, with the losses of a clean run to the last bit, in the order of its key. Not so what was removed from
//! the log before anybody read it: of that a daemon must have said how many there were. Another reader looks at what comes
//! out meanwhile, and tells how long a partition stood still, and how long of that after the last loss of a member of the group.

mod check;
mod crew;
mod fault;
mod gap;
mod inject;
mod load;
mod options;
mod slot;
mod topics;
mod traffic;
mod watch;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use crate::{Kafka, Proxy};
pub use check::Findings;
use crew::Crew;
pub use fault::Faults;
use inject::Scene;
use load::Load;
pub use options::Options;
use topics::Topics;
pub use traffic::Traffic;
use watch::Reader;
pub use watch::{Stall, Watch};

/// Runs one schedule against `kafka`; a line of progress for every fault goes to standard error.
pub fn run(kafka: &Kafka, model: &Path, options: &Options) -> Findings {
    let started = Instant::now();
    let topics = Topics::create(kafka, options.seed);
    let proxy = Proxy::start(&kafka.bootstrap_servers);
    let watch = Watch::default();
    let reader = Reader::start(kafka, &topics.scored, &topics.dead_letters, watch.clone());
    let load = Load::start(kafka, &topics, model, options, watch.clone());
    let crew = Crew::start(&proxy.bootstrap_servers, &topics, model, options);
    let (gaps, unsaid) = (0, Vec::new());
    let mut scene =
        Scene { kafka, proxy: &proxy, topics: &topics, load: &load, watch: &watch, crew, gaps, unsaid };
    let mut faults = Faults::new(options.seed, options.daemons, kafka.brokers);
    let mut kinds = BTreeMap::new();
    for number in 1..=options.faults {
        let fault = faults.draw();
        *kinds.entry(fault.kind()).or_default() += 1;
        eprintln!(
            "[{:5.0} s] seed {} fault {number}/{}: {fault:?}, {} documents so far, longest stalls {:.1} and {:.1} s",
            started.elapsed().as_secs_f64(),
            options.seed,
            options.faults,
            load.acknowledged(),
            watch.longest().0.length.as_secs_f64(),
            watch.longest().1.length.as_secs_f64(),
        );
        scene.inject(fault, &mut faults);
    }
    scene.crew.settle();
    let Scene { mut crew, gaps, unsaid, .. } = scene;
    let obligations = load.stop();
    check::drain(kafka, &topics, &mut crew);
    let stalls = watch.stalls();
    reader.stop();
    let mut findings = check::look(kafka, &topics, model, &obligations);
    (findings.seed, findings.faults, findings.kinds) = (options.seed, options.faults, kinds);
    (findings.gaps, findings.unsaid, findings.stalls) = (gaps, unsaid, stalls);
    findings.counters = crew.counters();
    crew.stop();
    (findings.exits, findings.hangs) = crew.exits_and_hangs();
    findings.seconds = started.elapsed().as_secs_f64();
    findings
}
