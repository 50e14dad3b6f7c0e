//! What the model computes next: documents in, batches out to the model, outcomes into the ledger.
//!
//! One batch lies ready for the model while one runs. It is put together early only where it is full; under low load, as
//! late as possible, so that what comes meanwhile still gets in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, never, select};

use crate::assemble::{Assembler, Finished, RecordPolicy};
use crate::batch::{Batch, Ladder, LookAhead, Window};
use crate::config::Sizes;
use crate::health::{Health, Loop};
use crate::job::Job;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::notice::Notices;
use crate::outcome::{MODEL_FAILED, Outcome};
use crate::score::is_out_of_memory;
use crate::score::model_thread::{Ask, Place, Run};

/// Documents in a row that the model may fail on before the model itself is taken to be broken.
const FAILURES_MAX: usize = 3;
/// Longest wait before a loop looks whether it should stop.
const TURN: Duration = Duration::from_millis(100);

/// What a channel to the model that nobody listens to means.
const MODEL_ENDED: &str = "the model's thread has ended";

/// Batches that the model is asked for at one time: one that runs, and one that lies ready.
const ASKED_MAX: usize = 2;

/// A batch that the model is asked for.
struct Asked {
    place: Place,
    /// The document of each of its windows.
    documents: Vec<u64>,
    /// Whether it is known that the model has begun with it.
    is_begun: bool,
    /// Whether it was asked for after the stop began, so that all of it is still wanted.
    is_after_stop: bool,
}

/// Stands for no document.
const PROBE: u64 = u64::MAX;

fn is_probe(batch: &Batch) -> bool {
    batch.windows.first().is_some_and(|window| window.document == PROBE)
}

/// Everything between reading and publishing but the model itself.
pub struct Dispatcher<'a> {
    lookahead: LookAhead,
    /// Halves of batches that failed.
    retries: Vec<Batch>,
    assembler: Assembler,
    ledger: &'a Ledger<Outcome>,
    sizes: Sizes,
    ladder: Ladder,
    metrics: &'a Metrics,
    notices: Notices,
    /// Documents that the model failed on alone, until it is known whether they or the device are at fault.
    suspects: Vec<(u64, anyhow::Error)>,
    /// Documents in a row that the model failed on.
    failures: usize,
    /// When the look-ahead last began to fill.
    waiting_since: Instant,
}

impl<'a> Dispatcher<'a> {
    /// A dispatcher without documents.
    pub fn new(
        policy: RecordPolicy,
        ladder: Ladder,
        ledger: &'a Ledger<Outcome>,
        sizes: Sizes,
        metrics: &'a Metrics,
    ) -> Self {
        Self {
            lookahead: LookAhead::new(sizes.tokens_max, ladder),
            retries: Vec::new(),
            assembler: Assembler::new(policy),
            ledger,
            sizes,
            ladder,
            metrics,
            notices: Notices::default(),
            suspects: Vec::new(),
            failures: 0,
            waiting_since: Instant::now(),
        }
    }

    /// Takes a document in.
    pub fn accept(&mut self, job: Job) {
        let (windows, finished) = self.assembler.add(job);
        if self.lookahead.is_empty() {
            self.waiting_since = Instant::now();
        }
        for window in windows {
            self.lookahead.push(window);
        }
        self.complete(finished);
    }

    /// The next batch, if there is anything to compute. Documents that were given up meanwhile, because the model
    /// failed on them or their partition went to another daemon, are left out.
    pub fn next_batch(&mut self) -> Option<Batch> {
        while let Some(batch) = self.retries.pop().or_else(|| self.lookahead.next_batch()) {
            let rows = batch.rows();
            let wanted = self.wanted(batch);
            if wanted.as_ref().map_or(0, Batch::rows) < rows {
                self.forget_unwanted();
            }
            if wanted.is_some() {
                return wanted;
            }
        }
        None
    }

    /// Forgets every document that is not to be scored any more at once: a long one has more windows than can be passed
    /// over batch by batch.
    fn forget_unwanted(&mut self) {
        let Self { assembler, ledger, lookahead, .. } = self;
        assembler.retain(|ticket| ledger.is_wanted(ticket));
        lookahead.retain(|window| assembler.has(window.document));
    }

    /// What of `batch` is still to be computed.
    fn wanted(&mut self, batch: Batch) -> Option<Batch> {
        let Self { assembler, ledger, ladder, .. } = self;
        if is_probe(&batch) {
            return Some(batch);
        }
        let is_wanted =
            |window: &&Window| assembler.wants(window.document, |ticket| ledger.is_wanted(ticket));
        let wanted: Vec<Window> = batch.windows.iter().filter(is_wanted).cloned().collect();
        match wanted.len() {
            0 => None,
            kept if kept == batch.rows() => Some(batch),
            _ => Some(Batch::new(wanted, *ladder)),
        }
    }

    /// Notes that the model has begun with a batch, once for each.
    fn hand_over(&mut self, asked: &mut Asked) {
        if std::mem::replace(&mut asked.is_begun, true) {
            return;
        }
        for ticket in asked.documents.iter().filter_map(|&document| self.assembler.hand_over(document)) {
            self.ledger.hand_over(ticket);
        }
    }

    /// A batch that ran in the warm-up, and that nothing in a document can make fail.
    fn probe(&self) -> Batch {
        let len = self.ladder.lengths().into_iter().find(|&len| len >= 2).unwrap_or(2);
        // The target is token 0, or class 0: every model has both.
        Batch::new(vec![Window::whole(PROBE, vec![0; len].into(), None)], self.ladder)
    }

    /// Takes in what the model made of a batch. Halves of one that failed come back from [`Self::next_batch`]; a
    /// document that fails alone becomes a dead letter once another batch has shown that the device is well. An error means
    /// that the model is broken, or the device.
    pub fn finish(&mut self, run: Run) -> anyhow::Result<()> {
        let Run { batch, scored, ran, starved } = run;
        self.metrics.batch_seconds.observe(ran.as_secs_f64());
        self.metrics.model_starved_seconds.inc_by(starved.as_secs_f64());
        match scored {
            Ok(_) if is_probe(&batch) => {
                for (document, error) in std::mem::take(&mut self.suspects) {
                    let finished = self.assembler.failed(document, MODEL_FAILED, &format!("{error:#}"));
                    self.complete(finished);
                }
            }
            Err(error) if is_probe(&batch) => {
                return Err(error).context(
                    "the device fails on a batch that it ran before, so that no document is at fault; nothing is given up",
                );
            }
            Ok(scores) => {
                self.failures = 0;
                self.metrics.model_tokens.inc_by(batch.real_tokens() as u64);
                self.metrics.padded_tokens.inc_by(batch.padded_tokens() as u64);
                self.metrics.batch_rows.observe(batch.rows() as f64);
                self.metrics.row_tokens.observe(batch.padded_len as f64);
                let finished = self.assembler.scored(&batch, &scores);
                self.complete(finished);
            }
            Err(error) if batch.rows() > 1 => {
                let out_of_memory = is_out_of_memory(&error);
                if out_of_memory {
                    self.metrics.splits_for_memory.inc();
                }
                let advice =
                    if out_of_memory { "; batch.tokens_max is too large for this device" } else { "" };
                if let Some(others) = self.notices.due("batch") {
                    tracing::warn!(
                        %error,
                        rows = batch.rows(),
                        padded_len = batch.padded_len,
                        out_of_memory,
                        others_since_last_warning = others,
                        "a batch failed; trying its halves{advice}"
                    );
                }
                self.metrics.batches_split.inc();
                for window in &batch.windows {
                    self.assembler.take_back(window.document);
                }
                let mut first = batch.windows;
                let second = first.split_off(first.len() / 2);
                self.retries.extend([second, first].map(|half| Batch::new(half, self.ladder)));
            }
            Err(error) => {
                self.failures += 1;
                if self.failures >= FAILURES_MAX {
                    return Err(error)
                        .context(format!("the model failed on {} documents in a row", self.failures));
                }
                if let Some(window) = batch.windows.first() {
                    self.suspects.push((window.document, error));
                    self.retries.push(self.probe());
                }
            }
        }
        Ok(())
    }

    fn complete(&self, finished: impl IntoIterator<Item = Finished>) {
        for (ticket, outcome) in finished {
            self.ledger.complete(ticket, outcome);
        }
    }

    fn wants_more(&self) -> bool {
        self.lookahead.tokens() < self.sizes.lookahead_tokens
    }

    fn is_idle(&self) -> bool {
        self.retries.is_empty() && self.lookahead.is_empty()
    }

    /// Whether a batch put together now would be as good as one put together later. While the model works, a full one
    /// is; a model that has nothing to do waits, until the deadline, for a look-ahead to choose from.
    fn is_ready(&self, running: usize) -> bool {
        let chosen_well = if running > 0 { self.lookahead.fills_a_batch() } else { !self.wants_more() };
        chosen_well || !self.retries.is_empty()
    }

    /// When a model that has nothing to do takes what there is.
    fn deadline(&self) -> Instant {
        self.waiting_since + self.sizes.delay_max
    }

    /// Feeds the model until the source is gone and everything read is finished.
    pub fn run(mut self, jobs: &Receiver<Job>, model: &Sender<Ask>, health: &Health) -> anyhow::Result<()> {
        let (answer, runs) = bounded::<Run>(ASKED_MAX);
        let mut source_is_open = true;
        // What the model is asked for, in the order in which it answers.
        let mut asked: VecDeque<Asked> = VecDeque::new();
        let mut waiting: Option<Batch> = None;
        let (nobody_takes, _kept_open) = bounded::<Ask>(0);
        let no_jobs = never();
        let mut beaten = Instant::now();
        loop {
            // A model that hangs must show: while it runs, only what it gives back is a sign of life.
            if asked.is_empty() && beaten.elapsed() >= TURN {
                health.beat(Loop::Score);
                beaten = Instant::now();
            }
            if health.is_aborted() {
                return Ok(());
            }
            while source_is_open && self.wants_more() {
                match jobs.try_recv() {
                    Ok(job) => self.accept(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => source_is_open = false,
                }
            }
            for one in asked.iter_mut().filter(|one| one.place.is_empty()) {
                self.hand_over(one);
            }
            if health.is_stopping() {
                // What the model has not begun by now is for the next reader, but for the rest of what it has begun.
                let last = asked.back().filter(|last| !last.is_after_stop);
                if let Some(batch) = last.and_then(|last| last.place.take()) {
                    asked.pop_back();
                    self.retries.push(batch);
                }
                waiting = waiting.and_then(|batch| self.wanted(batch));
            }
            let now = Instant::now();
            let hurry = !source_is_open || health.is_stopping() || now >= self.deadline();
            let has_room = waiting.is_none() && asked.len() < ASKED_MAX;
            if has_room && (self.is_ready(asked.len()) || (asked.is_empty() && hurry)) {
                waiting = self.next_batch();
            }
            if !source_is_open && asked.is_empty() && waiting.is_none() && self.is_idle() {
                return Ok(());
            }

            let patience = if asked.is_empty() && waiting.is_none() && !self.is_idle() {
                self.deadline().saturating_duration_since(now).min(TURN)
            } else {
                TURN
            };
            let takers = if waiting.is_some() { model } else { &nobody_takes };
            let (since, is_after_stop) = (self.waiting_since, health.is_stopping());
            let mut ask = || -> anyhow::Result<Ask> {
                let batch = waiting.take().context("no batch waits")?;
                let documents = batch.windows.iter().map(|window| window.document).collect();
                let place = Place::new(batch);
                asked.push_back(Asked { place: place.clone(), documents, is_begun: false, is_after_stop });
                Ok(Ask { batch: place, since, answer: answer.clone() })
            };
            let more = if source_is_open && self.wants_more() { jobs } else { &no_jobs };
            select! {
                // What is sent is taken out only once there is a place for it.
                send(takers, ask()?) -> sent => sent.ok().context(MODEL_ENDED)?,
                recv(runs) -> run => {
                    // The model goes on with what lies ready, while what it gave back is looked at.
                    let run = run.context(MODEL_ENDED)?;
                    if let Some(mut first) = asked.pop_front() {
                        self.hand_over(&mut first);
                    }
                    health.beat(Loop::Score);
                    self.finish(run)?;
                }
                recv(more) -> job => match job {
                    Ok(job) => self.accept(job),
                    Err(_) => source_is_open = false,
                },
                default(patience) => {}
            }
        }
    }
}
