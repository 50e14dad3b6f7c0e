//! The parts of the experiment, each done once.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sluice_trainer::run::files::{read_json, write_json};
use sluice_trainer::run::recorded::RecordedRun;
use sluice_trainer::text::{Bounds, TextTokenizer};
use sluice_trainer::training::evaluate::{EvalFile, EvalSet, read_sets};

use super::gsm8k;
use super::parts::{DONE_FILE, base_folder, model_folder, reference_folder, scoring_file};
use super::plan::{BATCH_SIZE, Plan, SEQUENCE_LENGTH, SHUFFLE_BUFFER, Setting, Size, Student};
use super::programs::{Programs, Running};
use crate::process::cpu_seconds;

/// Steps between checkpoints: what an interruption costs at most.
const CHECKPOINT_EVERY: u64 = 100;
/// Name of the first evaluation set, which decides.
pub(super) const TARGET: &str = "math";
/// Tokens between the starts of two windows of a long document: a quarter of a window is read twice, as context.
const STRIDE: usize = SEQUENCE_LENGTH / 4 * 3;
const CURATED_TOPIC: &str = "curated";
const GENERAL_TOPIC: &str = "general";

/// What scoring a setting's corpus took.
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
    programs: &'a Programs,
    plan: &'a Plan,
    out: PathBuf,
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
    pub fn new(programs: &'a Programs, plan: &'a Plan, out: &Path) -> Self {
        Self {
            programs,
            plan,
            out: out.to_owned(),
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

    /// Text and tokenizer.
    pub fn prepare(&self, gsm8k: Option<&Path>) -> Result<()> {
        let text = self.text();
        if !self.is_done(Path::new("text")) {
            self.say("text");
            let mut flags = vec!["--experiment"];
            flags.extend(self.plan.is_quick.then_some("--quick"));
            let text_shown = text.to_string_lossy().into_owned();
            flags.extend(["--out", &text_shown]);
            self.programs.script("ops/corpus/build", &flags)?;
            if let Some(folder) = gsm8k {
                gsm8k::write(folder, &text.join("eval-gsm8k.jsonl"))?;
            }
            self.done(Path::new("text"), &json!({}))?;
        }
        if !self.tokenizer().is_file() {
            self.say("tokenizer");
            let partial = self.out.join("tokenizer.partial.json");
            let mut words = words(["tokenizer", "train", "--vocab-size"]);
            words.extend([self.plan.vocabulary.to_string().into(), "--out".into(), partial.clone().into()]);
            for file in ["general.jsonl", "mixed.jsonl", "noisy.jsonl", "curated.jsonl"] {
                words.push(text.join(file).into());
            }
            self.programs.daemon(&words)?;
            std::fs::rename(&partial, self.tokenizer())
                .with_context(|| format!("cannot rename {} into place", partial.display()))?;
        }
        Ok(())
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

    /// The reference of a setting, after the base model that it begins with.
    pub fn reference(&mut self, setting: Setting) -> Result<()> {
        let folder = reference_folder(setting);
        let steps = self.plan.base_steps.to_string();
        let epochs = self.plan.reference_epochs.to_string();
        let rate = self.plan.learning_rate.to_string();
        let rate_continual = self.plan.learning_rate_continual.to_string();
        let shape = model_flags(self.plan.reference);
        if setting.has_base() {
            // At a constant rate, like the students that go on from it.
            self.train_reference(
                &base_folder(),
                GENERAL_TOPIC,
                &shape,
                &[
                    ("--epochs", "1"),
                    ("--steps", &steps),
                    ("--learning-rate", &rate),
                    ("--schedule", "constant"),
                ],
            )?;
            let init = ["--init".into(), self.base_checkpoint()?.into()];
            self.train_reference(
                &folder,
                CURATED_TOPIC,
                &init,
                &[("--epochs", &epochs), ("--learning-rate", &rate_continual)],
            )?;
        } else {
            self.train_reference(
                &folder,
                CURATED_TOPIC,
                &shape,
                &[("--epochs", &epochs), ("--learning-rate", &rate)],
            )?;
        }
        let model = model_folder(setting);
        if !self.is_done(&model) {
            let mut export = words(["export", "--run"]);
            export.extend([self.out.join(&folder).into(), "--out".into(), self.out.join(&model).into()]);
            // As the committed results were made, whose loss of the reference is that of its end.
            export.extend(words(["--which", "last"]));
            self.programs.train(&export)?;
            self.done(&model, &json!({}))?;
        }
        Ok(())
    }

    fn train_reference(
        &mut self,
        folder: &Path,
        topic: &str,
        model: &[OsString],
        flags: &[(&str, &str)],
    ) -> Result<()> {
        if self.is_done(folder) {
            return Ok(());
        }
        self.say(&folder.display().to_string());
        self.ingest(topic, &format!("{topic}.jsonl"))?;
        let mut arguments = words(["reference", "--topic", topic]);
        arguments.extend(model.iter().cloned());
        for (flag, value) in flags {
            arguments.extend(words([*flag, *value]));
        }
        arguments.extend(self.common_flags(folder, 1, CHECKPOINT_EVERY)?);
        self.programs.train(&arguments)?;
        self.programs.check()?;
        self.done(folder, &json!({}))
    }

    /// One student, resumed where it was interrupted.
    pub fn student(&mut self, student: &Student) -> Result<()> {
        let group = &student.group;
        let (setting, folder) = (group.setting, student.folder());
        self.score(setting)?;
        let (_, scored) = setting.topics();
        let rate =
            if setting.has_base() { self.plan.learning_rate_continual } else { self.plan.learning_rate };
        let mut arguments = words(["run", "--topic", &scored, "--until-end", "--schedule", "constant"]);
        arguments.extend(words(["--steps", &group.steps.to_string(), "--learning-rate", &rate.to_string()]));
        arguments.extend(words(["--shuffle-buffer", &SHUFFLE_BUFFER.to_string(), "--token-losses", TARGET]));
        arguments.extend(student.kind.flags().into_iter().map(OsString::from));
        if setting.has_base() {
            arguments.extend(["--init".into(), self.base_checkpoint()?.into()]);
        } else {
            arguments.extend(model_flags(group.size));
        }
        arguments.extend(self.common_flags(&folder, student.seed, group.eval_every)?);
        self.programs.train(&arguments)?;
        // A signal may have ended the program between two looks at it.
        self.programs.check()?;
        self.check_steps(&folder, group.steps)?;
        self.done(&folder, &json!({}))
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
    fn score(&mut self, setting: Setting) -> Result<()> {
        let (documents, scored) = setting.topics();
        if self.filled.contains(&scored) {
            return Ok(());
        }
        self.say(&format!("scoring the documents of {}", setting.name()));
        let count = self.ingest(&documents, setting.corpus())?;
        let library = match std::env::var("ORT_DYLIB_PATH") {
            Ok(path) => path,
            Err(_) => self.programs.script("ops/setup-onnxruntime", &[])?,
        };
        let servers = self.servers()?;
        let group = format!("{documents}-scorers");
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
        arguments.extend(["--model-path".into(), self.out.join(model_folder(setting)).into()]);
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
        write_json(&self.out.join(scoring_file(setting)), &took)?;
        self.filled.insert(scored);
        Ok(())
    }

    /// Publishes a file of documents, and counts them.
    fn ingest(&mut self, topic: &str, file: &str) -> Result<u64> {
        let path = self.text().join(file);
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
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
        for topic in [CURATED_TOPIC, GENERAL_TOPIC] {
            topics.push(format!("{topic}:{}", self.plan.partitions));
        }
        for setting in self.plan.settings() {
            let (documents, scored) = setting.topics();
            topics.extend([documents, scored].map(|topic| format!("{topic}:{}", self.plan.partitions)));
        }
        let started = self.programs.broker(&topics)?;
        let address = started.1.clone();
        // Nobody else fills it: there is one thread.
        let _ = self.broker.set(started);
        Ok(address)
    }

    /// Flags of every run.
    fn common_flags(&self, folder: &Path, seed: u64, eval_every: u64) -> Result<Vec<OsString>> {
        let mut flags = words(["--bootstrap-servers", &self.servers()?, "--resume", "--tokenizer"]);
        flags.extend([self.tokenizer().into(), "--out".into(), self.out.join(folder).into()]);
        flags.extend(words(["--seed", &seed.to_string(), "--eval-every", &eval_every.to_string()]));
        flags.extend(words(["--batch-size", &BATCH_SIZE.to_string()]));
        flags.extend(words(["--sequence-length", &SEQUENCE_LENGTH.to_string()]));
        flags.extend(words(["--checkpoint-every", &CHECKPOINT_EVERY.to_string(), "--checkpoints-keep", "1"]));
        for (name, path) in self.evaluation_files() {
            let mut value = OsString::from(format!("{name}="));
            value.push(path);
            flags.extend(["--eval".into(), value]);
        }
        Ok(flags)
    }

    fn evaluation_files(&self) -> Vec<(String, PathBuf)> {
        let names = [TARGET, "rest", "answers", "gsm8k"];
        let files = names.map(|name| (name.to_owned(), self.text().join(format!("eval-{name}.jsonl"))));
        files.into_iter().filter(|(_, path)| path.is_file()).collect()
    }

    fn base_checkpoint(&self) -> Result<PathBuf> {
        let base = self.out.join(base_folder());
        sluice_trainer::run::checkpoints::latest_checkpoint(&base)?
            .with_context(|| format!("{} holds no checkpoint", base.display()))
    }

    fn done(&self, part: &Path, what: &serde_json::Value) -> Result<()> {
        write_json(&self.out.join(part).join(DONE_FILE), what)
    }

    fn text(&self) -> PathBuf {
        self.out.join("text")
    }

    fn tokenizer(&self) -> PathBuf {
        self.out.join("tokenizer.json")
    }
}

/// What scoring a setting took, if that is known.
pub(super) fn read_scoring(out: &Path, setting: Setting) -> Result<Scoring> {
    read_json(&out.join(scoring_file(setting)))
}

fn model_flags(size: Size) -> Vec<OsString> {
    let numbers = [size.hidden, size.layers, size.heads].map(|number| number.to_string());
    let [hidden, layers, heads] = &numbers;
    words(["--hidden-size", hidden, "--layers", layers, "--heads", heads])
}

fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> Vec<OsString> {
    words.into_iter().map(OsString::from).collect()
}
