//! A rank's part of a scored topic.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use sluice_feed::batch::PackedBatch;
use sluice_feed::cut::UnequalContexts;
use sluice_feed::feed::Feed as Inner;
use sluice_feed::pack::{BatchShape, Packing};
use sluice_feed::plan::Plan;
use sluice_feed::select::Needs;
use sluice_feed::snapshot::Snapshot;
use sluice_feed::stream::{
    Broker, Decoder, Extent, Shard, StreamError as FeedError, TopicKind, first_context,
};
use sluice_feed::supply::{Agreed, Buffered};
use sluice_feed::turns::{Outlook, RankState};
use sluice_schemas::fingerprint::Fingerprint;

use crate::batch::{Batch, Columns};
use crate::error::{StateError, raised, refused};
use crate::metrics::Counts;
use crate::waiting::interruptible;

/// A rank that has waited for documents for so long says so to the others, which hear meanwhile that it is there, and it
/// hears whether they have stopped or failed.
const SILENCE: Duration = Duration::from_secs(10);

/// A rank's lanes (partitions of the topic) as micro-batches.
///
/// Every method raises RuntimeError in a process that was forked after this was made: the threads that read from Kafka are
/// not there.
#[pyclass(frozen, module = "sluice_feed._core")]
pub(crate) struct Feed {
    /// `None` once it is closed.
    state: Mutex<Option<State>>,
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    /// What is known without waiting for a `fill` that goes on.
    reached: Mutex<Reached>,
    process: u32,
    lanes: usize,
    own: Vec<usize>,
    shape: BatchShape,
}

/// How far the feed had come when it was last looked at.
#[derive(Clone, Default)]
struct Reached {
    step: u64,
    documents: u64,
    buffered: Buffered,
    reference_model: Option<String>,
}

struct State {
    feed: Inner,
    /// What the step's micro-batches were made of, until the next step.
    given: Vec<PackedBatch>,
}

#[pymethods]
impl Feed {
    /// Connects to the brokers and starts reading. See `sluice_feed.ScoredStream`, which checks and explains the settings.
    #[new]
    #[pyo3(signature = (*, bootstrap_servers, properties, topic, tokenizer, vocab_size, rows, sequence_length, micro_batches,
        rank, world_size, epochs, shuffle_buffer, seed, attend_across_documents, first_token, unequal_contexts,
        needs_entropies, needs_attribute, reference_models, state))]
    #[allow(clippy::too_many_arguments, reason = "named ones, which Python gives by name")]
    fn new(
        py: Python<'_>,
        bootstrap_servers: String,
        properties: BTreeMap<String, String>,
        topic: String,
        tokenizer: &str,
        vocab_size: u32,
        rows: usize,
        sequence_length: Option<usize>,
        micro_batches: usize,
        rank: usize,
        world_size: usize,
        epochs: Option<u64>,
        shuffle_buffer: usize,
        seed: u64,
        attend_across_documents: bool,
        first_token: &str,
        unequal_contexts: &str,
        needs_entropies: bool,
        needs_attribute: bool,
        reference_models: Vec<String>,
        state: Option<Vec<Vec<u8>>>,
    ) -> PyResult<Self> {
        let shard = Shard::new(rank, world_size).map_err(refused)?;
        let fingerprint = |text: &str| text.parse::<Fingerprint>().map_err(refused);
        let models = reference_models.iter().map(|text| fingerprint(text)).collect::<PyResult<Vec<_>>>()?;
        let tokenizer = fingerprint(tokenizer)?;
        let packing = Packing {
            attend_across_documents,
            first_token: named("first_token", first_token)?,
            unequal_contexts: named::<UnequalContexts>("unequal_contexts", unequal_contexts)?,
        };
        let extent = epochs.map_or(Extent::Follow, |epochs| Extent::UntilEnd { epochs });
        let decoder = Decoder::new(TopicKind::Scored, tokenizer, vocab_size)
            .needing(Needs {
                reference_loss: !needs_attribute,
                reference_entropy: needs_entropies,
                attribute: needs_attribute,
                ..Needs::default()
            })
            .allowing(&models);
        let counts = Arc::new(Counts::default());
        let stop = Arc::new(AtomicBool::new(false));
        let broker = Broker::new(bootstrap_servers, properties.into_iter().collect()).map_err(raised)?;
        let broker = broker.observed(Arc::clone(&counts) as _);
        let feed = interruptible(py, &stop, None, || {
            let snapshot = state.map(|parts| joined(&parts, vocab_size)).transpose()?;
            let len = match (sequence_length, &snapshot) {
                (Some(len), _) => len,
                (None, Some(snapshot)) => snapshot.identity.plan.shape.len,
                (None, None) => first_context(&broker, &topic, extent, &decoder, &stop)
                    .map_err(Failure::Feed)?
                    .map(|context| context.window as usize)
                    .ok_or_else(|| Failure::Feed(FeedError::EmptyTopic(topic.clone())))?,
            };
            let shape = BatchShape { rows, len };
            let plan = Plan { topic, extent, shape, packing, micro_batches, shuffle_buffer, seed };
            Inner::open(broker, plan, shard, snapshot.as_ref(), decoder, Arc::clone(&stop))
                .map_err(Failure::Feed)
        })?
        .map_err(PyErr::from)?;
        let (lanes, shape) = (feed.lanes(), feed.shape());
        let state = Mutex::new(Some(State { feed, given: vec![] }));
        let own = shard.own(lanes).collect();
        let (reached, process) = (Mutex::default(), std::process::id());
        Ok(Self { state, stop, counts, reached, process, lanes, own, shape })
    }

    /// Partitions of the whole topic.
    #[getter]
    fn lanes(&self) -> usize {
        self.lanes
    }

    /// The partitions that this rank reads.
    #[getter]
    fn own_lanes(&self) -> Vec<usize> {
        self.own.clone()
    }

    /// Rows of a micro-batch, and tokens of a row.
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.shape.rows, self.shape.len)
    }

    /// Ends the reading and gives back its memory; nothing can be read afterwards.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.check_process()?;
        self.stop.store(true, Ordering::Relaxed);
        // The thread that reads may be about to log, for which it needs the GIL.
        py.detach(|| drop(self.lock().take()));
        Ok(())
    }

    /// Has whatever waits give up soon, as a signal handler or another thread may ask; the stream stays where it is.
    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Numbers that are equal on all ranks exactly where these are of one run.
    fn identity(&self, py: Python<'_>) -> PyResult<Vec<i64>> {
        let fingerprint = self.with(py, |state| state.feed.identity().fingerprint())?;
        let (words, _) = fingerprint.as_bytes().as_chunks();
        Ok(words.iter().map(|word| i64::from_le_bytes(*word)).collect())
    }

    /// Reads until this rank has what the next step takes of it, and gives what it knows of its lanes, one number after the
    /// other: ranks agree by the smallest of each.
    fn fill(&self, py: Python<'_>) -> PyResult<Vec<i64>> {
        self.check_process()?;
        let fill = || {
            self.lock().as_mut().map(|state| {
                let outlook = state.feed.fill();
                self.look_at(&state.feed);
                outlook
            })
        };
        let outlook =
            interruptible(py, &self.stop, Some(SILENCE), fill)?.ok_or_else(closed)?.map_err(raised)?;
        // One that nobody has asked to stop has waited for too long to keep silent.
        let is_waiting = outlook.state() == RankState::Stopped && !self.stop.load(Ordering::Relaxed);
        Ok(if is_waiting { Outlook::waiting(self.lanes) } else { outlook }.values())
    }

    /// What a rank that was asked to stop gives instead: all ranks stop before the next step.
    fn stopped(&self) -> Vec<i64> {
        Outlook::stopped(self.lanes).values()
    }

    /// What a rank that has failed gives instead, so that the others need not wait for it.
    fn failed(&self) -> Vec<i64> {
        Outlook::failed(self.lanes).values()
    }

    /// Takes in the smallest of all ranks' numbers: "ready", "again" (fill once more), "ended" or "stopped".
    fn agree(&self, py: Python<'_>, values: Vec<i64>) -> PyResult<&'static str> {
        let agreed = self.with(py, |state| state.feed.agree(&Outlook::from_values(&values)))?;
        match agreed {
            Agreed::Ready => Ok("ready"),
            Agreed::Again => Ok("again"),
            Agreed::Ended => Ok("ended"),
            Agreed::Stopped => Ok("stopped"),
            Agreed::Failed => Err(raised(FeedError::OtherRank)),
            Agreed::SeveralReferences => Err(raised(FeedError::SeveralReferences)),
        }
    }

    /// This rank's micro-batches of the step that all ranks are ready for.
    #[pyo3(signature = (*, with_digests = false))]
    fn take(&self, py: Python<'_>, with_digests: bool) -> PyResult<Vec<Batch>> {
        let (step, taken) = self.with(py, |state| {
            state.given = state.feed.take();
            // The pieces stay here, for the case that the step is put back.
            let columns = state.given.iter_mut().map(|packed| {
                let columns = Columns::take(packed, with_digests);
                (columns, packed.clone())
            });
            let columns: Vec<(Columns, PackedBatch)> = columns.collect();
            self.look_at(&state.feed);
            (state.feed.step(), columns)
        })?;
        taken.into_iter().map(|(columns, packed)| Batch::new(py, step, &packed, columns)).collect()
    }

    /// Where each of this rank's lanes stands, as bytes by lane. `before_step`: before the micro-batches of the step given
    /// last, for they were not learnt from yet; otherwise after them.
    fn snapshot<'py>(&self, py: Python<'py>, before_step: bool) -> PyResult<Bound<'py, PyDict>> {
        let lanes = self.with(py, |state| {
            if !before_step {
                return self.bytes_of_lanes(&state.feed);
            }
            state.feed.put_back(std::mem::take(&mut state.given));
            let lanes = self.bytes_of_lanes(&state.feed);
            state.given = state.feed.take();
            lanes
        })?;
        let dictionary = PyDict::new(py);
        for (lane, bytes) in lanes.map_err(StateError::new_err)? {
            dictionary.set_item(lane.to_string(), PyBytes::new(py, &bytes))?;
        }
        Ok(dictionary)
    }

    /// Takes back the micro-batches of the step given last: they come again.
    fn put_back(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |state| state.feed.put_back(std::mem::take(&mut state.given)))
    }

    /// Fingerprint in hexadecimal digits of the model that made the reference losses, once a document has shown it.
    #[getter]
    fn reference_model(&self) -> PyResult<Option<String>> {
        self.check_process()?;
        Ok(self.reached().reference_model.clone())
    }

    /// What people should know of how the plan meets the contexts that the reference model saw so far, a sentence each.
    fn notices(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.with(py, |state| state.feed.notices())
    }

    /// Counts of the stream by name.
    fn metrics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.check_process()?;
        // Not out of the feed itself, which `fill` may hold for as long as it waits.
        let Reached { step, documents, buffered, .. } = self.reached().clone();
        let dictionary = PyDict::new(py);
        dictionary.set_item("steps_total", step)?;
        dictionary.set_item("documents_total", documents)?;
        dictionary.set_item("documents_in_shuffle_buffer", buffered.shuffle)?;
        dictionary.set_item("pieces_in_packing", buffered.packing)?;
        self.counts.put_into(&dictionary)?;
        Ok(dictionary)
    }
}

impl Feed {
    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reached(&self) -> MutexGuard<'_, Reached> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how far the feed has come.
    fn look_at(&self, feed: &Inner) {
        *self.reached() = Reached {
            step: feed.step(),
            documents: feed.documents(),
            buffered: feed.buffered(),
            reference_model: feed.reference_model().map(|model| model.to_string()),
        };
    }

    /// Runs with the state, and without the GIL, which another thread that holds the state may be waiting for.
    fn with<T: Send>(&self, py: Python<'_>, run: impl FnOnce(&mut State) -> T + Send) -> PyResult<T> {
        self.check_process()?;
        py.detach(|| self.lock().as_mut().map(run)).ok_or_else(closed)
    }

    fn check_process(&self) -> PyResult<()> {
        if self.process == std::process::id() {
            return Ok(());
        }
        Err(PyRuntimeError::new_err(format!(
            "this stream was opened in process {}, and the threads that read from Kafka do not survive a fork; open it in \
             the process that reads it (num_workers=0: a thread of its own reads ahead)",
            self.process
        )))
    }

    fn bytes_of_lanes(&self, feed: &Inner) -> Result<Vec<(usize, Vec<u8>)>, String> {
        let whole = feed.snapshot();
        let of_lane = |&lane: &usize| {
            let shard = Shard::new(lane, self.lanes).map_err(|error| error.to_string())?;
            let bytes = whole.part(shard).to_bytes().map_err(|error| error.to_string())?;
            Ok((lane, bytes))
        };
        self.own.iter().map(of_lane).collect()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if self.process == std::process::id() {
            // The thread that reads may be about to log, for which it needs the GIL.
            Python::attach(|py| py.detach(|| drop(state)));
        } else {
            // That thread is not in this process, and cannot be waited for.
            std::mem::forget(state);
        }
    }
}

fn closed() -> PyErr {
    PyRuntimeError::new_err(
        "the stream is closed; make a new one, with the state of this one if it is to go on",
    )
}

/// Why a feed was not opened.
enum Failure {
    Feed(FeedError),
    State(String),
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Feed(error) => raised(error),
            Failure::State(message) => StateError::new_err(message),
        }
    }
}

/// The state of some lanes out of their parts.
fn joined(parts: &[Vec<u8>], vocab_size: u32) -> Result<Snapshot, Failure> {
    let state = |error: sluice_feed::snapshot::SnapshotError| Failure::State(error.to_string());
    let parts: Vec<Snapshot> =
        parts.iter().map(|bytes| Snapshot::from_bytes(bytes)).collect::<Result<_, _>>().map_err(state)?;
    let snapshot = Snapshot::joined(parts).map_err(state)?;
    snapshot.check(vocab_size).map_err(state)?;
    Ok(snapshot)
}

/// A choice by its name, as the feed's settings are written down.
fn named<T: serde::de::DeserializeOwned>(setting: &str, name: &str) -> PyResult<T> {
    serde_json::from_value(serde_json::Value::from(name))
        .map_err(|error| refused(format!("{setting}: {error}")))
}
