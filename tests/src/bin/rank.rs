//! One rank of a group, for the tests: reads its lanes of a scored topic and prints what it would learn from.
//!
//! Exit codes: 0 the data has ended, 64 the run cannot be dealt to so many ranks or is not the checkpoint's, 1 it failed.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser;
use sluice_feed::batch::PackedBatch;
use sluice_feed::feed::{Feed, Step};
use sluice_feed::pack::{BatchShape, Packing};
use sluice_feed::plan::{Identity, Plan};
use sluice_feed::snapshot::Snapshot;
use sluice_feed::stream::{Broker, Decoder, Extent, Shard, StreamError, TopicKind};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_tests::ranks::{Member, checkpoint, whole_checkpoint};
use sluice_text::output::say;

const WRONG_USE: u8 = 64;
/// At the end of a partition a broker would wait half a second for more.
const FETCH_WAIT_MS: &str = "10";

/// One rank of a group.
#[derive(Debug, Parser)]
struct Arguments {
    /// Kafka brokers, `host:port,...`.
    #[arg(long)]
    bootstrap_servers: String,
    /// The scored topic.
    #[arg(long)]
    topic: String,
    /// Which rank, from 0.
    #[arg(long)]
    rank: usize,
    /// Ranks of the group.
    #[arg(long)]
    world_size: usize,
    /// Where ranks agree.
    #[arg(long)]
    hub: SocketAddr,
    /// Rows of a micro-batch.
    #[arg(long)]
    rows: usize,
    /// Tokens of a row.
    #[arg(long)]
    len: usize,
    /// Micro-batches of a step, over all ranks.
    #[arg(long)]
    micro_batches: usize,
    /// Documents in the shuffle buffers, over all lanes.
    #[arg(long)]
    shuffle_buffer: usize,
    /// Seed of the shuffle buffers.
    #[arg(long)]
    seed: u64,
    /// Passes over the topic.
    #[arg(long)]
    epochs: u64,
    /// Steps between checkpoints.
    #[arg(long)]
    checkpoint_every: u64,
    /// Where checkpoints are kept.
    #[arg(long)]
    state: PathBuf,
    /// Fingerprint of the tokenizer.
    #[arg(long)]
    tokenizer_fingerprint: Fingerprint,
    /// Token ids are below this.
    #[arg(long)]
    vocabulary: u32,
    /// Reference models whose records are taken; of none, those of the first record's.
    #[arg(long, value_delimiter = ',')]
    allow_reference_models: Vec<Fingerprint>,
    /// Go on after this step, from its checkpoint.
    #[arg(long)]
    resume_from: Option<u64>,
    /// End after this step, if the data has not ended before.
    #[arg(long)]
    steps: Option<u64>,
}

/// A checkpoint that is of another run; what differs, in words.
#[derive(Debug)]
struct OtherRun(&'static str);

impl std::fmt::Display for OtherRun {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "the checkpoint is of another run: {} differs", self.0)
    }
}

impl std::error::Error for OtherRun {}

fn main() -> ExitCode {
    let Err(error) = run(&Arguments::parse()) else { return ExitCode::SUCCESS };
    say(format_args!("{error:#}"));
    let is_shard = matches!(error.downcast_ref(), Some(StreamError::Shard { .. }));
    if is_shard || error.is::<OtherRun>() { ExitCode::from(WRONG_USE) } else { ExitCode::FAILURE }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut feed = open(arguments)?;
    let mut group = Member::join(arguments.hub)?;
    if !group.is_equal(feed.identity().fingerprint()).map_err(anyhow::Error::msg)? {
        anyhow::bail!("the ranks of the group are not of one run");
    }
    let mut step = arguments.resume_from.unwrap_or(0);
    while arguments.steps.is_none_or(|steps| step < steps) {
        match feed.next_step(&mut group)? {
            Step::Batches(batches) => {
                step += 1;
                print(step, &batches)?;
            }
            Step::Ended => break,
            Step::Stopped => anyhow::bail!("nobody has asked to stop"),
        }
        if step.is_multiple_of(arguments.checkpoint_every) {
            write(&feed.snapshot(), arguments, step)?;
        }
    }
    Ok(())
}

fn open(arguments: &Arguments) -> anyhow::Result<Feed> {
    let plan = Plan {
        topic: arguments.topic.clone(),
        extent: Extent::UntilEnd { epochs: arguments.epochs },
        shape: BatchShape { rows: arguments.rows, len: arguments.len },
        packing: Packing::default(),
        micro_batches: arguments.micro_batches,
        shuffle_buffer: arguments.shuffle_buffer,
        seed: arguments.seed,
    };
    let tokenizer = arguments.tokenizer_fingerprint;
    let snapshot = arguments.resume_from.map(|step| read(arguments, step)).transpose()?;
    if let Some(snapshot) = &snapshot {
        let own = Identity { tokenizer, reference_model: None, plan: plan.clone() };
        if let Some(difference) = own.difference(&snapshot.identity) {
            return Err(OtherRun(difference).into());
        }
    }
    let shard = Shard::new(arguments.rank, arguments.world_size)?;
    let properties = vec![("fetch.wait.max.ms".to_owned(), FETCH_WAIT_MS.to_owned())];
    let broker = Broker::new(arguments.bootstrap_servers.clone(), properties)?;
    let decoder = Decoder::new(TopicKind::Scored, tokenizer, arguments.vocabulary)
        .allowing(&arguments.allow_reference_models);
    let stop = Arc::default();
    Ok(Feed::open(broker, plan, shard, snapshot.as_ref(), decoder, stop)?)
}

/// A line for each micro-batch, all of them out before this returns.
fn print(step: u64, batches: &[PackedBatch]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    for packed in batches {
        let ids: Vec<&str> = packed.rows.iter().flatten().map(|piece| piece.document.id()).collect();
        let line = serde_json::json!({
            "step": step,
            "number": packed.number,
            "lane": packed.lane,
            "digest": packed.digest().to_string(),
            "documents": ids,
        });
        writeln!(stdout, "{line}")?;
    }
    stdout.flush()?;
    Ok(())
}

/// The parts of all ranks, however many there were.
fn read(arguments: &Arguments, step: u64) -> anyhow::Result<Snapshot> {
    let files =
        whole_checkpoint(&arguments.state, step).with_context(|| format!("no checkpoint of step {step}"))?;
    let parts = files.iter().map(|file| Ok(Snapshot::from_bytes(&fs::read(file)?)?));
    let whole = Snapshot::merged(parts.collect::<anyhow::Result<_>>()?)?;
    whole.check(arguments.vocabulary)?;
    Ok(whole)
}

/// A file that is there whole or not at all, whenever the process is killed.
fn write(part: &Snapshot, arguments: &Arguments, step: u64) -> anyhow::Result<()> {
    let path = checkpoint(&arguments.state, step, (arguments.rank, arguments.world_size));
    let partial = path.with_extension("partial");
    fs::create_dir_all(path.parent().context("it lies in its step's folder")?)?;
    let mut file = File::create(&partial)?;
    file.write_all(&part.to_bytes()?)?;
    file.sync_all()?;
    fs::rename(partial, path)?;
    Ok(())
}
