//! How far a run has come, on standard error: a bar on a terminal, a line now and then elsewhere.

use std::io::Write;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sluice_text::output::say;

use crate::run::metrics::StepMetric;

/// Lines over a whole run where there is no terminal.
const LINES: u64 = 20;
/// Steps over which the shown figures are averaged, as the weight of the newest.
const NEWEST_WEIGHT: f64 = 0.1;

/// Shows steps as they are done.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    is_silent: bool,
    steps: u64,
    started: Instant,
    loss: Option<f64>,
    tokens_before: u64,
    seconds: f64,
    waited: f64,
    tokens: u64,
}

impl Progress {
    /// A bar over `steps` steps.
    pub fn new(label: &str, steps: u64) -> Self {
        Self {
            bar: bar(label, steps),
            is_silent: false,
            steps,
            started: Instant::now(),
            loss: None,
            tokens_before: 0,
            seconds: 0.0,
            waited: 0.0,
            tokens: 0,
        }
    }

    /// Shows nothing.
    pub fn silent() -> Self {
        let progress = Self { is_silent: true, ..Self::new("", 0) };
        progress.bar.set_draw_target(ProgressDrawTarget::hidden());
        progress
    }

    /// Shows a step.
    pub fn step(&mut self, metric: &StepMetric) {
        if let Some(newest) = metric.loss.map(f64::from) {
            self.loss = Some(self.loss.map_or(newest, |mean| mean + NEWEST_WEIGHT * (newest - mean)));
        }
        let loss = self.loss.map_or("–".to_owned(), |loss| format!("{loss:.3}"));
        self.tokens += metric.tokens - self.tokens_before;
        self.tokens_before = metric.tokens;
        self.seconds += metric.seconds;
        self.waited += metric.data_wait_seconds;
        let message = format!(
            "loss {loss} · kept {:.0} % · {:.0} tokens/s · waiting {:.0} %",
            100.0 * metric.kept as f64 / metric.scored.max(1) as f64,
            self.tokens as f64 / self.seconds.max(f64::EPSILON),
            100.0 * self.waited / self.seconds.max(f64::EPSILON),
        );
        self.bar.set_position(metric.step);
        if self.bar.is_hidden() && self.is_due(metric.step) {
            let elapsed = self.started.elapsed().as_secs();
            let (label, step) = (self.bar.prefix(), metric.step);
            self.print(&format!("{label} step {step}/{} [{elapsed} s] {message}", self.steps));
        }
        self.bar.set_message(message);
    }

    /// Says something without tearing the bar.
    pub fn say(&self, line: &str) {
        if self.bar.is_hidden() { self.print(line) } else { self.bar.println(line) }
    }

    /// Leaves the bar as it stands.
    pub fn finish(&self) {
        self.bar.abandon();
    }

    fn is_due(&self, step: u64) -> bool {
        step == 1 || step == self.steps || step.is_multiple_of((self.steps / LINES).max(1))
    }

    fn print(&self, line: &str) {
        if !self.is_silent {
            // A closed terminal or pipe is no reason to end a run, as `eprintln!` would.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

/// Shows how much of a sample has been read.
#[derive(Debug)]
pub struct SampleProgress {
    bar: ProgressBar,
    documents_max: u64,
    /// Documents that had been read when a line was printed last.
    said: u64,
}

impl SampleProgress {
    /// A bar over `documents_max` documents.
    pub fn new(label: &str, documents_max: u64) -> Self {
        Self { bar: bar(label, documents_max), documents_max, said: 0 }
    }

    /// Shows that so many documents have been read, and so many of their tokens looked at.
    pub fn read(&mut self, documents: u64, tokens: u64) {
        let message = format!("documents · {tokens} tokens");
        self.bar.set_position(documents);
        if self.bar.is_hidden() && documents - self.said >= (self.documents_max / LINES).max(1) {
            self.said = documents;
            let (label, of) = (self.bar.prefix(), self.documents_max);
            say(format_args!("{label} {documents}/{of} {message}"));
        }
        self.bar.set_message(message);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn bar(label: &str, len: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr());
    if let Ok(style) =
        ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} [{elapsed}<{eta}] {wide_msg}")
    {
        bar.set_style(style);
    }
    bar.set_prefix(label.to_owned());
    bar
}
