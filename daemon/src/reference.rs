//! The reference model as the settings ask for it: read, opened on its device, its context policy decided.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use sluice_schemas::record::ContextPolicy;

use crate::batch::Ladder;
use crate::config::Config;
use crate::device::Device;
use crate::exit::{DATA, ExitCode as _, NO_INPUT, USAGE};
use crate::metrics::Metrics;
use crate::score::Scorer;
use crate::score::graft::HeadOptions;
use crate::score::model::Model;
use crate::score::model_thread::ModelThread;
use crate::score::policy::context_policy;
use crate::score::runtime::SessionOptions;
use crate::score::self_test::{sees_both_sides, self_test};
use crate::score::warm_up::warm_up;

/// A reference model that is ready to score. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Reference {
    /// What was read.
    pub model: Arc<Model>,
    /// The model on its device.
    pub scorer: ModelThread,
    /// How it sees a document.
    pub policy: ContextPolicy,
    /// The lengths that rows are padded to.
    pub ladder: Ladder,
    /// Where it runs.
    pub device: Device,
}

impl Reference {
    /// Reads and opens the model; what is to be known of it goes to the log.
    pub fn open(config: &Config) -> anyhow::Result<Self> {
        let (model, device) = load_model(config)?;
        let policy = context_policy(config, &model).exit_code(USAGE)?;
        let (mut model, mut scorer) = open_scorer(model, device, config)?;
        let ladder = config.sizes().ladder(policy).split_at(model.length_limit);
        look_both_ways(&mut model, &mut scorer, ladder)?;
        Ok(Self { model: Arc::new(model), scorer, policy, ladder, device })
    }

    /// The same for the settings `new`, warm, beside this one: with a session of its own where model or device are not
    /// the same any more.
    pub fn with_settings(&self, old: &Config, new: &Config) -> anyhow::Result<Self> {
        let (mut model, device) = load_model(new)?;
        let policy = context_policy(new, &model)?;
        let same_session = model.identity.fingerprint == self.model.identity.fingerprint
            && new.model == old.model
            && new.score.entropies == old.score.entropies
            // The loss head was made for batches of at most that size.
            && new.sizes().tokens_max <= old.sizes().tokens_max;
        let mut scorer = if same_session {
            model.forget_graph();
            self.scorer.clone()
        } else {
            let scorer;
            (model, scorer) = open_scorer(model, device, new)?;
            scorer
        };
        let ladder = new.sizes().ladder(policy).split_at(model.length_limit);
        look_both_ways(&mut model, &mut scorer, ladder)?;
        let mut next = Self { model: Arc::new(model), scorer, policy, ladder, device };
        self.check_same_tokens(&next)?;
        if !same_session || new.batch != old.batch || policy != self.policy {
            next.warm_up(new).context("cannot warm up the new model beside the old one")?;
        }
        Ok(next)
    }

    /// Refuses a model for which what is on the topic was not made.
    fn check_same_tokens(&self, new: &Self) -> anyhow::Result<()> {
        let (old, new) = (&self.model.identity, &new.model.identity);
        if old.tokenizer != new.tokenizer {
            bail!(
                "the new model has the tokenizer {}, and the documents were made with {}; restart the daemon if you \
                 mean it",
                new.tokenizer.short(),
                old.tokenizer.short()
            );
        }
        if old.vocabulary != new.vocabulary {
            bail!("the new model knows {} token ids, and the old one {}", new.vocabulary, old.vocabulary);
        }
        Ok(())
    }

    /// Says in the metrics and in the log what scores from now on.
    pub fn announce(&self, config: &Config, metrics: &Metrics) {
        let identity = &self.model.identity;
        metrics.set_model(
            &identity.fingerprint.to_string(),
            &identity.tokenizer.to_string(),
            &format!("{:?}", identity.precision).to_lowercase(),
            &config.model.device,
        );
        metrics.set_device(self.device);
        tracing::info!(
            model = %identity.fingerprint.short(),
            tokenizer = %identity.tokenizer.short(),
            vocabulary = identity.vocabulary,
            window = self.policy.window,
            stride = self.policy.stride,
            bos = ?self.policy.bos,
            device = config.model.device,
            "reference model is warm"
        );
    }

    /// Runs the shapes that scoring will meet, and tries what losses rest on; says how many shapes there were.
    pub fn warm_up(&mut self, config: &Config) -> anyhow::Result<usize> {
        let tokens_max = config.sizes().tokens_max;
        let shapes = warm_up(&mut self.scorer, self.ladder, tokens_max).exit_code(DATA)?;
        self.self_test(config)?;
        Ok(shapes)
    }

    /// Refuses a model that sees what it should not, with [`DATA`]: its losses would look good and mean nothing.
    pub fn self_test(&mut self, config: &Config) -> anyhow::Result<()> {
        let identity = &self.model.identity;
        let who = (identity.vocabulary, identity.precision);
        let class = self.model.class.as_ref();
        self_test(&mut self.scorer, who, class, self.ladder, config.sizes().tokens_max).exit_code(DATA)
    }
}

fn load_model(config: &Config) -> anyhow::Result<(Model, Device)> {
    let device = config.model.device.parse::<Device>().map_err(|error| anyhow!(error)).exit_code(USAGE)?;
    let head =
        HeadOptions { device, entropies: config.score.entropies, rows_max: Some(config.sizes().tokens_max) };
    let mut model = Model::load_for(&config.model.path, head).exit_code(NO_INPUT)?;
    model.choose_class(&config.model.class, config.score.entropies)?;
    if config.model.fuse_attention {
        model.fuse_attention(&onnxruntime_library(&config.model.onnxruntime)).exit_code(NO_INPUT)?;
    }
    for finding in &model.findings {
        tracing::warn!(finding = finding.code(), "{finding}");
    }
    Ok((model, device))
}

/// Finds out whether a token classifier sees what follows a token, which decides in which window a token is given its value.
fn look_both_ways(model: &mut Model, scorer: &mut ModelThread, ladder: Ladder) -> anyhow::Result<()> {
    let Some(class) = model.class.as_mut() else { return Ok(()) };
    let (vocabulary, class_targets) = (model.identity.vocabulary, model.kind.class_targets());
    class.both_sides = sees_both_sides(scorer, vocabulary, class_targets, ladder).exit_code(DATA)?;
    tracing::info!(
        class = class.name,
        index = class.index,
        sees = if class.both_sides { "both sides of a token" } else { "what stands before a token" },
        "the model is a token classifier"
    );
    Ok(())
}

/// Opens a session for the model on a thread of its own, and gives the model back without its graph, which nobody needs any more.
fn open_scorer(model: Model, device: Device, config: &Config) -> anyhow::Result<(Model, ModelThread)> {
    let options = SessionOptions {
        library: onnxruntime_library(&config.model.onnxruntime),
        device,
        threads: config.model.threads,
        device_memory_bytes: config.model.device_memory_bytes,
    };
    let model = Arc::new(model);
    let (opened, entropies) = (Arc::clone(&model), config.score.entropies);
    let scorer = ModelThread::start(move || {
        let mut scorer = Scorer::new(&opened, &options, entropies).exit_code(NO_INPUT)?;
        if device != Device::Cpu {
            scorer.placement()?.check(device).exit_code(DATA)?;
        }
        Ok(scorer)
    })?;
    let mut model = Arc::into_inner(model).context("the model's thread keeps what it was opened with")?;
    model.forget_graph();
    Ok((model, scorer))
}

/// The library that the settings name, else the one of the environment, else the system's.
pub fn onnxruntime_library(setting: &std::path::Path) -> PathBuf {
    if !setting.as_os_str().is_empty() {
        return setting.to_owned();
    }
    std::env::var_os("ORT_DYLIB_PATH").map_or_else(|| PathBuf::from("libonnxruntime.so"), PathBuf::from)
}
