//! The parts of the experiments, each done once: the students, and what all parts share.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sluice_trainer::run::files::{read_json, write_json};
use sluice_trainer::run::recorded::RecordedRun;
use sluice_trainer::text::{Bounds, TextTokenizer};
use sluice_trainer::training::evaluate::{EvalFile, EvalSet, read_sets};

use super::group::{BATCH_SIZE, SEQUENCE_LENGTH, Size};
use super::parts::{DONE_FILE, base_folder, model_folder, scoring_file, texts_folder};
use super::plan::{Plan, SHUFFLE_BUFFER, Student, TARGET};
use super::programs::{Programs, Running};
use super::reference::Stream;
use super::setting::Setting;
use super::templates::Templates;
use super::texts::{self, Prepared};
use crate::process::cpu_seconds;

/// Steps between checkpoints: what an interruption costs at most. Those of a pretrained model take seconds each.
const CHECKPOINT_EVERY: u64 = 100;
const CHECKPOINT_EVERY_PRETRAINED: u64 = 20;
/// Tokens between the starts of two windows of a long document: a quarter of a window is read twice, as context.
pub(super) const STRIDE: usize = SEQUENCE_LENGTH / 4 * 3;
/// The first evaluation set ([`TARGET`]), the templates that choose alone.
pub(super) const CHOOSING: &str = "math-choosing";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const CURATED_TOPIC: &str = "curated";
pub(super) const GENERAL_TOPIC: &str = "general";
pub(super) const MISMATCHED_TOPIC: &str = "mismatched";

/// What scoring a stream took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Scoring {
    /// Tokens of the documents.
    pub tokens: u64,
    /// Tokens that went through the model: windows of a long document overlap.
    pub model_tokens: u64,
    /// From the daemon's start to the last document.
    pub seconds: f64,
    /// CPU time of the daemon until then.
    pub cpu_seconds: f64,
}

/// Does the parts that are not done.
pub(super) struct Stages<'a> {
    pub(super) programs: &'a Programs,
    pub(super) plan: &'a Plan,
    pub(super) out: PathBuf,
    /// The pretrained model, if that is what all go on from.
    pub(super) pretrained: Option<PathBuf>,
    broker: OnceCell<(Running, String)>,
    /// Topics that hold what they should.
    filled: BTreeSet<String>,
    started: Instant,
}

/// Says something on standard error.
pub(super) fn say(text: &str) {
    use std::io::Write;
    // Nothing can be done where nobody listens.
    let _ = writeln!(std::io::stderr(), "{text}");
}

impl<'a> Stages<'a> {
    pub fn new(programs: &'a Programs, plan: &'a Plan, (out, pretrained): (&Path, Option<&Path>)) -> Self {
        Self {
            programs,
            plan,
            out: out.to_owned(),
            pretrained: pretrained.map(Path::to_owned),
            broker: OnceCell::new(),
            filled: BTreeSet::new(),
            started: Instant::now(),
        }
    }

    /// Says what begins, and when.
    pub fn say(&self, what: &str) {
        let minutes = self.started.elapsed().as_secs() / 60;
        say(&format!("\n[{minutes:3} min] {what}"));
    }

    pub fn is_done(&self, part: &Path) -> bool {
        self.out.join(part).join(DONE_FILE).is_file()
    }

    /// Whether a student is done; one that took other steps is refused, for its numbers would not be comparable.
    pub fn is_student_done(&self, student: &Student) -> Result<bool> {
        let folder = student.folder();
        if !self.is_done(&folder) {
            return Ok(false);
        }
        let done: Value = read_json(&self.out.join(&folder).join(DONE_FILE))?;
        ensure!(
            done == length(student),
            "{} was trained by another version of the experiment ({done}); remove it",
            self.out.join(folder).display()
        );
        Ok(true)
    }

    /// Tokens that an evaluation on all sets predicts.
    pub fn predictions_of_evaluation(&self) -> Result<u64> {
        let tokenizer = TextTokenizer::read(&self.tokenizer())?;
        let files: Vec<EvalFile> =
            self.evaluation_files().into_iter().map(|(name, path)| EvalFile { name, path }).collect();
        Ok(read_sets(&files, &tokenizer, Bounds::default(), BATCH_SIZE)?
            .iter()
            .map(EvalSet::predictions)
            .sum())
    }

    /// One student, resumed where it was interrupted.
    pub fn student(&mut self, student: &Student) -> Result<()> {
        let group = &student.group;
        let (setting, folder) = (group.stream.setting, student.folder());
        let rate = student.learning_rate.unwrap_or_else(|| self.plan.learning_rate_of(setting));
        let mut arguments = words(["run", "--schedule", "constant"]);
        arguments.extend(self.stream_flags(student)?);
        arguments.extend(words(["--steps", &group.steps.to_string(), "--learning-rate", &rate.to_string()]));
        arguments.extend(words(["--shuffle-buffer", &SHUFFLE_BUFFER.to_string()]));
        arguments.extend(student.kind.flags().into_iter().map(OsString::from));
        if setting.has_base() {
            arguments.extend(["--init".into(), self.base_checkpoint(group.size)?.into()]);
        } else {
            arguments.extend(model_flags(group.size));
        }
        arguments.extend(self.common_flags(&folder, student.seed, group.eval_every)?);
        self.programs.train(&arguments)?;
        // A signal may have ended the program between two looks at it.
        self.programs.check()?;
        self.check_steps(&folder, group.steps)?;
        self.done(&folder, &length(student))
    }

    /// ONNX Runtime's library, for the daemon.
    pub(super) fn library(&self) -> Result<String> {
        match std::env::var("ORT_DYLIB_PATH") {
            Ok(path) => Ok(path),
            Err(_) => self.programs.script("ops/setup-onnxruntime", &[]),
        }
    }

    /// What a student reads: the scored topic once, or the files of its own text as often as its steps take.
    fn stream_flags(&mut self, student: &Student) -> Result<Vec<OsString>> {
        let stream = student.group.stream;
        if !student.kind.has_own_text() {
            self.score(stream)?;
            return Ok(words(["--topic", &stream.topic(), "--until-end"]));
        }
        let name = student.kind.name();
        let folder = self.out.join(texts_folder(stream.setting));
        let prepared: Prepared = read_json(&folder.join(DONE_FILE))?;
        let text = prepared
            .texts
            .get(&name)
            .with_context(|| format!("{} holds no text of {name}; remove the folder", folder.display()))?;
        // Twice what is needed, for parts are of different lengths; the steps end it.
        let cells = student.group.steps * (BATCH_SIZE * SEQUENCE_LENGTH) as u64;
        let passes = 2 * cells / text.tokens.max(1) + 2;
        let mut flags = words(["--epochs", &passes.to_string(), "--files"]);
        flags.extend(texts::files(&folder, &name, text.parts).into_iter().map(OsString::from));
        Ok(flags)
    }

    /// A stream that ends early would leave runs that cannot be compared.
    fn check_steps(&self, folder: &Path, steps: u64) -> Result<()> {
        let run = RecordedRun::read(&self.out.join(folder))?;
        let done = run.steps().last().map_or(0, |step| step.step);
        if done < steps {
            bail!("{} took {done} steps of {steps}: the corpus is too small for the plan", folder.display());
        }
        Ok(())
    }

    /// Fills the topic of scored documents. A broker in memory forgets, so after an interruption it is done again; the model,
    /// the documents and their order are the same.
    fn score(&mut self, stream: Stream) -> Result<()> {
        let (documents, scored) = (stream.setting.topic(), stream.topic());
        if self.filled.contains(&scored) {
            return Ok(());
        }
        self.say(&format!("scoring the documents of {}", stream.name()));
        let count = self.ingest(&documents, &self.corpus(stream.setting))?;
        let library = self.library()?;
        let servers = self.servers()?;
        let group = format!("{scored}-scorers");
        let mut arguments =
            words(["--kafka-bootstrap-servers", &servers, "--kafka-documents-topic", &documents]);
        arguments.extend(words([
            "--kafka-scored-topic",
            &scored,
            "--kafka-dead-letter-topic",
            "dead-letters",
        ]));
        // The broker in memory has no transactions; nothing is killed between here and the last document.
        arguments.extend(words(["--kafka-group-id", &group, "--kafka-delivery", "at-least-once"]));
        arguments.extend(words(["--score-window-tokens", &SEQUENCE_LENGTH.to_string()]));
        arguments.extend(words(["--score-stride-tokens", &STRIDE.to_string()]));
        if self.plan.needs_entropies(stream) {
            arguments.extend(words(["--score-entropies", "true"]));
        }
        let model = model_folder(stream, self.plan.reference_size(stream));
        arguments.extend(["--model-path".into(), self.out.join(model).into()]);
        let started = Instant::now();
        let mut server = self.programs.serve(&arguments, &library, &self.out.join("sluiced.log"))?;
        loop {
            let done = server.metric("sluiced_documents_scored_total")?;
            let letters = server.metric("sluiced_dead_letters_total")?;
            if letters > 0 {
                bail!(
                    "{letters} documents could not be scored; see {}",
                    self.out.join("sluiced.log").display()
                );
            }
            if done >= count {
                break;
            }
            self.programs.check()?;
            server.check()?;
            std::thread::sleep(Duration::from_millis(200));
        }
        let took = Scoring {
            tokens: server.metric("sluiced_tokens_scored_total")?,
            model_tokens: server.metric("sluiced_model_tokens_total")?,
            seconds: started.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds(server.id())?,
        };
        say(&format!("{count} documents, {} tokens scored in {:.0} s", took.tokens, took.seconds));
        write_json(&self.out.join(scoring_file(stream)), &took)?;
        self.filled.insert(scored);
        Ok(())
    }

    /// Publishes a file of documents, and counts them.
    pub(super) fn ingest(&mut self, topic: &str, path: &Path) -> Result<u64> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let count = text.lines().count() as u64;
        if !self.filled.contains(topic) {
            let servers = self.servers()?;
            let mut arguments =
                words(["ingest", "--bootstrap-servers", &servers, "--topic", topic, "--tokenizer"]);
            arguments.extend([self.tokenizer().into(), path.into()]);
            self.programs.daemon(&arguments)?;
            self.filled.insert(topic.to_owned());
        }
        Ok(count)
    }

    fn servers(&self) -> Result<String> {
        if let Some((_, address)) = self.broker.get() {
            return Ok(address.clone());
        }
        let mut topics: Vec<String> = vec!["dead-letters:1".to_owned()];
        let mut names: BTreeSet<String> =
            [CURATED_TOPIC, GENERAL_TOPIC, MISMATCHED_TOPIC].map(str::to_owned).into();
        for stream in self.plan.streams() {
            names.extend([stream.setting.topic(), stream.topic()]);
        }
        topics.extend(names.into_iter().map(|topic| format!("{topic}:{}", self.plan.basis.partitions)));
        let started = self.programs.broker(&topics)?;
        let address = started.1.clone();
        // Nobody else fills it: there is one thread.
        let _ = self.broker.set(started);
        Ok(address)
    }

    /// Flags of every run.
    pub(super) fn common_flags(&self, folder: &Path, seed: u64, eval_every: u64) -> Result<Vec<OsString>> {
        let mut flags = words(["--bootstrap-servers", &self.servers()?, "--resume", "--tokenizer"]);
        flags.extend([self.tokenizer().into(), "--out".into(), self.out.join(folder).into()]);
        flags.extend(words(["--seed", &seed.to_string(), "--eval-every", &eval_every.to_string()]));
        flags.extend(words(["--batch-size", &BATCH_SIZE.to_string()]));
        flags.extend(words(["--sequence-length", &SEQUENCE_LENGTH.to_string()]));
        let checkpoint_every = self.checkpoint_every().to_string();
        flags.extend(words(["--checkpoint-every", &checkpoint_every, "--checkpoints-keep", "1"]));
        flags.extend(words(["--token-losses", TARGET]));
        for (name, path) in self.evaluation_files() {
            let mut value = OsString::from(format!("{name}="));
            value.push(path);
            flags.extend(["--eval".into(), value]);
        }
        Ok(flags)
    }

    fn evaluation_files(&self) -> Vec<(String, PathBuf)> {
        let files = [
            (TARGET, "eval-problems.jsonl"),
            ("rest", "eval-rest.jsonl"),
            ("answers", "eval-answers.jsonl"),
            ("gsm8k", "eval-gsm8k.jsonl"),
        ];
        files
            .into_iter()
            .map(|(name, file)| (name.to_owned(), self.text().join(file)))
            .filter(|(_, path)| path.is_file())
            .collect()
    }

    /// Steps between checkpoints.
    pub(super) fn checkpoint_every(&self) -> u64 {
        if self.pretrained.is_some() { CHECKPOINT_EVERY_PRETRAINED } else { CHECKPOINT_EVERY }
    }

    /// What models of a size go on from.
    pub(super) fn base_checkpoint(&self, size: Size) -> Result<PathBuf> {
        if let Some(pretrained) = &self.pretrained {
            return Ok(pretrained.clone());
        }
        let base = self.out.join(base_folder(size));
        sluice_trainer::run::checkpoints::latest_checkpoint(&base)?
            .with_context(|| format!("{} holds no checkpoint", base.display()))
    }

    pub(super) fn done(&self, part: &Path, what: &Value) -> Result<()> {
        write_json(&self.out.join(part).join(DONE_FILE), what)
    }

    pub(super) fn choosing_file(&self) -> PathBuf {
        self.text().join("eval-problems-choosing.jsonl")
    }

    pub(super) fn text(&self) -> PathBuf {
        self.out.join("text")
    }

    /// The texts of the map, which no other experiment needs.
    pub(super) fn text_of_map(&self) -> PathBuf {
        self.out.join("text-map")
    }

    /// The documents of a setting's stream.
    pub(super) fn corpus(&self, setting: Setting) -> PathBuf {
        let folder = if setting.is_of_map() { self.text_of_map() } else { self.text() };
        folder.join(setting.corpus())
    }

    pub(super) fn tokenizer(&self) -> PathBuf {
        self.out.join(TOKENIZER)
    }
}

/// How long a student trains: what must not differ between runs of one name.
fn length(student: &Student) -> Value {
    json!({ "steps": student.group.steps, "eval_every": student.group.eval_every })
}

/// The held-out problems.
pub(super) fn target_file(out: &Path) -> PathBuf {
    out.join("text/eval-problems.jsonl")
}

/// The templates of the held-out problems.
pub(super) fn read_templates(out: &Path) -> Result<Templates> {
    Templates::read(&target_file(out), &TextTokenizer::read(&out.join(TOKENIZER))?)
}

/// What the texts of a setting's controls are.
pub(super) fn read_prepared(out: &Path, setting: Setting) -> Result<Prepared> {
    read_json(&out.join(texts_folder(setting)).join(DONE_FILE))
}

/// What scoring a stream took, if that is known.
pub(super) fn read_scoring(out: &Path, stream: Stream) -> Result<Scoring> {
    read_json(&out.join(scoring_file(stream)))
}

pub(super) fn model_flags(size: Size) -> Vec<OsString> {
    let numbers = [size.hidden, size.layers, size.heads].map(|number| number.to_string());
    let [hidden, layers, heads] = &numbers;
    words(["--hidden-size", hidden, "--layers", layers, "--heads", heads])
}

pub(super) fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> Vec<OsString> {
    words.into_iter().map(OsString::from).collect()
}
