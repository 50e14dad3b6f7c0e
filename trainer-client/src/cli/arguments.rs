//! Flags that several commands share: where the broker is, and what is written where.

use std::path::PathBuf;

use clap::Args;
use sluice_feed::stream::Broker;

use crate::failure::{Classify, Failure};
use crate::text::{Bounds, TextTokenizer};
use crate::training::evaluate::EvalFile;
use crate::training::setup::Output;
use crate::watch::http;
use crate::watch::telemetry::Telemetry;

/// Where the broker is.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Kafka")]
pub(super) struct BrokerArguments {
    /// Addresses of Kafka brokers, host:port[,host:port]
    #[arg(long, env = "SLUICE_TRAIN_BOOTSTRAP_SERVERS", default_value = "localhost:9092")]
    pub bootstrap_servers: String,
    /// A further librdkafka setting; repeatable, in the environment one a line
    #[arg(
        long = "property",
        env = "SLUICE_TRAIN_PROPERTY",
        value_name = "KEY=VALUE",
        value_delimiter = '\n',
        hide_env_values = true
    )]
    properties: Vec<String>,
}

impl BrokerArguments {
    pub fn broker(&self) -> anyhow::Result<Broker> {
        // Not a parser of clap's, which repeats what it refuses, and that may hold a secret.
        let properties = self.properties.iter().map(|text| match text.split_once('=') {
            Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
            _ => {
                Err(Failure::Usage("a --property is not KEY=VALUE, such as security.protocol=SSL".to_owned()))
            }
        });
        Ok(Broker::new(self.bootstrap_servers.clone(), properties.collect::<Result<_, _>>()?)?)
    }

    /// Names of the further settings; values may be secrets.
    pub fn property_names(&self) -> impl Iterator<Item = &str> {
        self.properties.iter().filter_map(|text| text.split_once('=')).map(|(key, _)| key.trim())
    }
}

/// What stands around each text that is tokenized here: held-out texts, and those in local files.
#[derive(Args, Clone, Debug)]
pub(super) struct BoundsArguments {
    /// Name of a token that each text begins with, such as <s>, as `sluiced ingest --begin-with` gave it to the topic's
    #[arg(long, env = "SLUICE_TRAIN_BEGIN_WITH", value_name = "TOKEN")]
    pub begin_with: Option<String>,
    /// Name of a token that each text ends with, such as </s>
    #[arg(long, env = "SLUICE_TRAIN_END_WITH", value_name = "TOKEN")]
    pub end_with: Option<String>,
}

impl BoundsArguments {
    /// The tokens that are named.
    pub fn bounds(&self, tokenizer: &TextTokenizer) -> anyhow::Result<Bounds> {
        Bounds::named(tokenizer, self.begin_with.as_deref(), self.end_with.as_deref()).or_usage()
    }
}

/// What to write, and how often to look.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Output and evaluation")]
pub(super) struct OutputArguments {
    /// Folder of the run; must not hold one yet, unless it is resumed
    #[arg(long, env = "SLUICE_TRAIN_OUT", value_name = "FOLDER")]
    pub out: PathBuf,
    /// Held-out text to measure the loss on, JSON Lines with a "text" field; repeatable, in the environment one a line
    #[arg(long = "eval", env = "SLUICE_TRAIN_EVAL", value_name = "NAME=FILE", value_delimiter = '\n')]
    pub evals: Vec<EvalFile>,
    #[command(flatten)]
    pub bounds: BoundsArguments,
    /// Steps between evaluations
    #[arg(long, env = "SLUICE_TRAIN_EVAL_EVERY", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..))]
    pub eval_every: u64,
    /// Go on from the last checkpoint in --out, or begin where there is none
    #[arg(long, env = "SLUICE_TRAIN_RESUME")]
    pub resume: bool,
    /// Begin where this checkpoint of another run stands, with its model, its optimizer and its place in the data; what it
    /// does from there on may differ
    #[arg(long, env = "SLUICE_TRAIN_BRANCH_FROM", value_name = "CHECKPOINT", conflicts_with = "init")]
    pub branch_from: Option<PathBuf>,
    /// Write event files too, beside metrics.jsonl, for `tensorboard --logdir`
    #[arg(long, env = "SLUICE_TRAIN_TENSORBOARD")]
    pub tensorboard: bool,
    /// Checkpoints to keep: the last ones
    #[arg(long, env = "SLUICE_TRAIN_CHECKPOINTS_KEEP", default_value_t = 2, value_parser = at_least::<1>)]
    pub checkpoints_keep: usize,
    /// Keep the checkpoint with the lowest loss on this evaluation set too [default of reference: the first set]
    #[arg(long, env = "SLUICE_TRAIN_KEEP_BEST", value_name = "NAME")]
    pub keep_best: Option<String>,
    /// Write down which documents each step learnt from (documents.jsonl)
    #[arg(long, env = "SLUICE_TRAIN_LOG_DOCUMENTS")]
    pub log_documents: bool,
    /// Serve Prometheus metrics at http://HOST:PORT/metrics; port 0 takes a free one, and the log says which
    /// [default: not served]
    #[arg(long, env = "SLUICE_TRAIN_METRICS_LISTEN", value_name = "HOST:PORT")]
    pub metrics_listen: Option<String>,
    /// Write down the loss of every token of this evaluation set at each evaluation (token-losses/); repeatable, in the
    /// environment one a line
    #[arg(long, env = "SLUICE_TRAIN_TOKEN_LOSSES", value_name = "NAME", value_delimiter = '\n')]
    pub token_losses: Vec<String>,
    /// Steps between checkpoints; one follows the last step, or a signal, in any case
    #[arg(long, env = "SLUICE_TRAIN_CHECKPOINT_EVERY", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    pub checkpoint_every: u64,
}

impl OutputArguments {
    /// The same without clap.
    pub fn output(&self) -> Output {
        Output {
            folder: self.out.clone(),
            resume: self.resume,
            evals: self.evals.clone(),
            begin_with: self.bounds.begin_with.clone(),
            end_with: self.bounds.end_with.clone(),
            token_losses: self.token_losses.clone(),
            log_documents: self.log_documents,
            checkpoints_keep: self.checkpoints_keep,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            best_by: self.keep_best.clone(),
            branch_from: self.branch_from.clone(),
            tensorboard: self.tensorboard,
        }
    }

    /// The run's metrics, served where that was asked for.
    pub fn telemetry(&self) -> anyhow::Result<Telemetry> {
        let telemetry = Telemetry::default();
        if let Some(listen) = &self.metrics_listen {
            let is_address = listen
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
            if !is_address {
                let error = format!("--metrics-listen {listen:?} is not HOST:PORT, such as 127.0.0.1:9480");
                return Err(Failure::Usage(error).into());
            }
            let address = http::serve(listen, telemetry.clone())?;
            tracing::info!(%address, "serving /metrics");
        }
        Ok(telemetry)
    }
}

/// A whole number of at least `MIN`.
pub(super) fn at_least<const MIN: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= MIN => Ok(number),
        _ => Err(format!("must be a whole number of at least {MIN}")),
    }
}

/// A whole number of at least `MIN` and at most `MAX`.
pub(super) fn between<const MIN: usize, const MAX: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (MIN..=MAX).contains(&number) => Ok(number),
        _ => Err(format!("must be a whole number from {MIN} to {MAX}")),
    }
}

/// A number from 0 to 1.
pub(super) fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..=1.0).contains(&number) => Ok(number),
        _ => Err("must be a number from 0 to 1".to_owned()),
    }
}

/// A finite number above zero.
pub(super) fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("must be a number above 0".to_owned()),
    }
}
