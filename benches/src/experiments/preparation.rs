//! What is done before the students: text, tokenizer, base model, reference, and the texts of the controls.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use sluice_trainer::failure::Classify;
use sluice_trainer::run::files::{write_json, write_whole};

use super::group::{SEQUENCE_LENGTH, Size};
use super::gsm8k;
use super::kind::Kind;
use super::parts::{DONE_FILE, base_folder, base_model_folder, model_folder, reference_folder, texts_folder};
use super::reference::{Reference, Stream};
use super::stages::{
    CHOOSING, CURATED_TOPIC, GENERAL_TOPIC, MISMATCHED_TOPIC, STRIDE, Stages, TOKENIZER, model_flags,
    target_file, words,
};
use super::templates::{Half, write_half};
use super::texts::{self, Prepared};

impl Stages<'_> {
    /// Text and tokenizer.
    pub fn prepare(&self, gsm8k: Option<&Path>) -> Result<()> {
        let text = self.text();
        if !self.is_done(Path::new("text")) {
            self.say("text");
            let part = if self.pretrained.is_some() { "--pretrained" } else { "--experiment" };
            self.build_corpus(part, &text)?;
            if let Some(folder) = gsm8k {
                gsm8k::write(folder, &text.join("eval-gsm8k.jsonl"))?;
            }
            write_half(&target_file(&self.out), Half::Choosing, &self.choosing_file())?;
            self.done(Path::new("text"), &json!({}))?;
        }
        let map = self.text_of_map();
        let is_of_map = self.plan.streams().iter().any(|stream| stream.setting.is_of_map());
        if is_of_map && !self.is_done(Path::new("text-map")) {
            self.say("the texts of the map");
            self.build_corpus("--map", &map)?;
            self.done(Path::new("text-map"), &json!({}))?;
        }
        if let Some(pretrained) = self.pretrained.as_deref().filter(|_| !self.tokenizer().is_file()) {
            let own = pretrained.join(TOKENIZER);
            let bytes = std::fs::read(&own)
                .with_context(|| format!("cannot read {}, the pretrained model's tokenizer", own.display()))
                .or_usage()?;
            write_whole(&self.tokenizer(), &bytes)?;
        }
        if !self.tokenizer().is_file() {
            self.say("tokenizer");
            let partial = self.out.join("tokenizer.partial.json");
            let mut words = words(["tokenizer", "train", "--vocab-size"]);
            words.extend([
                self.plan.basis.vocabulary.to_string().into(),
                "--out".into(),
                partial.clone().into(),
            ]);
            for file in ["general.jsonl", "mixed.jsonl", "noisy.jsonl", "curated.jsonl"] {
                words.push(text.join(file).into());
            }
            self.programs.daemon(&words)?;
            std::fs::rename(&partial, self.tokenizer())
                .with_context(|| format!("cannot rename {} into place", partial.display()))?;
        }
        Ok(())
    }

    /// Builds a part of the corpus in a folder.
    fn build_corpus(&self, part: &str, folder: &Path) -> Result<()> {
        let shown = folder.to_string_lossy();
        let quick = self.plan.basis.is_quick.then_some("--quick");
        let flags: Vec<&str> = [part].into_iter().chain(quick).chain(["--out", &shown]).collect();
        self.programs.script("ops/corpus/build", &flags).map(drop)
    }

    /// The base model of a size.
    pub fn base(&mut self, size: Size) -> Result<()> {
        let basis = &self.plan.basis;
        let (steps, rate) = (basis.base_steps.to_string(), basis.learning_rate.to_string());
        let general = self.text().join("general.jsonl");
        // At a constant rate, like the students that go on from it.
        self.train_reference(
            (&base_folder(size), self.checkpoint_every()),
            (GENERAL_TOPIC, &general),
            &model_flags(size),
            &[("--epochs", "1"), ("--steps", &steps), ("--learning-rate", &rate), ("--schedule", "constant")],
        )
    }

    /// The reference of a stream, after the base model that it begins with.
    pub fn reference(&mut self, stream: Stream) -> Result<()> {
        let size = self.plan.reference_size(stream);
        let (folder, model) = (reference_folder(stream, size), model_folder(stream, size));
        let (epochs, text) = match stream.reference {
            Reference::General => return self.export_base(size),
            Reference::Curated | Reference::CuratedSmall => (
                self.plan.basis.reference_epochs,
                (CURATED_TOPIC.to_owned(), self.text().join("curated.jsonl")),
            ),
            Reference::Mismatched => (
                self.plan.basis.reference_epochs,
                (MISMATCHED_TOPIC.to_owned(), self.text().join("mismatched.jsonl")),
            ),
            // A stream is read once.
            Reference::OwnStream => (1, (stream.setting.topic(), self.corpus(stream.setting))),
        };
        let beginning = if stream.setting.has_base() {
            vec!["--init".into(), self.base_checkpoint(size)?.into()]
        } else {
            model_flags(size)
        };
        let (epochs, rate) = (epochs.to_string(), self.plan.learning_rate_of(stream.setting).to_string());
        self.train_reference(
            (&folder, self.plan.eval_every(stream)),
            (&text.0, &text.1),
            &beginning,
            &[("--epochs", &epochs), ("--learning-rate", &rate)],
        )?;
        if self.is_done(&model) {
            return Ok(());
        }
        self.export(&folder, &model, if stream.reference.is_best() { "best" } else { "last" })
    }

    /// The base model as one that scores.
    fn export_base(&self, size: Size) -> Result<()> {
        let base = base_model_folder(size);
        if self.is_done(&base) { Ok(()) } else { self.export(&base_folder(size), &base, "last") }
    }

    /// A checkpoint of a run as a model that the daemon serves.
    fn export(&self, run: &Path, model: &Path, which: &str) -> Result<()> {
        let mut export = words(["export", "--run"]);
        export.extend([self.out.join(run).into(), "--out".into(), self.out.join(model).into()]);
        export.extend(words(["--which", which]));
        self.programs.train(&export)?;
        self.done(model, &json!({}))
    }

    /// The texts of a stream's controls, where it has any.
    pub fn texts(&self, stream: Stream) -> Result<()> {
        let setting = stream.setting;
        let folder = texts_folder(setting);
        if !self.plan.has_own_texts(stream) || self.is_done(&folder) {
            return Ok(());
        }
        self.say(&format!("the texts of the controls of {}", setting.name()));
        let size = self.plan.reference_size(stream);
        let base = base_model_folder(size);
        self.export_base(size)?;
        let own = self.out.join(&folder);
        std::fs::create_dir_all(&own).with_context(|| format!("cannot create {}", own.display()))?;
        let library = self.library()?;
        let score = |model: &Path, documents: &Path, name: &str| {
            let to = own.join(name);
            let model = self.out.join(model);
            let windows = (SEQUENCE_LENGTH, STRIDE);
            let took = self.programs.score((&model, &library), windows, documents, &to)?;
            anyhow::Ok((to, took))
        };
        let reference = model_folder(stream, size);
        let documents = self.corpus(setting);
        let (scored, (seconds, cpu)) = score(&reference, &documents, "stream.jsonl")?;
        let (by_base, (base_seconds, base_cpu)) = score(&base, &documents, "stream-by-base.jsonl")?;
        let (curated, _) = score(&reference, &self.text().join("curated.jsonl"), "curated.jsonl")?;
        let own_kinds = self.plan.groups.iter().filter(|group| group.stream == stream);
        let kinds: Vec<Kind> = own_kinds.flat_map(|group| group.kinds.iter().copied()).collect();
        let paths = [scored.as_path(), &by_base, &curated];
        let texts = texts::write(&own, &kinds, paths, self.plan.basis.partitions)?;
        let scoring_seconds = (seconds + base_seconds, cpu + base_cpu);
        write_json(&own.join(DONE_FILE), &Prepared { texts, scoring_seconds })
    }

    fn train_reference(
        &mut self,
        (folder, eval_every): (&Path, u64),
        (topic, text): (&str, &Path),
        model: &[OsString],
        flags: &[(&str, &str)],
    ) -> Result<()> {
        if self.is_done(folder) {
            return Ok(());
        }
        self.say(&folder.display().to_string());
        self.ingest(topic, text)?;
        let mut arguments = words(["reference", "--topic", topic]);
        arguments.extend(model.iter().cloned());
        for (flag, value) in flags {
            arguments.extend(words([*flag, *value]));
        }
        // By the half of the templates that chooses.
        let mut choosing = OsString::from(format!("{CHOOSING}="));
        choosing.push(self.choosing_file());
        arguments.extend(["--eval".into(), choosing]);
        arguments.extend(words(["--keep-best", CHOOSING]));
        arguments.extend(self.common_flags(folder, 1, eval_every)?);
        self.programs.train(&arguments)?;
        self.programs.check()?;
        self.done(folder, &json!({}))
    }
}
