//! `PyTorch` ranks under torchrun and FSDP2 on a real Kafka (`trainer-client/python/examples/fsdp2.py`): what they learn from is
//! what the Rust feed gives, on any number of ranks and after any kill.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sluice_schemas::fingerprint::Fingerprint;
use sluice_tests::produce;
use sluice_tests::ranks::{Line, run};

#[path = "ranks/topic.rs"]
#[allow(dead_code, reason = "the tests of ranks use the rest")]
mod topic;

use topic::{EPOCHS, Fixture, LONG, ROW, ROWS, SHORT, TOPIC, VOCABULARY, scored, tokenizer, tokenizer_json};

/// Ample time for processes that import `PyTorch` on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_mins(5);
const POLL: Duration = Duration::from_millis(5);
const CHECKPOINT_EVERY: u64 = 3;
const LONG_TOPIC: &str = "long";

/// Micro-batches by step and number.
type Steps = BTreeMap<(u64, u64), Line>;

/// A kill of a run.
#[derive(Clone, Copy, Debug)]
struct Kill {
    /// Once rank 0 has written down this step.
    step: u64,
    delay: Duration,
    /// Which of the ranks; all of them, and torchrun, where it is none.
    rank: Option<usize>,
}

#[test]
fn ranks_killed_under_torchrun_go_on_as_another_number_of_ranks() {
    let seeds = std::env::var("SLUICE_TEST_SEEDS").map_or(2, |seeds| seeds.parse().unwrap());
    let fixture = Fixture::shared();
    for seed in 0..seeds {
        killed(&fixture, seed);
    }
}

/// `trainer-client/python/tests/kafka`, over this topic.
#[test]
fn the_stream_in_python_keeps_its_promises() {
    let fixture = Fixture::shared();
    write_long_topic(&fixture);
    let settings = serde_json::json!({
        "topic": TOPIC,
        "bootstrap_servers": fixture.kafka.bootstrap_servers,
        "tokenizer": tokenizer().to_string(),
        "vocab_size": VOCABULARY,
        "batch_size": ROWS,
        "sequence_length": ROW,
        "micro_batches": 8,
        "shuffle_buffer": 40,
        "epochs": EPOCHS,
        "reference_models": models(),
        "digests": true,
    });
    let folder = tempfile::tempdir().unwrap();
    let tokenizer_file = folder.path().join("tokenizer.json");
    fs::write(&tokenizer_file, tokenizer_json()).unwrap();
    let tests = sluice_tests::root().join("trainer-client/python/tests/kafka");
    let output = Command::new(sluice_tests::torch_python())
        .args(["-B", "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"])
        .arg(tests)
        .env("SLUICE_TEST_STREAM", settings.to_string())
        .env("SLUICE_TEST_TOKENIZER", &tokenizer_file)
        .env("OMP_NUM_THREADS", "1")
        .output()
        .unwrap();
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{stdout}{stderr}");
}

/// A topic of some 12,000 micro-batches in one pass.
fn write_long_topic(fixture: &Fixture) {
    fixture.kafka.create_topic(LONG_TOPIC, 8);
    let mut random = fastrand::Rng::with_seed(1);
    let documents: Vec<_> = (0..36_000)
        .map(|number| {
            let length = random.usize(40..=48);
            let document = scored(&mut random, format!("long/{number}"), length, SHORT.0, SHORT.1);
            (document.document.id.clone(), document.encode())
        })
        .collect();
    let records: Vec<_> =
        documents.iter().map(|(id, payload)| (id.as_str(), Some(payload.clone()))).collect();
    produce(&fixture.kafka.bootstrap_servers, LONG_TOPIC, &records);
}

/// Fingerprints of the topic's reference models.
fn models() -> [String; 2] {
    [SHORT, LONG].map(|(model, _)| Fingerprint::of_bytes(model.as_bytes()).to_string())
}

/// One run on two ranks that is killed, gone on with as one, killed again, and gone on with as four.
fn killed(fixture: &Fixture, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let [state, out] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let rust = fixture.settings(state.path()).with("--seed", &seed).with("--checkpoint-every", &u64::MAX);
    let reference = run(&rust, 1, None, None).well();
    let mut wanted = Steps::new();
    add(&mut wanted, reference.lines().cloned());
    let (last_step, _) = *wanted.last_key_value().unwrap().0;

    let mut found = Steps::new();
    let mut from = 0;
    for (world_size, is_last) in [(2, false), (if seed.is_multiple_of(2) { 1 } else { 2 }, false), (4, true)]
    {
        let kill = (!is_last).then(|| Kill {
            step: random.u64(from + 1..=from + (last_step - from) / 2),
            delay: Duration::from_micros(random.u64(0..200_000)),
            rank: (seed % 2 == 1).then(|| random.usize(0..world_size)),
        });
        let what = format!("seed {seed}, {world_size} ranks from step {from}, {kill:?}");
        let lines = torchrun(fixture, out.path(), seed, world_size, kill, &what);
        for line in lines.iter().filter(|line| line.number.is_some()) {
            assert_eq!(wanted.get(&(line.step, line.number.unwrap())), Some(line), "{what}");
        }
        // What came after the checkpoint is learnt from once more, by weights that have not seen it.
        let reached = if is_last { last_step } else { last_checkpoint(out.path()) };
        add(&mut found, lines.into_iter().filter(|line| line.step <= reached));
        from = reached;
    }
    assert_eq!(found.len(), wanted.len(), "seed {seed}: every micro-batch once");
    assert_eq!(last_checkpoint(out.path()), last_step, "seed {seed}");
}

/// Adds what ranks have written down; a micro-batch that is there already is one too many.
fn add(steps: &mut Steps, lines: impl Iterator<Item = Line>) {
    for line in lines {
        let Some(number) = line.number else { continue };
        let earlier = steps.insert((line.step, number), line.clone());
        assert_eq!(earlier, None, "given out twice: {line:?}");
    }
}

/// Runs the example to its end or its kill; what its ranks have written down meanwhile.
fn torchrun(
    fixture: &Fixture,
    out: &Path,
    seed: u64,
    world_size: usize,
    kill: Option<Kill>,
    what: &str,
) -> Vec<Line> {
    let python = sluice_tests::torch_python();
    let root = sluice_tests::root();
    let log = out.join("torchrun.log");
    let stderr = fs::File::create(&log).unwrap();
    let mut command = Command::new(python);
    command
        .args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", &world_size.to_string()])
        .arg(root.join("trainer-client/python/examples/fsdp2.py"))
        .args(["--topic", TOPIC, "--bootstrap-servers", &fixture.kafka.bootstrap_servers])
        .args(["--tokenizer", &tokenizer().to_string(), "--vocab-size", &VOCABULARY.to_string()])
        .args(["--batch-size", &ROWS.to_string(), "--sequence-length", &ROW.to_string()])
        .args(["--micro-batches", "8", "--shuffle-buffer", "40", "--seed", &seed.to_string()])
        .args(["--epochs", &EPOCHS.to_string(), "--checkpoint-every", &CHECKPOINT_EVERY.to_string()])
        .args(models().iter().flat_map(|model| ["--reference-model", model]))
        .args(["--log-documents", "--out"])
        .arg(out)
        // Ranks on one machine share its two cores, and talk over loopback alone.
        .envs([("OMP_NUM_THREADS", "1"), ("GLOO_SOCKET_IFNAME", "lo")])
        .stdout(Stdio::null())
        .stderr(stderr)
        .process_group(0);
    let mut job = Job(command.spawn().unwrap());
    let deadline = Instant::now() + PATIENCE;
    let mut is_killed = false;
    let status = loop {
        if let Some(status) = job.0.try_wait().unwrap() {
            break status;
        }
        if let Some(kill) = kill.filter(|kill| !is_killed && has_reached(out, kill.step)) {
            std::thread::sleep(kill.delay);
            job.kill(kill.rank);
            is_killed = true;
        }
        let said = || fs::read_to_string(&log).unwrap_or_default();
        assert!(Instant::now() < deadline, "{what}: it has not ended: {}", said());
        std::thread::sleep(POLL);
    };
    let said = fs::read_to_string(&log).unwrap_or_default();
    assert_eq!(is_killed, kill.is_some(), "{what}: it ended with {status} before its kill: {said}");
    assert_eq!(status.success(), kill.is_none(), "{what}: it ended with {status}: {said}");
    logs(out).iter().flat_map(|path| lines_of(path, true)).collect()
}

/// torchrun and its ranks; all of them are killed with this value.
struct Job(Child);

impl Job {
    fn kill(&mut self, rank: Option<usize>) {
        let ranks = self.ranks();
        if let Some(rank) = rank {
            kill(ranks[rank]);
        } else {
            let _ = self.0.kill();
            ranks.into_iter().for_each(kill);
        }
    }

    /// Processes of the ranks, which torchrun starts in the order of their numbers.
    fn ranks(&self) -> Vec<u32> {
        let pid = self.0.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.kill(None);
        let _ = self.0.wait();
    }
}

fn kill(pid: u32) {
    // Fails where it has just ended, which is for the test to see.
    let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
}

fn has_reached(out: &Path, step: u64) -> bool {
    lines_of(&out.join("documents-0.jsonl"), false).iter().any(|line| line.step >= step)
}

fn logs(out: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl")).collect()
}

/// The whole lines of a rank's log, which is removed if nothing more is read from it.
fn lines_of(path: &Path, remove: bool) -> Vec<Line> {
    let text = fs::read_to_string(path).unwrap_or_default();
    if remove {
        fs::remove_file(path).unwrap();
    }
    // A line that was cut off by a kill is none.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(Line::parse).collect()
}

/// The step of the last checkpoint that is whole.
fn last_checkpoint(out: &Path) -> u64 {
    let folders = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path());
    let whole = folders.filter(|folder| folder.join(".metadata").exists());
    let steps = whole.filter_map(|folder| folder.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok());
    steps.max().unwrap_or(0)
}
