//! A run's metrics as event files for `TensorBoard`, which follows them while they are written.
//!
//! An event file is a sequence of records, each a protobuf `Event` (`tensorflow/core/util/event.proto`) between its length and
//! checksums. The crates that write them bring a second protobuf library, or its compiler; this takes the one that is here.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use prost::Message;

use crate::run::metrics::Metric;

/// What every event file begins with.
const FILE_VERSION: &str = "brain.Event:2";
/// `SessionLog.START`: steps of earlier files from this event's on are void.
const START: i32 = 1;

/// `tensorflow.Event`, as far as scalars need it.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// `tensorflow.Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

/// `tensorflow.SessionLog`.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// An event file being written.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in a run's folder, for the steps after `step`.
    pub fn create(run: &Path, step: u64) -> anyhow::Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard reads files in the order of their names.
        let name = format!("events.out.tfevents.{:010}.{:09}.sluice", now.as_secs(), now.subsec_nanos());
        let path = run.join(name);
        let file = File::create_new(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let mut events = Self { path, file };
        events.event(0, What::FileVersion(FILE_VERSION.to_owned()))?;
        events.event(step as i64 + 1, What::SessionLog(SessionLog { status: START }))?;
        Ok(events)
    }

    /// Adds a metric's numbers.
    pub fn write(&mut self, metric: &Metric) -> anyhow::Result<()> {
        let (step, scalars) = scalars(metric);
        if scalars.is_empty() {
            return Ok(());
        }
        let value = |(tag, value): (String, f64)| Value { tag, simple_value: value as f32 };
        self.event(step as i64, What::Summary(Summary { value: scalars.into_iter().map(value).collect() }))
    }

    fn event(&mut self, step: i64, what: What) -> anyhow::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event = Event { wall_time: now.as_secs_f64(), step, what: Some(what) };
        // In one write, so that a reader rarely sees half a record.
        let written = self.file.write_all(&framed(&event.encode_to_vec()));
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// The step of a metric, and its numbers by name.
fn scalars(metric: &Metric) -> (u64, Vec<(String, f64)>) {
    let named = |values: &[(&str, Option<f64>)]| {
        values.iter().filter_map(|&(tag, value)| Some((tag.to_owned(), value?))).collect()
    };
    match metric {
        Metric::Step(step) => {
            let kept_share = (step.scored > 0).then(|| step.kept as f64 / step.scored as f64);
            let values = [
                ("train/loss", step.loss.map(f64::from)),
                ("train/loss_all", Some(step.loss_all)),
                ("train/loss_selected", step.loss_selected),
                ("train/loss_unselected", step.loss_unselected),
                ("train/threshold", step.threshold.map(f64::from)),
                ("train/kept_share", kept_share),
                ("train/learning_rate", Some(step.learning_rate)),
                ("train/gradient_norm", Some(f64::from(step.gradient_norm))),
                ("train/tokens", Some(step.tokens as f64)),
                ("time/step_seconds", Some(step.seconds)),
                ("time/data_wait_seconds", Some(step.data_wait_seconds)),
            ];
            (step.step, named(&values))
        }
        Metric::Eval(eval) => {
            let mut values = vec![(format!("eval/{}/loss", eval.set), eval.loss)];
            values.extend(eval.sure.map(|sure| (format!("eval/{}/sure", eval.set), sure)));
            (eval.step, values)
        }
        // How often which score occurred is no number.
        Metric::Scores(scores) => (scores.step, vec![]),
    }
}

/// A record: the length of its data, that length's checksum, the data, and theirs.
fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let checksums = [&length[..], data].map(|bytes| masked(crc32c::crc32c(bytes)).to_le_bytes());
    [&length[..], &checksums[0], data, &checksums[1]].concat()
}

/// A checksum as it is stored, so that one of data that hold checksums is no worse (`tensorflow/core/lib/hash/crc32c.h`).
fn masked(checksum: u32) -> u32 {
    checksum.rotate_right(15).wrapping_add(0xa282_ead8)
}
