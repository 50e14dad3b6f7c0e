//! Tests of [`super`].
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{Refused, Telemetry};
use crate::run::metrics::StepMetric;
use crate::watch::stage::Stage;

fn value(telemetry: &Telemetry, name: &str) -> Option<f64> {
    let text = String::from_utf8(telemetry.render().unwrap()).unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

fn metric(threshold: Option<f32>, loss_unselected: Option<f64>) -> StepMetric {
    StepMetric {
        step: 7,
        tokens: 900,
        tokens_kept: 500,
        loss: Some(2.0),
        loss_all: 1.5,
        loss_selected: Some(2.0),
        loss_unselected,
        threshold,
        kept: 60,
        scored: 90,
        learning_rate: 0.25,
        gradient_norm: 3.0,
        seconds: 0.5,
        cpu_seconds: 0.5,
        data_wait_seconds: 0.1,
        sources: BTreeMap::new(),
        data: String::new(),
        digest: String::new(),
    }
}

#[test]
fn a_stage_that_does_not_end_shows_and_all_stages_are_all_of_the_time() {
    let started = Instant::now();
    let telemetry = Telemetry::default();
    telemetry.enter(Stage::Data);
    std::thread::sleep(Duration::from_millis(30));
    let waited = |telemetry: &Telemetry| value(telemetry, "sluice_train_stage_seconds_total{stage=\"data\"}");
    assert!(waited(&telemetry).unwrap() >= 0.03);
    telemetry.enter(Stage::Forward);
    let before = waited(&telemetry);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(waited(&telemetry), before, "the clock of a stage stands still once it is over");
    let all: f64 = Stage::ALL
        .map(|stage| format!("sluice_train_stage_seconds_total{{stage=\"{}\"}}", stage.name()))
        .iter()
        .map(|name| value(&telemetry, name).unwrap())
        .sum();
    assert!(all >= 0.04 && all <= started.elapsed().as_secs_f64(), "{all}");
}

#[test]
fn a_step_shows_and_what_it_does_not_have_is_not_there() {
    let telemetry = Telemetry::default();
    telemetry.step(&metric(Some(0.75), Some(1.0)), 100, Some(0.6));
    let shows = |name: &str| value(&telemetry, name);
    assert_eq!(shows("sluice_train_steps_total"), Some(1.0));
    assert_eq!(shows("sluice_train_step"), Some(7.0));
    assert_eq!(shows("sluice_train_tokens_total"), Some(100.0));
    assert_eq!(shows("sluice_train_tokens_kept_total"), Some(60.0));
    assert_eq!(shows("sluice_train_loss_nats{tokens=\"dropped\"}"), Some(1.0));
    assert_eq!(shows("sluice_train_selection_threshold"), Some(0.75));
    assert_eq!(shows("sluice_train_keep_ratio"), Some(0.6));
    telemetry.step(&metric(None, None), 100, None);
    for name in [
        "sluice_train_loss_nats{tokens=\"dropped\"}",
        "sluice_train_selection_threshold",
        "sluice_train_keep_ratio",
    ] {
        assert_eq!(value(&telemetry, name), None, "{name}");
    }
}

#[test]
fn every_reason_is_there_before_it_happens() {
    let telemetry = Telemetry::default();
    telemetry.refused(Refused::NotFinite);
    let refused =
        |reason| value(&telemetry, &format!("sluice_train_steps_refused_total{{reason=\"{reason}\"}}"));
    assert_eq!((refused("not_finite"), refused("nothing_kept")), (Some(1.0), Some(0.0)));
    assert_eq!(value(&telemetry, "sluice_train_records_rejected_total{reason=\"record\"}"), Some(0.0));
}
