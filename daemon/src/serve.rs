//! `sluiced serve` and `sluiced validate`: from settings to a running pipeline, and what can be wrong on the way.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use sluice_schemas::record::ContextPolicy;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::exit::{DATA, ExitCode as _, NO_INPUT, UNAVAILABLE, USAGE};
use crate::health::Health;
use crate::kafka::PlainContext;
use crate::metrics::Metrics;
use crate::score::Scorer;
use crate::score::model::Model;
use crate::score::runtime::{Device, SessionOptions};
use crate::{http, kafka, pipeline, systemd};

/// How long the other loops may take to end once one has failed.
const GIVE_UP_WITHIN: Duration = Duration::from_secs(10);

/// Runs the daemon until SIGTERM or SIGINT; returns once everything read is published and committed.
pub fn serve(config: &Config) -> anyhow::Result<()> {
    kafka::check_properties(&config.kafka).exit_code(USAGE)?;
    let metrics = Metrics::new().context("cannot register the metrics")?;
    let health = Health::default();
    let address: SocketAddr = config.http.listen.parse().exit_code(USAGE)?;
    start_edge(address, config, &metrics, &health)?;

    let (model, mut scorer, policy) = open_model(config)?;
    metrics.set_model(
        &model.identity.fingerprint.to_string(),
        &model.identity.tokenizer.to_string(),
        &format!("{:?}", model.identity.precision).to_lowercase(),
        &config.model.device,
    );
    if health.is_stopping() {
        tracing::info!("stopped before anything was read");
        return Ok(());
    }
    pipeline::warm_up(&mut scorer, policy, &config.batch).exit_code(DATA)?;
    health.set_warm();
    tracing::info!(
        model = %model.identity.fingerprint.short(),
        tokenizer = %model.identity.tokenizer.short(),
        vocabulary = model.identity.vocabulary,
        window = policy.window,
        stride = policy.stride,
        device = config.model.device,
        "reference model is warm"
    );
    pipeline::run(config, model.identity, Box::new(scorer), policy, &metrics, &health)?;
    tracing::info!(scored = metrics.documents_scored.get(), "drained; everything read is committed");
    Ok(())
}

/// HTTP and signals, on a thread of their own, so that no loop of the pipeline can hold them up.
fn start_edge(
    address: SocketAddr,
    config: &Config,
    metrics: &Metrics,
    health: &Health,
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
    let (mut terminate, mut interrupt) = {
        let _guard = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    std::thread::Builder::new().name("edge".to_owned()).spawn(move || {
        runtime.block_on(async move {
            tokio::spawn(exit_when_stuck(health.clone()));
            tokio::spawn(systemd::keep_informed(health.clone(), metrics));
            tokio::spawn(async move {
                if let Err(error) = axum::serve(listener, router).await {
                    tracing::error!(%error, "the HTTP endpoint ended");
                }
            });
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                if health.is_stopping() {
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

fn open_model(config: &Config) -> anyhow::Result<(Model, Scorer, ContextPolicy)> {
    let model = Model::load(&config.model.path, config.score.entropies).exit_code(NO_INPUT)?;
    let policy = pipeline::context_policy(config, &model).exit_code(USAGE)?;
    let options = SessionOptions {
        library: onnxruntime_library(config),
        device: config.model.device.parse::<Device>().map_err(|error| anyhow!(error)).exit_code(USAGE)?,
        threads: config.model.threads,
        device_memory_bytes: config.model.device_memory_bytes,
    };
    let scorer = Scorer::new(&model, &options, config.score.entropies).exit_code(NO_INPUT)?;
    Ok((model, scorer, policy))
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
    let (model, mut scorer, policy) = open_model(config)?;
    pipeline::warm_up(&mut scorer, policy, &config.batch).exit_code(DATA)?;
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
