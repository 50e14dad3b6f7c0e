//! The command line.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::anyhow;
use clap::builder::RangedU64ValueParser;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use sluice_schemas::names;
use sluice_text::{Fields, Format, output};

use crate::config::{self, Config, Scope};
use crate::dead_letters::Replay;
use crate::exit::{ExitCode as _, USAGE};
use crate::ingest::Ingest;
use crate::logging;
use crate::model_tools::{self, Inspect, ScoreText};
use crate::{dead_letters, dev_broker, ingest, serve, tokenizer, topics};

/// Scores a stream of tokenized documents with a reference model.
#[derive(Debug, Parser)]
#[command(name = "sluiced", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Score the documents topic until stopped.
    Serve(ConfigFile),
    /// Check configuration, model, tokenizer and broker as `serve` would, and say what is wrong.
    Validate(ConfigFile),
    /// Look into a model folder, or score text with it, without Kafka.
    #[command(subcommand)]
    Model(ModelCommand),
    /// Tokenize text and publish it to the documents topic.
    Ingest(IngestArgs),
    /// Train a tokenizer.
    #[command(subcommand)]
    Tokenizer(TokenizerCommand),
    /// Manage topics.
    #[command(subcommand)]
    Topics(TopicsCommand),
    /// Look after records that could not be scored.
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Run a broker in memory, for trying things out; prints its address.
    DevBroker(DevBrokerArgs),
}

#[derive(Debug, Args)]
struct ConfigFile {
    /// Settings in TOML; flags and environment variables win over it.
    #[arg(long, short, env = "SLUICED_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[allow(clippy::struct_field_names, reason = "the names are those of the flags")]
struct FieldArgs {
    /// Field of a JSON line that holds the text.
    #[arg(long, default_value = "text", value_name = "NAME")]
    text_field: String,
    /// Field of a JSON line that holds the document's id; file name and line number where it is missing.
    #[arg(long, default_value = "id", value_name = "NAME")]
    id_field: String,
    /// Field of a JSON line that says where the document comes from.
    #[arg(long, default_value = "source", value_name = "NAME")]
    source_field: String,
}

impl FieldArgs {
    fn fields(&self) -> Fields {
        Fields {
            text: self.text_field.clone(),
            id: self.id_field.clone(),
            source: self.source_field.clone(),
            context: None,
        }
    }
}

#[derive(Debug, Args)]
struct IngestArgs {
    /// Brokers to begin with, as HOST:PORT, separated by commas.
    #[arg(long, env = "SLUICED_KAFKA_BOOTSTRAP_SERVERS", value_name = "HOST:PORT")]
    bootstrap_servers: String,
    /// Topic of tokenized documents.
    #[arg(long, default_value = names::DOCUMENTS_TOPIC, env = "SLUICED_KAFKA_DOCUMENTS_TOPIC", value_name = "NAME")]
    topic: String,
    /// The tokenizer.json of the reference model and of the model in training.
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    #[command(flatten)]
    fields: FieldArgs,
    /// What the files are.
    #[arg(long, value_enum, default_value_t = Format::Auto)]
    format: Format,
    /// Source of documents that do not name their own.
    #[arg(long, default_value = "", value_name = "TEXT")]
    source: String,
    /// Begin every document with this token, by its name in tokenizer.json, such as <s>: where a model was trained with a BOS
    /// that is a token of the document. Leave it out where the daemon puts one there (score.bos).
    #[arg(long, value_name = "TOKEN")]
    begin_with: Option<String>,
    /// End every document with this token, such as <|endoftext|>, so that a model learns where a text ends.
    #[arg(long, value_name = "TOKEN")]
    end_with: Option<String>,
    #[command(flatten)]
    kafka: PropertyArgs,
    /// Most bytes of one record, as the broker's message.max.bytes.
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    record_bytes_max: u32,
    /// JSON Lines or plain text, as they are or compressed with gzip or zstd; `-` is standard input.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
struct PropertyArgs {
    /// Any other setting of librdkafka; may be repeated. `NAME.from_file=PATH` reads the value from a file.
    #[arg(
        long = "property",
        env = "SLUICED_KAFKA_PROPERTIES",
        hide_env_values = true,
        value_name = "NAME=VALUE",
        value_delimiter = ','
    )]
    properties: Vec<String>,
}

impl PropertyArgs {
    fn resolve(self) -> anyhow::Result<BTreeMap<String, String>> {
        // Not a parser of clap's, which repeats what it refuses, and that may be a secret.
        let pairs = self.properties.iter().map(|text| match text.split_once('=') {
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Err(anyhow!("a --property is not NAME=VALUE, such as security.protocol=SSL")),
        });
        sluice_kafka::resolve(&pairs.collect::<anyhow::Result<_>>().exit_code(USAGE)?).exit_code(USAGE)
    }
}

#[derive(Debug, Subcommand)]
enum ModelCommand {
    /// Print what was found in a model folder and what Sluice does to it.
    Inspect {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Run a short row on this device, as `model.device`, and list what ran where.
        #[arg(long, value_name = "DEVICE")]
        device: Option<String>,
        /// Class of a token classifier, as `model.class`.
        #[arg(long, value_name = "CLASS")]
        model_class: Option<String>,
        /// Path of libonnxruntime.so, as `model.onnxruntime`.
        #[arg(long, value_name = "FILE")]
        onnxruntime: Option<PathBuf>,
        /// Folder with model.onnx, tokenizer.json and config.json.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
    },
    /// Score text and print each document's losses as a line of JSON; null where a token has no prediction. Of a token
    /// classifier, the probabilities of its class.
    Score(ModelScoreArgs),
}

#[derive(Debug, Args)]
struct ModelScoreArgs {
    #[command(flatten)]
    file: ConfigFile,
    /// Print one line for all documents: their number, tokens, mean loss and perplexity; of a token classifier the mean
    /// probability.
    #[arg(long)]
    summary: bool,
    #[command(flatten)]
    fields: FieldArgs,
    /// What the files are.
    #[arg(long, value_enum, default_value_t = Format::Auto)]
    format: Format,
    /// JSON Lines or plain text, as they are or compressed with gzip or zstd; `-` is standard input.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// From the 256 bytes and the end of text, which are always there, to more than any tokenizer has; memory is taken for all of
/// them at once.
fn vocabulary_sizes() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(257..=1 << 24)
}

#[derive(Debug, Subcommand)]
enum TokenizerCommand {
    /// Train a byte-level BPE with single digits.
    Train {
        /// Number of token ids.
        #[arg(long, default_value_t = 4096, value_name = "N", value_parser = vocabulary_sizes())]
        vocab_size: usize,
        /// Where to write tokenizer.json.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        #[command(flatten)]
        fields: FieldArgs,
        /// JSON Lines or plain text.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
enum TopicsCommand {
    /// Create topics that do not exist yet.
    Create {
        /// Brokers to begin with, as HOST:PORT, separated by commas.
        #[arg(long, env = "SLUICED_KAFKA_BOOTSTRAP_SERVERS", value_name = "HOST:PORT")]
        bootstrap_servers: String,
        /// Copies of each partition [default: 1].
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
        replication: Option<i32>,
        #[command(flatten)]
        kafka: PropertyArgs,
        /// Topics, as NAME:PARTITIONS.
        #[arg(required = true, value_name = "NAME:PARTITIONS")]
        topics: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum DeadLettersCommand {
    /// Bring dead letters of one reason back to the documents topic, each once however often this runs.
    Replay(ReplayArgs),
}

#[derive(Debug, Args)]
struct ReplayArgs {
    /// Brokers to begin with, as HOST:PORT, separated by commas.
    #[arg(long, env = "SLUICED_KAFKA_BOOTSTRAP_SERVERS", value_name = "HOST:PORT")]
    bootstrap_servers: String,
    /// Topic of dead letters.
    #[arg(long, default_value = names::DEAD_LETTER_TOPIC, env = "SLUICED_KAFKA_DEAD_LETTER_TOPIC", value_name = "NAME")]
    dead_letter_topic: String,
    /// Topic that they come back to; letters that came from another stay.
    #[arg(long, default_value = names::DOCUMENTS_TOPIC, env = "SLUICED_KAFKA_DOCUMENTS_TOPIC", value_name = "NAME")]
    documents_topic: String,
    /// The reason in their header `sluice-error`, such as `foreign_tokenizer`.
    #[arg(long, value_name = "REASON")]
    reason: String,
    /// Only say how many there are.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    kafka: PropertyArgs,
    /// Most bytes of one record, as the broker's message.max.bytes.
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    record_bytes_max: u32,
}

#[derive(Debug, Args)]
struct DevBrokerArgs {
    /// A topic to create, as NAME:PARTITIONS; may be repeated.
    #[arg(long = "topic", value_name = "NAME:PARTITIONS")]
    topics: Vec<String>,
    /// Stop when standard input ends, so that no broker outlives the program that started it.
    #[arg(long)]
    until_stdin_closes: bool,
}

/// The whole command line, with a flag for every setting.
pub fn command() -> clap::Command {
    Cli::command()
        .mut_subcommand("serve", config::add_flags)
        .mut_subcommand("validate", config::add_flags)
        .mut_subcommand("model", |model| {
            model.mut_subcommand("score", |score| config::add_flags_of(score, Scope::Model))
        })
}

/// Does what the process's arguments say.
pub fn run() -> anyhow::Result<()> {
    let matches = command().try_get_matches().unwrap_or_else(|error| {
        // `--help` and `--version` come this way too.
        std::process::exit(output::print_clap(&error, USAGE).into())
    });
    let cli = Cli::from_arg_matches(&matches).exit_code(USAGE)?;
    let configured = |file: &ConfigFile, scope: Scope| -> anyhow::Result<Config> {
        let mut of_command = &matches;
        while let Some((_, inner)) = of_command.subcommand() {
            of_command = inner;
        }
        let config = config::load_of(file.config.as_deref(), of_command, scope).exit_code(USAGE)?;
        logging::start(&config.log).exit_code(USAGE)?;
        for name in config::foreign_variables().exit_code(USAGE)? {
            tracing::warn!(
                name,
                "this environment variable sets nothing; `sluiced serve --help` lists those that do"
            );
        }
        Ok(config)
    };
    match &cli.command {
        Command::Serve(file) => {
            let config = configured(file, Scope::Daemon)?;
            let (_, flags) = matches.subcommand().unwrap_or(("", &matches));
            let (path, flags) = (file.config.clone(), flags.clone());
            return serve::serve(&config, Box::new(move || config::load(path.as_deref(), &flags)));
        }
        Command::Validate(file) => return serve::validate(&configured(file, Scope::Daemon)?),
        Command::Model(ModelCommand::Score(args)) => {
            let asked = ScoreText {
                fields: args.fields.fields(),
                format: args.format,
                summary: args.summary,
                files: args.files.clone(),
            };
            return model_tools::score(&configured(&args.file, Scope::Model)?, &asked);
        }
        _ => logging::start(&config::Log::default()).exit_code(USAGE)?,
    }
    match cli.command {
        Command::Ingest(args) => ingest::run(&Ingest {
            bootstrap_servers: args.bootstrap_servers,
            topic: args.topic,
            tokenizer: args.tokenizer,
            fields: args.fields.fields(),
            format: args.format,
            source: args.source,
            begin_with: args.begin_with,
            end_with: args.end_with,
            properties: args.kafka.resolve()?,
            record_bytes_max: args.record_bytes_max,
            files: args.files,
        }),
        Command::Tokenizer(TokenizerCommand::Train { vocab_size, out, fields, files }) => {
            tokenizer::train(&files, &fields.fields(), vocab_size, &out)
        }
        Command::Topics(TopicsCommand::Create { bootstrap_servers, replication, kafka, topics }) => {
            topics::create(&bootstrap_servers, &kafka.resolve()?, &topics, replication)
        }
        Command::DeadLetters(DeadLettersCommand::Replay(args)) => dead_letters::replay(&Replay {
            bootstrap_servers: args.bootstrap_servers,
            dead_letter_topic: args.dead_letter_topic,
            documents_topic: args.documents_topic,
            reason: args.reason,
            dry_run: args.dry_run,
            properties: args.kafka.resolve()?,
            record_bytes_max: args.record_bytes_max,
        }),
        Command::DevBroker(args) => dev_broker::run(&args.topics, args.until_stdin_closes),
        Command::Model(ModelCommand::Inspect { json, device, model_class, onnxruntime, folder }) => {
            let library = onnxruntime.unwrap_or_default();
            model_tools::inspect(&Inspect { folder, library, device, class: model_class, json })
        }
        Command::Serve(_) | Command::Validate(_) | Command::Model(ModelCommand::Score(_)) => Ok(()),
    }
}
