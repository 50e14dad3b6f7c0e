//! The keys of the configuration, made from the types: where each stands, what it is about and what it takes.

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::Config;

/// A key of the configuration, as the schema describes it.
pub(super) struct Key {
    /// Such as `["kafka", "group_id"]`.
    pub path: Vec<String>,
    /// What the table that it is in is about.
    pub section_help: String,
    pub help: String,
    pub kind: Kind,
    pub default: String,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    Text,
    Integer,
    Boolean,
    /// `NAME=VALUE`, any number of times.
    Map,
}

impl Key {
    /// Its name within its table.
    pub fn name(&self) -> &str {
        self.path.last().map_or("", String::as_str)
    }

    /// Its name among the flags that were given.
    pub fn id(&self) -> String {
        self.path.join(".")
    }

    /// Such as `kafka-group-id`.
    pub fn flag(&self) -> String {
        self.path.join("-").replace('_', "-")
    }

    /// Such as `SLUICED_KAFKA_GROUP_ID`.
    pub fn variable(&self) -> String {
        format!("SLUICED_{}", self.path.join("_").to_uppercase())
    }
}

/// Every key, in the order of the types.
pub(super) fn keys() -> Vec<Key> {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<Config>().to_value();
    let defaults = serde_json::to_value(Config::default()).unwrap_or_default();
    let mut keys = Vec::new();
    collect(&schema, &defaults, "", &mut Vec::new(), &mut keys);
    keys
}

fn help_of(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().replace('\n', " ")
}

fn collect(schema: &Value, default: &Value, section_help: &str, path: &mut Vec<String>, keys: &mut Vec<Key>) {
    if let Some(properties) = schema["properties"].as_object() {
        let help = help_of(schema);
        for (name, schema) in properties {
            path.push(name.clone());
            collect(schema, &default[name], &help, path, keys);
            path.pop();
        }
        return;
    }
    let kind = match schema["type"].as_str() {
        Some("integer") => Kind::Integer,
        Some("boolean") => Kind::Boolean,
        Some("object") => Kind::Map,
        _ => Kind::Text,
    };
    keys.push(Key {
        path: path.clone(),
        section_help: section_help.to_owned(),
        help: help_of(schema),
        kind,
        default: match default {
            Value::String(text) => text.clone(),
            Value::Object(_) => String::new(),
            other => other.to_string(),
        },
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_help_and_a_variable_of_its_own() {
        let keys = keys();
        assert!(keys.len() > 20);
        assert!(keys.iter().all(|key| key.help.ends_with('.')), "a sentence for each key");
        let variables: std::collections::HashSet<_> = keys.iter().map(Key::variable).collect();
        assert_eq!(variables.len(), keys.len());
    }
}
