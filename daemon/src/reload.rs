//! Going over to new settings while the process runs: on SIGHUP the configuration is read and checked again, the model
//! loaded and warmed up beside the one that serves, and only then the loops finish what they have, and begin again with
//! the new settings. Whatever fails before leaves the old ones in force.

use std::sync::{Mutex, PoisonError};

use anyhow::bail;
use serde_json::Value;

use crate::config::{Config, ConfigError};
use crate::health::{Health, Wait};
use crate::logging;
use crate::metrics::{Metrics, RELOAD_APPLIED, RELOAD_REFUSED};
use crate::reference::Reference;
use crate::systemd;

/// Keys, or the beginnings of keys, that may change while the process runs.
const CHANGEABLE: [&str; 5] = ["batch.", "limits.", "log.level", "model.", "score."];
/// Keys among them that may not: ONNX Runtime is loaded once in a process.
const FIXED: [&str; 1] = ["model.onnxruntime"];

/// Reads the settings again, from where they were read at the start.
pub type Load = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// What is in force, and what is about to be.
pub struct Reload {
    load: Load,
    state: Mutex<State>,
    /// Held by the reload that is under way.
    turn: Mutex<()>,
}

struct State {
    in_force: (Config, Reference),
    /// Checked and warm; taken once the loops have stopped.
    next: Option<(Config, Reference)>,
}

impl Reload {
    /// For a daemon that serves `reference` as `config` says.
    pub fn new(load: Load, config: Config, reference: Reference) -> Self {
        let state = State { in_force: (config, reference), next: None };
        Self { load, state: Mutex::new(state), turn: Mutex::default() }
    }

    /// Settings and model in force.
    pub fn in_force(&self) -> (Config, Reference) {
        self.lock().in_force.clone()
    }

    /// Puts the next settings in force, where there are any.
    pub fn take_next(&self) -> bool {
        let mut state = self.lock();
        let Some(next) = state.next.take() else { return false };
        state.in_force = next;
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what SIGHUP asks for, and says how it went. One at a time: a second model beside the one that is loaded would
    /// be a third in memory.
    pub fn run(&self, metrics: &Metrics, health: &Health) {
        let Ok(_turn) = self.turn.try_lock() else {
            tracing::warn!("SIGHUP has no effect: a reload is under way");
            return;
        };
        let outcome = systemd::during_reload(|| self.prepare(health));
        match outcome {
            Ok(changed) => {
                metrics.reloads.with_label_values(&[RELOAD_APPLIED]).inc();
                tracing::info!(changed = changed.join(", "), "configuration reloaded");
            }
            Err(error) => {
                metrics.reloads.with_label_values(&[RELOAD_REFUSED]).inc();
                tracing::error!(
                    error = format!("{error:#}"),
                    "cannot use the new configuration; the old one is in force"
                );
            }
        }
    }

    /// Checks and warms up what is new; returns the keys that changed, `model` where the folder holds another model.
    fn prepare(&self, health: &Health) -> anyhow::Result<Vec<String>> {
        let config = (self.load)()?;
        let (old, reference) = self.in_force();
        let mut changed = changed_keys(&old, &config);
        check_changeable(&changed)?;
        let next = reference.with_settings(&old, &config)?;
        if next.model.identity.fingerprint != reference.model.identity.fingerprint {
            changed.push("model".to_owned());
        }
        if changed.iter().any(|key| key == "log.level") {
            logging::set_level(&config.log)?;
        }
        if changed.iter().all(|key| key == "log.level") {
            self.lock().in_force.0 = config;
            return Ok(changed);
        }
        if health.waits_for(Wait::Broker) {
            bail!("no broker answers, so that the loops could not begin again");
        }
        if health.waits_for(Wait::Coordinator) {
            bail!("the transactions coordinator does not answer, so that the loops could not come to an end");
        }
        if health.waits_for(Wait::Publishing) {
            bail!("the brokers refuse what is published, so that the loops could not come to an end");
        }
        self.lock().next = Some((config, next));
        health.switch();
        Ok(changed)
    }
}

/// Refuses changes that take a restart.
fn check_changeable(changed: &[String]) -> anyhow::Result<()> {
    let fixed: Vec<&str> = changed
        .iter()
        .map(String::as_str)
        .filter(|key| FIXED.contains(key) || !CHANGEABLE.iter().any(|part| key.starts_with(part)))
        .collect();
    if !fixed.is_empty() {
        bail!("{} cannot change while the daemon runs; restart it", fixed.join(", "));
    }
    Ok(())
}

/// Keys whose values differ, such as `batch.tokens_max`.
fn changed_keys(old: &Config, new: &Config) -> Vec<String> {
    let mut changed = Vec::new();
    // A configuration is made of numbers, text and tables, which JSON has too.
    let value = |config: &Config| serde_json::to_value(config).unwrap_or_default();
    differences(&value(old), &value(new), "", &mut changed);
    changed
}

fn differences(old: &Value, new: &Value, key: &str, changed: &mut Vec<String>) {
    let (Some(old), Some(new)) = (old.as_object(), new.as_object()) else {
        if old != new {
            changed.push(key.to_owned());
        }
        return;
    };
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for name in names {
        let inner = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
        let value = |table: &serde_json::Map<String, Value>| table.get(name).cloned().unwrap_or_default();
        differences(&value(old), &value(new), &inner, changed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::unwrap_used)]
    fn keys_that_changed_are_named_and_some_take_a_restart() {
        let old = Config::default();
        let mut new = old.clone();
        assert!(changed_keys(&old, &new).is_empty());
        new.batch.tokens_max = 7;
        new.log.level = "debug".to_owned();
        assert_eq!(changed_keys(&old, &new), ["batch.tokens_max", "log.level"]);
        check_changeable(&changed_keys(&old, &new)).unwrap();
        new.kafka.properties.insert("a.b".to_owned(), "c".to_owned());
        new.model.onnxruntime = "x".into();
        let refused = check_changeable(&changed_keys(&old, &new)).unwrap_err().to_string();
        assert_eq!(
            refused,
            "kafka.properties.a.b, model.onnxruntime cannot change while the daemon runs; restart it"
        );
    }
}
