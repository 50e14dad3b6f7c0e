//! The thread that a model lives on: opened there, warmed there, and run there. A GPU's libraries keep handles and workspaces
//! by thread, so that what one thread has warmed another finds cold.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use crossbeam_channel::{Receiver, Sender, bounded};

use super::{Score, Scores};
use crate::batch::Batch;

/// A batch that the model is to run, which can be had back for as long as it has not begun. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Place(Arc<Mutex<Option<Batch>>>);

impl Place {
    /// A place with a batch in it.
    pub fn new(batch: Batch) -> Self {
        Self(Arc::new(Mutex::new(Some(batch))))
    }

    /// Takes the batch, which belongs to whoever is first.
    pub fn take(&self) -> Option<Batch> {
        self.lock().take()
    }

    /// Whether somebody has taken it.
    pub fn is_empty(&self) -> bool {
        self.lock().is_none()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Batch>> {
        // Nobody panics while holding it, and half a batch is never seen.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A batch to be run, and where what comes of it goes.
#[derive(Debug)]
pub struct Ask {
    /// The batch; where it was taken back, nothing is run and nothing answered.
    pub batch: Place,
    /// Since when there is something to run.
    pub since: Instant,
    /// Has room for the answer, so that the model never waits for whoever takes it.
    pub answer: Sender<Run>,
}

/// What came of a batch.
#[derive(Debug)]
pub struct Run {
    /// The batch.
    pub batch: Batch,
    /// What the model made of it.
    pub scored: anyhow::Result<Scores>,
    /// How long it ran.
    pub ran: Duration,
    /// How long the model had nothing to run before it, though there was something.
    pub starved: Duration,
}

/// A model on a thread of its own. Cloning shares it; it ends with the last of them.
///
/// Batches run in the order in which they are asked for. One lies ready while one runs, so that the model goes on without a
/// thread being woken in between; who comes third waits for the place. So a warm-up beside the stream keeps no batch of the
/// stream waiting for more than one of its own.
#[derive(Clone, Debug)]
pub struct ModelThread(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// With room for the one that lies ready.
    asks: Option<Sender<Ask>>,
    thread: Option<JoinHandle<()>>,
}

impl ModelThread {
    /// Starts a thread and makes the model on it. Fails where `make` does.
    pub fn start<S: Score + 'static>(
        make: impl FnOnce() -> anyhow::Result<S> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (asks, asked) = bounded(1);
        let (made, is_made) = bounded(1);
        let live = move || match make() {
            Ok(model) => {
                // Whoever waits for it is there.
                let _ = made.send(Ok(()));
                drop(made);
                run(model, &asked);
            }
            Err(error) => {
                let _ = made.send(Err(error));
            }
        };
        let thread = Builder::new().name("model".to_owned()).spawn(live).context("cannot start a thread")?;
        is_made.recv().map_err(|_| anyhow!("opening the model panicked; this is a defect of Sluice"))??;
        Ok(Self(Arc::new(Shared { asks: Some(asks), thread: Some(thread) })))
    }

    /// Where batches are asked for. A send waits while another lies ready, and fails once the model's thread has ended.
    pub fn asks(&self) -> anyhow::Result<&Sender<Ask>> {
        self.0.asks.as_ref().context("the model's thread has ended")
    }
}

impl Score for ModelThread {
    fn score(&mut self, batch: &Batch) -> anyhow::Result<Scores> {
        let (answer, answered) = bounded(1);
        let ask = Ask { batch: Place::new(batch.clone()), since: Instant::now(), answer };
        let ended = || anyhow!("the model's thread has ended");
        self.asks()?.send(ask).map_err(|_| ended())?;
        answered.recv().map_err(|_| ended())?.scored
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.asks = None;
        if let Some(thread) = self.thread.take() {
            // Before the process goes on to end: ONNX Runtime must not be taken apart under it.
            let _ = thread.join();
        }
    }
}

/// Runs what is asked for until nobody can ask any more.
fn run(mut model: impl Score, asks: &Receiver<Ask>) {
    let mut free_since = Instant::now();
    for Ask { batch, since, answer } in asks {
        let Some(batch) = batch.take() else { continue };
        let begun = Instant::now();
        let scored = catch_unwind(AssertUnwindSafe(|| model.score(&batch)));
        let panicked = scored.is_err();
        let scored =
            scored.unwrap_or_else(|_| Err(anyhow!("running the model panicked; this is a defect of Sluice")));
        let starved = begun.saturating_duration_since(since.max(free_since));
        free_since = Instant::now();
        let ran = free_since.saturating_duration_since(begun);
        // Who has given up waiting does not need it.
        let _ = answer.send(Run { batch, scored, ran, starved });
        if panicked {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use std::thread::{ThreadId, current};

    use super::*;
    use crate::batch::Ladder;

    /// Where it was made, and how many batches it has left.
    struct Model(ThreadId, usize);

    impl Score for Model {
        fn score(&mut self, _batch: &Batch) -> anyhow::Result<Scores> {
            assert_eq!(current().id(), self.0, "on the thread that it was made on");
            self.1 = self.1.checked_sub(1).unwrap();
            Ok(Scores { losses: vec![self.1 as f32], entropies: vec![] })
        }
    }

    /// Runs a batch until it is told to end.
    struct Waits(Receiver<()>);

    impl Score for Waits {
        fn score(&mut self, _batch: &Batch) -> anyhow::Result<Scores> {
            self.0.recv()?;
            Ok(Scores { losses: vec![], entropies: vec![] })
        }
    }

    fn nothing() -> Batch {
        Batch::new(vec![], Ladder::new(8, 1))
    }

    #[test]
    fn a_model_is_made_and_run_on_one_thread_for_whoever_asks() {
        let mut model = ModelThread::start(|| Ok(Model(current().id(), 4))).unwrap();
        let mut other = model.clone();
        let left = |asking: &mut ModelThread| asking.score(&nothing()).unwrap().losses[0] as usize;
        assert_eq!([left(&mut model), left(&mut other)], [3, 2]);
        drop(model);
        assert_eq!(left(&mut other), 1);
    }

    #[test]
    fn a_model_that_cannot_be_made_says_why() {
        let refused = ModelThread::start(|| anyhow::bail!("no device") as anyhow::Result<Model>);
        assert_eq!(refused.unwrap_err().to_string(), "no device");
    }

    #[test]
    fn a_model_that_panics_is_an_error_and_takes_nothing_more() {
        let mut model = ModelThread::start(|| Ok(Model(current().id(), 0))).unwrap();
        let error = model.score(&nothing()).unwrap_err().to_string();
        assert_eq!(error, "running the model panicked; this is a defect of Sluice");
        assert_eq!(model.score(&nothing()).unwrap_err().to_string(), "the model's thread has ended");
    }

    #[test]
    fn a_batch_that_lies_ready_can_be_had_back_until_the_model_begins() {
        // It takes one batch at a time, and ends one when it is told to.
        let (end, ends) = bounded(0);
        let model = ModelThread::start(move || Ok(Waits(ends))).unwrap();
        let (answer, answers) = bounded(2);
        let ask = || {
            let place = Place::new(nothing());
            let ask = Ask { batch: place.clone(), since: Instant::now(), answer: answer.clone() };
            model.asks().unwrap().send(ask).unwrap();
            place
        };
        let first = ask();
        while !first.is_empty() {
            std::thread::yield_now();
        }
        let second = ask();
        assert!(second.take().is_some() && second.take().is_none() && first.take().is_none());
        end.send(()).unwrap();
        answers.recv().unwrap();
        // The one that was taken back is passed over, without an answer.
        let third = ask();
        end.send(()).unwrap();
        answers.recv().unwrap();
        assert!(third.is_empty() && answers.is_empty());
    }

    #[test]
    fn time_without_a_batch_counts_only_while_there_is_something_to_run() {
        let model = ModelThread::start(|| Ok(Model(current().id(), 2))).unwrap();
        let run = |since: Instant| {
            let (answer, answered) = bounded(1);
            model.asks().unwrap().send(Ask { batch: Place::new(nothing()), since, answer }).unwrap();
            answered.recv().unwrap().starved
        };
        let started = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
        let starved = run(started);
        assert!(starved >= Duration::from_millis(20) && starved <= started.elapsed());
        let idle = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
        let since = Instant::now();
        let starved = run(since);
        assert!(starved <= since.elapsed() && since >= idle + Duration::from_millis(20));
    }
}
