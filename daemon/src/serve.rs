//! `sluiced serve` and `sluiced validate`: from settings to a running pipeline, and what can be wrong on the way.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use sluice_schemas::record::ContextPolicy;
use tokio::signal::unix::{SignalKind, signal};

use crate::batch::Batch;
use crate::config::Config;
use crate::exit::{DATA, ExitCode as _, NO_INPUT, UNAVAILABLE, USAGE};
use crate::health::Health;
use crate::kafka::PlainContext;
use crate::metrics::Metrics;
use crate::reload::{self, Reload};
use crate::score::model::Model;
use crate::score::runtime::{Device, SessionOptions};
use crate::score::{Score, Scorer, Scores};
use crate::{http, kafka, pipeline, systemd};

/// How long the other loops may take to end once one has failed.
const GIVE_UP_WITHIN: Duration = Duration::from_secs(10);

/// A model in service: what is known of it, its session, and the windows that it sees.
#[derive(Clone)]
pub struct Served {
    /// What was read of it.
    pub model: Arc<Model>,
    scorer: SharedScorer,
    policy: ContextPolicy,
}

/// A scorer that outlives the loop which uses it.
#[derive(Clone)]
struct SharedScorer(Arc<Mutex<Scorer>>);

impl Score for SharedScorer {
    fn score(&mut self, batch: &Batch) -> anyhow::Result<Scores> {
        // Of one batch at a time: that of the loop, or of a warm-up beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).score(batch)
    }
}

impl Served {
    /// Loads the model that `config` names, without running it.
    fn open(config: &Config) -> anyhow::Result<Self> {
        let model = load_model(config)?;
        let scorer = open_scorer(&model, config)?;
        let policy = pipeline::context_policy(config, &model).exit_code(USAGE)?;
        Ok(Self { model: Arc::new(model), scorer, policy })
    }

    /// Runs it once at every size.
    fn warm_up(&mut self, config: &Config) -> anyhow::Result<()> {
        pipeline::warm_up(&mut self.scorer, self.policy, &config.batch)
    }

    /// The same for the settings `new`, warm, beside this one: with a session of its own where model or device are not
    /// the same any more.
    pub fn with_settings(&self, old: &Config, new: &Config) -> anyhow::Result<Self> {
        let model = load_model(new)?;
        let policy = pipeline::context_policy(new, &model)?;
        let same_session = model.identity.fingerprint == self.model.identity.fingerprint
            && new.model == old.model
            && new.score.entropies == old.score.entropies;
        let scorer = if same_session { self.scorer.clone() } else { open_scorer(&model, new)? };
        let mut next = Self { model: Arc::new(model), scorer, policy };
        reload::check_same_tokens(self, &next)?;
        if !same_session || new.batch != old.batch || policy != self.policy {
            next.warm_up(new).context("cannot warm up the new model beside the old one")?;
        }
        Ok(next)
    }

    fn announce(&self, config: &Config, metrics: &Metrics) {
        let identity = &self.model.identity;
        metrics.set_model(
            &identity.fingerprint.to_string(),
            &identity.tokenizer.to_string(),
            &format!("{:?}", identity.precision).to_lowercase(),
            &config.model.device,
        );
        tracing::info!(
            model = %identity.fingerprint.short(),
            tokenizer = %identity.tokenizer.short(),
            vocabulary = identity.vocabulary,
            window = self.policy.window,
            stride = self.policy.stride,
            device = config.model.device,
            "reference model is warm"
        );
    }
}

/// Runs the daemon until SIGTERM or SIGINT; returns once everything read is published and committed. `load` reads the
/// settings again.
pub fn serve(config: &Config, load: reload::Load) -> anyhow::Result<()> {
    kafka::check_properties(&config.kafka).exit_code(USAGE)?;
    let metrics = Metrics::new().context("cannot register the metrics")?;
    let health = Health::default();
    let address: SocketAddr = config.http.listen.parse().exit_code(USAGE)?;
    // Nothing to reload before the model is there.
    let reload = Arc::new(OnceLock::new());
    start_edge(address, config, &metrics, &health, Arc::clone(&reload))?;

    let mut served = Served::open(config)?;
    if health.is_leaving() {
        tracing::info!("stopped before anything was read");
        return Ok(());
    }
    served.warm_up(config).exit_code(DATA)?;
    health.set_warm();
    let reload = reload.get_or_init(|| Reload::new(load, config.clone(), served));
    loop {
        let (config, served) = reload.in_force();
        served.announce(&config, &metrics);
        let scorer = Box::new(served.scorer);
        pipeline::run(&config, served.model.identity, scorer, served.policy, &metrics, &health)?;
        if health.is_leaving() || !reload.take_next() {
            break;
        }
        health.set_switched();
    }
    tracing::info!(scored = metrics.documents_scored.get(), "drained; everything read is committed");
    Ok(())
}

/// HTTP and signals, on a thread of their own, so that no loop of the pipeline can hold them up.
fn start_edge(
    address: SocketAddr,
    config: &Config,
    metrics: &Metrics,
    health: &Health,
    reload: Arc<OnceLock<Reload>>,
) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).with_context(|| {
        format!("cannot listen on http.listen = {address}; is another daemon running there?")
    });
    let listener = listener.exit_code(UNAVAILABLE)?;
    let bound = listener.local_addr().context("the listener has no address")?;
    tracing::info!(address = %bound, "serving /metrics, /live and /ready");
    let router =
        http::router(metrics.clone(), health.clone(), Duration::from_secs(config.limits.stalled_seconds));
    let (health, metrics) = (health.clone(), metrics.clone());
    let (mut terminate, mut interrupt, mut hangup) = {
        let _guard = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?)
    };
    std::thread::Builder::new().name("edge".to_owned()).spawn(move || {
        runtime.block_on(async move {
            tokio::spawn(exit_when_stuck(health.clone()));
            tokio::spawn(systemd::keep_informed(health.clone(), metrics.clone()));
            tokio::spawn(async move {
                if let Err(error) = axum::serve(listener, router).await {
                    tracing::error!(%error, "the HTTP endpoint ended");
                }
            });
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                    _ = hangup.recv() => {
                        start_reload(&reload, &metrics, &health);
                        continue;
                    }
                }
                if health.is_leaving() {
                    tracing::warn!("stopping at once; what is not committed will be read again");
                    std::process::exit(130);
                }
                tracing::info!("stopping: finishing what is in flight (once more to stop at once)");
                health.stop();
            }
        });
    })?;
    Ok(())
}

/// Reloads on a thread of its own: a model takes minutes to load, and signs of life are due meanwhile.
fn start_reload(reload: &Arc<OnceLock<Reload>>, metrics: &Metrics, health: &Health) {
    if reload.get().is_none() || health.is_stopping() {
        tracing::warn!("SIGHUP has no effect while the daemon starts, stops or goes over to new settings");
        return;
    }
    let (reload, metrics, health) = (Arc::clone(reload), metrics.clone(), health.clone());
    std::thread::spawn(move || {
        if let Some(reload) = reload.get() {
            reload.run(&metrics, &health);
        }
    });
}

/// Ends the process when one loop has given up and another does not follow, such as one that waits for a call into a
/// library that never returns.
async fn exit_when_stuck(health: Health) {
    while !health.is_aborted() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    tokio::time::sleep(GIVE_UP_WITHIN).await;
    tracing::error!(
        "a loop has failed and another does not end; exiting, and what is not committed will be read again"
    );
    std::process::exit(1);
}

fn load_model(config: &Config) -> anyhow::Result<Model> {
    Model::load(&config.model.path, config.score.entropies).exit_code(NO_INPUT)
}

fn open_scorer(model: &Model, config: &Config) -> anyhow::Result<SharedScorer> {
    let options = SessionOptions {
        library: onnxruntime_library(config),
        device: config.model.device.parse::<Device>().map_err(|error| anyhow!(error)).exit_code(USAGE)?,
        threads: config.model.threads,
        device_memory_bytes: config.model.device_memory_bytes,
    };
    let scorer = Scorer::new(model, &options, config.score.entropies).exit_code(NO_INPUT)?;
    Ok(SharedScorer(Arc::new(Mutex::new(scorer))))
}

fn onnxruntime_library(config: &Config) -> PathBuf {
    if !config.model.onnxruntime.as_os_str().is_empty() {
        return config.model.onnxruntime.clone();
    }
    std::env::var_os("ORT_DYLIB_PATH").map_or_else(|| PathBuf::from("libonnxruntime.so"), PathBuf::from)
}

/// Checks everything `serve` would need, and prints a line for each to standard output.
#[allow(clippy::print_stdout)]
pub fn validate(config: &Config) -> anyhow::Result<()> {
    kafka::check_properties(&config.kafka).exit_code(USAGE)?;
    println!("configuration: ok");
    let mut served = Served::open(config)?;
    served.warm_up(config).exit_code(DATA)?;
    let (model, policy) = (&served.model, served.policy);
    println!("model: ok, {} with {} logits", model.identity.fingerprint, model.identity.vocabulary);
    println!("  head: {}, then {:?}", model.report.head, model.report.after_head);
    println!(
        "  inputs: {}",
        model.inputs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
    );
    println!(
        "  windows of {} tokens every {} tokens, on {}",
        policy.window, policy.stride, config.model.device
    );
    println!("tokenizer: ok, {}", model.identity.tokenizer);

    let settings = &config.kafka;
    let consumer: BaseConsumer<PlainContext> =
        kafka::client_config(&settings.bootstrap_servers, &settings.properties)
            .create_with_context(PlainContext::default())
            .map_err(kafka::setting_error)
            .exit_code(USAGE)?;
    let serve = || drop(consumer.poll(Duration::ZERO));
    let metadata =
        kafka::reach(consumer.client(), &settings.bootstrap_servers, serve).exit_code(UNAVAILABLE)?;
    kafka::check_delivery(consumer.client(), settings.delivery).exit_code(USAGE)?;
    println!("broker: ok, {} at {}", metadata.brokers().len(), settings.bootstrap_servers);
    for topic in [&settings.documents_topic, &settings.scored_topic, &settings.dead_letter_topic] {
        match kafka::partitions(&metadata, topic) {
            Some(partitions) => println!("topic {topic}: ok, {partitions} partitions"),
            None => {
                return Err(anyhow!(
                    "the topic `{topic}` does not exist at {}; create it with `sluiced topics create`",
                    settings.bootstrap_servers
                ))
                .exit_code(UNAVAILABLE);
            }
        }
    }
    Ok(())
}
