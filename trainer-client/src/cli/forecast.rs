//! `sluice-train forecast`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use sluice_feed::pack::BatchShape;
use sluice_feed::select::Score;
use sluice_feed::stream::{Extent, StreamError};
use sluice_text::output::{print_line, say};

use super::arguments::{BrokerArguments, between};
use super::model::{DeviceArguments, initial, longest_sequence};
use super::optimization::BatchArguments;
use super::source::{ScoredArguments, Source};
use crate::failure::Classify;
use crate::forecast::map::Map;
use crate::forecast::page::page;
use crate::forecast::sample::{Base, Ending, Sample};
use crate::forecast::{About, Forecast};
use crate::model::BurnLearner;
use crate::model::optimizer::AdamWConfig;
use crate::text::{Bounds, TextTokenizer};
use crate::training::files;
use crate::training::learner::Learner;
use crate::watch::process::stop_on_signals;
use crate::watch::progress::SampleProgress;

/// Most documents that can be asked for: some numbers of each are held in memory.
const DOCUMENTS_MAX: usize = 10_000_000;

/// Arguments of `sluice-train forecast`.
#[derive(Args, Clone, Debug)]
pub(super) struct ForecastArguments {
    #[command(flatten)]
    scored: ScoredArguments,
    /// Documents to read, the first of each partition in turn; Ctrl-C ends it earlier and says what was found until then
    #[arg(long, env = "SLUICE_TRAIN_DOCUMENTS", default_value_t = 2000, value_parser = between::<1, DOCUMENTS_MAX>)]
    documents: usize,
    /// The model that will be trained, as `run --init` takes it; without one the sources are listed, and nothing can be said of
    /// what would be kept
    #[arg(long, env = "SLUICE_TRAIN_INIT", value_name = "FOLDER")]
    init: Option<PathBuf>,
    /// Source of documents that the run is meant for; repeatable, in the environment one a line
    /// [default: those on which the reference is better]
    #[arg(
        long = "target-source",
        env = "SLUICE_TRAIN_TARGET_SOURCE",
        value_name = "NAME",
        value_delimiter = '\n'
    )]
    target_sources: Vec<String>,
    /// Print one object of JSON
    #[arg(long, env = "SLUICE_TRAIN_JSON")]
    json: bool,
    #[command(flatten)]
    batch: BatchArguments,
    #[command(flatten)]
    broker: BrokerArguments,
    #[command(flatten)]
    device: DeviceArguments,
}

/// Says from a sample whether selection can be expected to help.
pub(super) fn forecast(arguments: &ForecastArguments) -> anyhow::Result<()> {
    let ForecastArguments { scored, documents, target_sources, .. } = arguments;
    files::check(&scored.files).or_usage()?;
    let map = Map::embedded()?;
    let stop = stop_on_signals()?;
    let broker = arguments.broker.broker()?;
    let tokenizer = Arc::new(TextTokenizer::read(&scored.tokenizer)?);
    // What is chosen by; records of a token classifier have no losses.
    let needs = Score::Excess.needs();
    let source = scored.source(broker, Arc::clone(&tokenizer), Bounds::default(), needs, Arc::clone(&stop));
    let base = arguments.base(&source, &tokenizer)?;
    if base.is_none() && arguments.init.is_some() {
        say_stopped();
        return Ok(());
    }
    let mut progress = SampleProgress::new("forecast", *documents as u64);
    let sample = Sample::read(
        source.documents(&scored.topic)?,
        *documents,
        target_sources,
        base.as_ref().map(|(learner, shape)| Base { learner: learner as &dyn Learner, shape: *shape }),
        &stop,
        &mut |documents, tokens| progress.read(documents, tokens),
    );
    progress.finish();
    let sample = sample?;
    if sample.documents.iter().all(|document| document.tokens == 0) && sample.ending == Ending::Stopped {
        say_stopped();
        return Ok(());
    }
    if sample.documents.is_empty() {
        return Err(StreamError::EmptyTopic(source.name(&scored.topic)?).into());
    }
    let about = About {
        documents_of: match scored.files.as_slice() {
            [] => format!("topic {}", scored.topic),
            [file] => file.display().to_string(),
            files => format!("{} files", files.len()),
        },
        base_model: arguments.init.as_ref().map(|folder| folder.display().to_string()),
        sequence_length: base.as_ref().map(|(_, shape)| shape.len),
        target_sources: target_sources.clone(),
        with_base: arguments.with_base(),
    };
    let forecast = Forecast::of(&sample, about, &map).or_data()?;
    let shown = if arguments.json {
        serde_json::to_string_pretty(&forecast).context("cannot encode the forecast")?
    } else {
        page(&forecast)
    };
    // Whoever has closed the pipe has seen enough.
    print_line(&shown)?;
    Ok(())
}

fn say_stopped() {
    say(format_args!("stopped by a signal before a token was looked at"));
}

impl ForecastArguments {
    /// The base model, and the micro-batches that it is measured in; `None` where none was given, and where somebody asked to
    /// stop before the topic held a record that says how long sequences are.
    fn base(
        &self,
        source: &Source,
        tokenizer: &TextTokenizer,
    ) -> anyhow::Result<Option<(BurnLearner, BatchShape)>> {
        let Some(folder) = &self.init else { return Ok(None) };
        let device = self.device.open()?;
        let BatchArguments { batch_size: rows, sequence_length } = self.batch;
        let extent = Extent::UntilEnd { epochs: 1 };
        let len = match sequence_length {
            Some(len) => Some(len),
            None => source.sequence_length(&self.scored.topic, extent, longest_sequence(folder)?, rows)?,
        };
        let Some(len) = len else { return Ok(None) };
        let shape = BatchShape { rows, len };
        shape.check().map_err(StreamError::Plan)?;
        let mut learner = initial(folder, device, tokenizer, len, AdamWConfig::default())?;
        learner.compute_in(self.device.precision);
        Ok(Some((learner, shape)))
    }

    /// This command with a base model, as somebody would type it. Values of properties may be secrets, and are left out.
    fn with_base(&self) -> String {
        let mut command = "sluice-train forecast".to_owned();
        let mut add = |flag: &str, value: &str| {
            // Text into a string cannot fail.
            let _ = write!(command, " {flag} {}", quoted(value));
        };
        if self.scored.files.is_empty() {
            add("--bootstrap-servers", &self.broker.bootstrap_servers);
            for name in self.broker.property_names() {
                add("--property", &format!("{name}=..."));
            }
            add("--topic", &self.scored.topic);
        }
        for file in &self.scored.files {
            add("--files", &file.to_string_lossy());
        }
        add("--tokenizer", &self.scored.tokenizer.to_string_lossy());
        for model in &self.scored.reference_models {
            add("--reference-model", &model.to_string());
        }
        for source in &self.target_sources {
            add("--target-source", source);
        }
        add("--documents", &self.documents.to_string());
        add("--init", "BASE_FOLDER");
        command
    }
}

/// A word as a shell takes it for one.
fn quoted(word: &str) -> String {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "_-./:,=@%+".contains(letter);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_word_stays_one_in_a_shell() {
        for (word, expected) in
            [("a/b.json", "a/b.json"), ("two words", "'two words'"), ("it's", r"'it'\''s'"), ("", "''")]
        {
            assert_eq!(quoted(word), expected);
        }
    }
}
