//! What is done before the students: text, tokenizer, base model, reference, and the texts of the controls.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use sluice_trainer::run::files::write_json;

use super::gsm8k;
use super::kind::Kind;
use super::parts::{DONE_FILE, base_folder, base_model_folder, model_folder, reference_folder, texts_folder};
use super::plan::{SEQUENCE_LENGTH, Setting};
use super::stages::{
    CHECKPOINT_EVERY, CHOOSING, CURATED_TOPIC, GENERAL_TOPIC, STRIDE, Stages, model_flags, target_file, words,
};
use super::templates::{Half, write_half};
use super::texts::{self, Prepared};

impl Stages<'_> {
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
            write_half(&target_file(&self.out), Half::Choosing, &self.choosing_file())?;
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

    /// The reference of a setting, after the base model that it begins with.
    pub fn reference(&mut self, setting: Setting) -> Result<()> {
        let folder = reference_folder(setting);
        let eval_every = self.plan.eval_every(setting);
        let steps = self.plan.base_steps.to_string();
        let epochs = self.plan.reference_epochs.to_string();
        let rate = self.plan.learning_rate.to_string();
        let rate_continual = self.plan.learning_rate_continual.to_string();
        let shape = model_flags(self.plan.reference);
        if setting.has_base() {
            // At a constant rate, like the students that go on from it.
            self.train_reference(
                (&base_folder(), CHECKPOINT_EVERY),
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
                (&folder, eval_every),
                CURATED_TOPIC,
                &init,
                &[("--epochs", &epochs), ("--learning-rate", &rate_continual)],
            )?;
        } else {
            self.train_reference(
                (&folder, eval_every),
                CURATED_TOPIC,
                &shape,
                &[("--epochs", &epochs), ("--learning-rate", &rate)],
            )?;
        }
        let model = model_folder(setting);
        if !self.is_done(&model) {
            self.export(&folder, &model, "best")?;
        }
        Ok(())
    }

    /// A checkpoint of a run as a model that the daemon serves.
    fn export(&self, run: &Path, model: &Path, which: &str) -> Result<()> {
        let mut export = words(["export", "--run"]);
        export.extend([self.out.join(run).into(), "--out".into(), self.out.join(model).into()]);
        export.extend(words(["--which", which]));
        self.programs.train(&export)?;
        self.done(model, &json!({}))
    }

    /// The texts of a setting's controls, where it has any.
    pub fn texts(&self, setting: Setting) -> Result<()> {
        let folder = texts_folder(setting);
        if !self.plan.has_own_texts(setting) || self.is_done(&folder) {
            return Ok(());
        }
        self.say(&format!("the texts of the controls of {}", setting.name()));
        let base = base_model_folder();
        if !self.is_done(&base) {
            self.export(&base_folder(), &base, "last")?;
        }
        let own = self.out.join(&folder);
        std::fs::create_dir_all(&own).with_context(|| format!("cannot create {}", own.display()))?;
        let library = self.library()?;
        let score = |model: &Path, file: &str, name: &str| {
            let to = own.join(name);
            let model = self.out.join(model);
            let windows = (SEQUENCE_LENGTH, STRIDE);
            let took = self.programs.score((&model, &library), windows, &self.text().join(file), &to)?;
            anyhow::Ok((to, took))
        };
        let reference = model_folder(setting);
        let (scored, (seconds, cpu)) = score(&reference, setting.corpus(), "stream.jsonl")?;
        let (by_base, (base_seconds, base_cpu)) = score(&base, setting.corpus(), "stream-by-base.jsonl")?;
        let (curated, _) = score(&reference, "curated.jsonl", "curated.jsonl")?;
        let own_kinds = self.plan.groups.iter().filter(|group| group.setting == setting);
        let kinds: Vec<Kind> = own_kinds.flat_map(|group| group.kinds.iter().copied()).collect();
        let paths = [scored.as_path(), &by_base, &curated];
        let texts = texts::write(&own, &kinds, paths, self.plan.partitions)?;
        let scoring_seconds = (seconds + base_seconds, cpu + base_cpu);
        write_json(&own.join(DONE_FILE), &Prepared { texts, scoring_seconds })
    }

    fn train_reference(
        &mut self,
        (folder, eval_every): (&Path, u64),
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
