//! `sluiced serve` and `sluiced validate`: from settings to a running pipeline, and what can be wrong on the way.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use sluice_text::output::print_line;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::exit::{ExitCode as _, UNAVAILABLE, USAGE};
use crate::health::{Health, Phase};
use crate::kafka::PlainContext;
use crate::metrics::Metrics;
use crate::reference::Reference;
use crate::reload::{self, Reload};
use crate::score::kind::ModelKind;
use crate::{http, kafka, pipeline, systemd};

/// How long the other loops may take to end once one has failed.
const GIVE_UP_WITHIN: Duration = Duration::from_secs(10);

/// Runs the daemon until SIGTERM or SIGINT; returns once everything read is published and committed. `load` reads the
/// settings again.
pub fn serve(config: &Config, load: reload::Load) -> anyhow::Result<()> {
    kafka::check_properties(&config.kafka).exit_code(USAGE)?;
    let metrics = Metrics::new().context("cannot register the metrics")?;
    let health = Health::default();
    let address: SocketAddr = config.http.listen.parse().exit_code(USAGE)?;
    // Nothing to reload before the model is there.
    let reload = Arc::new(OnceLock::new());
    start_edge(address, &metrics, &health, Arc::clone(&reload))?;

    let mut reference = Reference::open(config)?;
    if health.is_leaving() {
        tracing::info!("stopped before anything was read");
        return Ok(());
    }
    let shapes = reference.warm_up(config)?;
    tracing::info!(shapes, "the shapes that scoring meets have run once");
    let reload = reload.get_or_init(|| Reload::new(load, config.clone(), reference));
    loop {
        let (config, reference) = reload.in_force();
        health.set_stalled_after(config.limits.stalled());
        reference.announce(&config, &metrics);
        let model = (reference.model.identity, reference.model.class.as_ref());
        let shapes = (reference.policy, reference.ladder);
        pipeline::run(&config, model, &reference.scorer, shapes, &metrics, &health)?;
        if health.is_leaving() || !reload.take_next() {
            break;
        }
    }
    tracing::info!(scored = metrics.documents_scored.get(), "drained; everything read is committed");
    Ok(())
}

/// HTTP and signals, on a thread of their own, so that no loop of the pipeline can hold them up.
fn start_edge(
    address: SocketAddr,
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
    let router = http::router(metrics.clone(), health.clone());
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
                    exit_at_once(130);
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
    if reload.get().is_none() || health.phase() != Phase::Serving {
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
    exit_at_once(1);
}

/// Ends the process without what libraries do at its end: ONNX Runtime would be taken apart under the batch that runs,
/// and the log would say that the model failed.
fn exit_at_once(code: i32) -> ! {
    signal_hook::low_level::exit(code)
}

/// Checks everything `serve` would need, and prints a line for each to standard output.
pub fn validate(config: &Config) -> anyhow::Result<()> {
    kafka::check_properties(&config.kafka).exit_code(USAGE)?;
    // What is found counts, whether or not anybody reads about it.
    let say = |line: String| print_line(&line);
    say("configuration: ok".to_owned())?;
    let mut reference = Reference::open(config)?;
    reference.warm_up(config)?;
    let (model, policy) = (&reference.model, reference.policy);
    let (fingerprint, vocabulary) = (model.identity.fingerprint, model.identity.vocabulary);
    say(match model.kind {
        ModelKind::CausalLm => format!("model: ok, {fingerprint} with {vocabulary} logits"),
        ModelKind::TokenClassifier { .. } => {
            format!("model: ok, {fingerprint}, a token classifier of {vocabulary} token ids")
        }
    })?;
    if let Some(class) = &model.class {
        say(format!("  class: {} ({})", class.name, class.index))?;
    }
    say(format!("  head: {}, then {:?}", model.report.head, model.report.after_head))?;
    say(format!(
        "  inputs: {}",
        model.inputs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
    ))?;
    for finding in &model.findings {
        say(format!("  {}: {finding}", finding.code()))?;
    }
    say(format!(
        "  windows of {} tokens every {} tokens, on {}",
        policy.window, policy.stride, config.model.device
    ))?;
    say(format!("tokenizer: ok, {}", model.identity.tokenizer))?;

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
    say(format!("broker: ok, {} at {}", metadata.brokers().len(), settings.bootstrap_servers))?;
    let limits = kafka::check_limits(settings, &metadata).exit_code(USAGE)?;
    say(format!("  limits: {limits}"))?;
    kafka::check_topics(&metadata, settings).exit_code(UNAVAILABLE)?;
    for topic in [&settings.documents_topic, &settings.scored_topic, &settings.dead_letter_topic] {
        if let Some(partitions) = kafka::partitions(&metadata, topic) {
            say(format!("topic {topic}: ok, {partitions} partitions"))?;
        }
    }
    Ok(())
}
