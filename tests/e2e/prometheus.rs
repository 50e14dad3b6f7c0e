//! Rules, alerts and dashboard, by Prometheus' own word.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{TokenIds, TokenizedDocument};
use sluice_tests::{Broker, Daemon, Prometheus, Trainer, golden, produce, promtool, root};

const PATIENCE: Duration = Duration::from_mins(1);

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

#[test]
fn the_rules_are_sound_and_pass_their_tests() {
    promtool(&["check", "config", "prometheus.yml"]);
    promtool(&["check", "rules", "recording.yml", "alerts.yml"]);
    promtool(&["test", "rules", "alerts.test.yml"]);
}

#[test]
fn each_alert_has_a_test_that_fires_one_that_does_not_and_an_entry_in_the_runbook() {
    let alerts = read("ops/prometheus/alerts.yml");
    let alerts: Vec<&str> = alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 10);
    let tests = read("ops/prometheus/alerts.test.yml");
    let tests: Vec<&str> = tests.split("  - name: ").skip(1).collect();
    assert_eq!(tests.len(), 2 * alerts.len());
    let runbook = read("ops/docs/runbook.md");
    for alert in alerts {
        let test = |what: &str| {
            let found = tests.iter().find(|test| test.starts_with(&format!("{alert} {what}\n")));
            found.unwrap_or_else(|| panic!("no test in which {alert} {what}"))
        };
        let asked = format!("alertname: {alert}\n");
        let (fires, quiet) = (test("fires"), test("stays quiet"));
        assert!(fires.contains(&asked) && fires.contains("exp_labels"), "{fires}");
        assert!(quiet.contains(&asked) && quiet.contains("exp_alerts: []"), "{quiet}");
        assert!(runbook.contains(&format!("\n## {alert}\n")), "the runbook has nothing on {alert}");
    }
}

#[test]
fn the_dashboard_is_what_its_code_makes() {
    let output = Command::new("python3").arg(root().join("ops/grafana/dashboard.py")).output().unwrap();
    assert!(output.status.success());
    assert!(
        output.stdout == read("ops/grafana/sluice.json").as_bytes(),
        "run ops/grafana/dashboard.py > ops/grafana/sluice.json"
    );
}

/// Title, legend and PromQL of every query on the dashboard, for every daemon, over a few seconds.
fn dashboard_queries() -> Vec<(String, String, String)> {
    let dashboard: serde_json::Value = serde_json::from_str(&read("ops/grafana/sluice.json")).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    panels
        .filter(|panel| panel["type"] != "row")
        .flat_map(|panel| {
            panel["targets"].as_array().unwrap().iter().map(move |target| {
                let query = text(&target["expr"])
                    .replace("$__rate_interval", "10s")
                    .replace("$job", ".*")
                    .replace("$instance", ".*");
                (text(&panel["title"]), text(&target["legendFormat"]), query)
            })
        })
        .collect()
}

/// Names of metrics and recorded series in PromQL.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let prefixes = ["sluiced_", "sluice_train_", "process_", "job:", "instance:"];
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .filter(|word| prefixes.iter().any(|prefix| word.len() > prefix.len() && word.starts_with(prefix)))
        .map(str::to_owned)
        .collect()
}

fn records(from: usize, count: usize) -> Vec<(String, Option<Bytes>)> {
    let tokenizer = Fingerprint::of_bytes(&std::fs::read(golden("tiny-llama/tokenizer.json")).unwrap());
    (from..from + count)
        .map(|number| {
            let id = format!("document-{number}");
            let length = 20 + number * 37 % 200;
            let document = TokenizedDocument {
                id: id.clone(),
                tokens: TokenIds::new(&vec![number as u32 % 500; length]),
                tokenizer,
                source: String::new(),
                attributes: BTreeMap::new(),
            };
            // One in two hundred is no document.
            let payload =
                if number.is_multiple_of(200) { Bytes::from_static(b"?") } else { document.encode() };
            (id, Some(payload))
        })
        .collect()
}

/// Sends records, a few every tenth of a second, until `enough`.
fn load(bootstrap_servers: &str, enough: &AtomicBool) {
    let deadline = Instant::now() + 2 * PATIENCE;
    let mut sent = 0;
    while !enough.load(Ordering::Relaxed) && Instant::now() < deadline {
        let batch = records(sent, 20);
        sent += batch.len();
        let borrowed: Vec<_> = batch.iter().map(|(id, payload)| (id.as_str(), payload.clone())).collect();
        produce(bootstrap_servers, "sluice.documents", &borrowed);
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Leaves what each panel shows in `target/tmp/panels.json`, for whoever wants to draw it.
fn keep_panels(prometheus: &Prometheus) {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let (start, end) = ((now - 30).to_string(), now.to_string());
    let panels: Vec<_> = dashboard_queries()
        .into_iter()
        .map(|(title, legend, query)| {
            let parameters = [("query", query.as_str()), ("start", &start), ("end", &end), ("step", "1")];
            let data = prometheus.api("query_range", &parameters);
            serde_json::json!({ "title": title, "legend": legend, "result": data["result"] })
        })
        .collect();
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("panels.json");
    std::fs::write(file, serde_json::to_vec(&panels).unwrap()).unwrap();
}

#[test]
fn a_real_prometheus_finds_every_metric_and_fills_every_panel() {
    let broker = Broker::with_sluice_topics();
    let daemon = Daemon::start(&broker.bootstrap_servers, &golden("tiny-llama"), &[]);
    let data = tempfile::tempdir().unwrap();
    let held_out = data.path().join("held-out.jsonl");
    std::fs::write(&held_out, "{\"text\":\"two and two are four\"}\n").unwrap();
    let eval = format!("held-out={}", held_out.display());
    let flags = ["--objective", "slm", "--keep", "0.5", "--steps", "1000000", "--eval", &eval];
    let often = ["--eval-every", "5", "--checkpoint-every", "5"];
    let out = data.path().join("run");
    let trainer = Trainer::start(&broker.bootstrap_servers, &out, &[&flags[..], &often].concat(), &[]);
    let targets = [("sluiced", daemon.address()), ("sluice-train", trainer.address())];
    let prometheus = Prometheus::scraping(&targets, data.path());
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| load(&broker.bootstrap_servers, &enough));
        let missing = missing(&prometheus);
        // Some seconds of curves, for the picture.
        std::thread::sleep(Duration::from_secs(12));
        keep_panels(&prometheus);
        enough.store(true, Ordering::Relaxed);
        assert!(
            missing.is_empty(),
            "after a minute under load there is no value for\n{}\nThe trainer says:\n{}",
            missing.join("\n"),
            trainer.log()
        );
    });
    let alerts = prometheus.api("alerts", &[]);
    assert_eq!(alerts["alerts"], serde_json::json!([]), "nothing is wrong, so nothing is pending");
    assert_eq!(trainer.metric("sluice_train_records_rejected_total{reason=\"record\"}"), Some(0.0));
    assert_eq!(trainer.stop().code(), Some(0));
    assert_eq!(daemon.stop().code(), Some(0));
}

/// Metrics of the driver of a GPU, which a machine without one does not have.
const OF_A_GPU: &str = "sluiced_device_memory_";

/// Metrics that Prometheus does not know and queries of the dashboard without a number, once there are none or a
/// minute is over.
fn missing(prometheus: &Prometheus) -> Vec<String> {
    let rules = [read("ops/prometheus/recording.yml"), read("ops/prometheus/alerts.yml")].concat();
    let mut queries = dashboard_queries();
    queries.retain(|(_, _, query)| !query.contains(OF_A_GPU));
    let named = queries.iter().fold(metrics_in(&rules), |names, (_, _, query)| &names | &metrics_in(query));
    assert!(named.len() > 30, "{named:?}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let known = prometheus.api("label/__name__/values", &[]);
        let known: BTreeSet<String> =
            known.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect();
        let mut missing: Vec<String> = named.difference(&known).cloned().collect();
        for (title, legend, query) in &queries {
            if !has_number(&prometheus.api("query", &[("query", query)])) {
                missing.push(format!("{title} ({legend}): {query}"));
            }
        }
        if missing.is_empty() || Instant::now() > deadline {
            return missing;
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn has_number(data: &serde_json::Value) -> bool {
    let series = data["result"].as_array().unwrap();
    series.iter().any(|series| series["value"][1].as_str().unwrap().parse::<f64>().is_ok_and(f64::is_finite))
}
