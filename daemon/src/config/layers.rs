//! File, environment and flags into one [`Config`]; flags and their help come from the types' schema.

use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::keys::{Key, Kind, keys};
use super::{Config, environment};

/// Settings that cannot be used. The process exits 64 before anything has started.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that cannot be read.
    #[error("cannot read the configuration {path}: {error}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why. Not its `source`, which whoever shows the whole chain would show twice.
        error: std::io::Error,
    },
    /// A file that is not TOML, or has a key or a type that is not known; the message shows the line.
    #[error("in the configuration {path}:\n{message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line, column and key.
        message: String,
    },
    /// A flag or an environment variable that does not fit its key.
    #[error("{0}")]
    Override(String),
    /// Keys whose values do not make sense.
    #[error("the configuration cannot be used:\n  {}", .0.join("\n  "))]
    Problems(Vec<String>),
}

/// Which settings a command has a use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    Daemon,
    /// Those of the model and its batches, for commands without a broker.
    Model,
}

impl Scope {
    fn has(self, section: &str) -> bool {
        self == Self::Daemon || matches!(section, "model" | "score" | "batch" | "log")
    }
}

/// Adds a flag for every key of the configuration to `command`.
pub fn add_flags(command: Command) -> Command {
    add_flags_of(command, Scope::Daemon)
}

/// Adds a flag for every key that `scope` has to `command`.
pub fn add_flags_of(mut command: Command, scope: Scope) -> Command {
    for key in keys().into_iter().filter(|key| scope.has(&key.path[0])) {
        let default =
            if key.default.is_empty() { String::new() } else { format!(" [default: {}]", key.default) };
        let arg = Arg::new(key.id())
            .long(key.flag())
            .help(format!("{}{default}", key.help))
            .env(key.variable())
            .value_name(match key.kind {
                Kind::Text => "TEXT",
                Kind::Integer => "N",
                Kind::Boolean => "true|false",
                Kind::Map => "NAME=VALUE",
            })
            // A property may be a secret, which `--help` would show.
            .hide_env_values(key.kind == Kind::Map)
            .help_heading(format!("Settings of [{}]", key.path[0]))
            .action(if key.kind == Kind::Map { ArgAction::Append } else { ArgAction::Set });
        command = command.arg(if key.kind == Kind::Map { arg.value_delimiter(',') } else { arg });
    }
    command
}

/// The settings of `file`, with those of the environment and the flags in `matches` laid over them, checked.
pub fn load(file: Option<&Path>, matches: &ArgMatches) -> Result<Config, ConfigError> {
    load_of(file, matches, Scope::Daemon)
}

/// As [`load`], for a command that has no use for the settings outside `scope`.
pub fn load_of(file: Option<&Path>, matches: &ArgMatches, scope: Scope) -> Result<Config, ConfigError> {
    let keys = keys();
    environment::check(&keys, std::env::vars_os()).map_err(ConfigError::Override)?;
    let Some(path) = file else { return layered(&keys, None, matches, scope) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })?;
    layered(&keys, Some((path, &text)), matches, scope)
}

/// Lays what `matches` has over the text of a file, and checks what comes of it.
fn layered(
    keys: &[Key],
    file: Option<(&Path, &str)>,
    matches: &ArgMatches,
    scope: Scope,
) -> Result<Config, ConfigError> {
    let mut table = toml::Table::new();
    if let Some((path, text)) = file {
        let text = text.trim_start_matches('\u{feff}');
        let invalid = |error: toml::de::Error| ConfigError::Invalid {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        };
        // Read as the real type first, whose errors point at line, column and key.
        toml::from_str::<Config>(text).map_err(invalid)?;
        table = toml::from_str(text).map_err(invalid)?;
    }
    for key in keys.iter().filter(|key| scope.has(&key.path[0])) {
        let Some(values) = matches.get_many::<String>(&key.id()) else { continue };
        overlay(&mut table, key, &values.map(String::as_str).collect::<Vec<_>>())?;
    }
    let mut config: Config = table.try_into().map_err(|error: toml::de::Error| {
        ConfigError::Override(format!("a flag or environment variable does not fit: {}", error.message()))
    })?;
    config.kafka.properties = sluice_kafka::resolve(&config.kafka.properties)
        .map_err(|error| ConfigError::Problems(vec![format!("kafka.properties: {error}")]))?;
    let mut problems = config.problems();
    // Every problem begins with the key it is about.
    problems.retain(|problem| problem.split('.').next().is_some_and(|section| scope.has(section)));
    if problems.is_empty() { Ok(config) } else { Err(ConfigError::Problems(problems)) }
}

/// The layers of the configuration, without a process around them: for who tries many.
pub struct Layers {
    keys: Vec<Key>,
    command: Command,
}

impl Default for Layers {
    fn default() -> Self {
        Self { keys: keys(), command: add_flags(Command::new("serve")) }
    }
}

impl Layers {
    /// What comes of the text of a file, variables of the environment and flags.
    pub fn load(
        &self,
        file: &str,
        environment: &[(&str, &str)],
        flags: &[&str],
    ) -> Result<Config, ConfigError> {
        let variables = environment.iter().map(|(name, value)| (name.into(), value.into()));
        environment::check(&self.keys, variables).map_err(ConfigError::Override)?;
        let arguments = ["serve"].iter().chain(flags);
        let matches = self.command.clone().try_get_matches_from(arguments);
        let matches = matches.map_err(|error| ConfigError::Override(error.to_string()))?;
        layered(&self.keys, Some((Path::new("file"), file)), &matches, Scope::Daemon)
    }
}

/// Variables of the environment that look like ours and are not; they set nothing.
pub fn foreign_variables() -> Result<Vec<String>, ConfigError> {
    environment::check(&keys(), std::env::vars_os()).map_err(ConfigError::Override)
}

fn overlay(table: &mut toml::Table, key: &Key, values: &[&str]) -> Result<(), ConfigError> {
    let refuse = |value: &str, wanted: &str| {
        ConfigError::Override(format!("--{} (or {}): `{value}` is not {wanted}", key.flag(), key.variable()))
    };
    let Some((leaf, groups)) = key.path.split_last() else { return Ok(()) };
    let mut table = table;
    for group in groups {
        let entry = table.entry(group.clone()).or_insert_with(|| toml::Table::new().into());
        table = entry.as_table_mut().ok_or_else(|| refuse(group, "a table"))?;
    }
    let Some(&last) = values.last() else { return Ok(()) };
    let value: toml::Value = match key.kind {
        Kind::Text => last.into(),
        Kind::Integer => last.parse::<i64>().map_err(|_| refuse(last, "a whole number"))?.into(),
        Kind::Boolean => last.parse::<bool>().map_err(|_| refuse(last, "true or false"))?.into(),
        Kind::Map => {
            let entry = table.entry(leaf.clone()).or_insert_with(|| toml::Table::new().into());
            let map = entry.as_table_mut().ok_or_else(|| refuse(leaf, "a table"))?;
            for pair in values.iter().filter(|pair| !pair.is_empty()) {
                let (name, value) = pair.split_once('=').ok_or_else(|| refuse(pair, "NAME=VALUE"))?;
                map.insert(name.to_owned(), value.into());
            }
            return Ok(());
        }
    };
    table.insert(leaf.clone(), value);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn run(file: &str, flags: &[&str]) -> Result<Config, ConfigError> {
        let mut path = tempfile::NamedTempFile::new().unwrap();
        path.write_all(file.as_bytes()).unwrap();
        let command = add_flags(Command::new("serve"));
        let matches = command.get_matches_from([&["serve"], flags].concat());
        load(Some(path.path()), &matches)
    }

    const MINIMAL: &str = "[kafka]\nbootstrap_servers = \"b:9092\"\n[model]\npath = \"m\"\n";

    #[test]
    fn flags_win_over_the_file() {
        let flags = ["--kafka-group-id", "other", "--score-entropies", "true", "--batch-tokens-max", "64"];
        let config = run(MINIMAL, &flags).unwrap();
        assert_eq!(config.kafka.group_id, "other");
        assert!(config.score.entropies);
        assert_eq!(config.batch.tokens_max, 64);
        assert_eq!(config.kafka.bootstrap_servers, "b:9092");
    }

    #[test]
    fn properties_come_from_file_and_flags_together() {
        let file = format!("{MINIMAL}[kafka.properties]\n\"socket.nagle.disable\" = \"true\"\n");
        let config =
            run(&file, &["--kafka-properties", "client.id=a", "--kafka-properties", "x=y=z"]).unwrap();
        let pairs: Vec<_> = config.kafka.properties.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(pairs, [("client.id", "a"), ("socket.nagle.disable", "true"), ("x", "y=z")]);
    }

    #[test]
    fn an_unknown_key_is_shown_with_its_line() {
        let error = run("[kafka]\nbootstrap_server = \"b\"\n", &[]).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("bootstrap_server"), "{error}");
    }

    #[test]
    fn senseless_values_are_all_named_at_once() {
        let flags =
            ["--model-device", "gpu", "--score-window-tokens", "9000", "--kafka-properties", "group.id=x"];
        let error = run(MINIMAL, &flags).unwrap_err().to_string();
        for part in ["model.device", "score.window_tokens (9000)", "group.id"] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }

    #[test]
    fn a_number_must_be_one() {
        let error = run(MINIMAL, &["--batch-tokens-max", "many"]).unwrap_err().to_string();
        assert_eq!(error, "--batch-tokens-max (or SLUICED_BATCH_TOKENS_MAX): `many` is not a whole number");
    }
}
