//! The settings as documents, made from their types: the reference and the configuration file of the package.

use super::keys::{Key, Kind, keys};

/// The reference of every setting, as Markdown.
pub fn reference() -> String {
    let mut lines = vec![
        "# Settings of `sluiced serve` and `sluiced validate`\n\n\
         Made from the types in `daemon/src/config` by `ops/docs/generate`; not edited by hand.\n\n\
         Each setting is a key of the TOML file given as `--config`, an environment variable and a flag: `group_id` under \
         `[kafka]` is `SLUICED_KAFKA_GROUP_ID` and `--kafka-group-id`. A flag wins over a variable, and a variable over the \
         file. Unknown keys are errors, and so are variables that look like a slip of the pen; \
         those that Kubernetes puts beside a service named `sluiced` are passed over, and others are warned of. Bad settings end the process with exit code 64 before anything \
         starts."
            .to_owned(),
    ];
    for (section, help, keys) in sections() {
        lines.push(format!("\n## [{section}]\n\n{help}\n\n| key | default | meaning |\n|---|---|---|"));
        lines.extend(keys.iter().map(|key| {
            let default = match (key.kind, key.default.as_str()) {
                (Kind::Text | Kind::Map, "") => "none".to_owned(),
                (_, default) => format!("`{default}`"),
            };
            format!("| `{}` | {default} | {} |", key.name(), key.help.replace('|', "\\|"))
        }));
    }
    lines.join("\n") + "\n"
}

/// A configuration file in which every setting is explained and left at its default.
pub fn example() -> String {
    let mut lines = vec![
        "# Settings of the Sluice daemons of this machine. What is commented out shows the default.\n\
         # `sluiced validate --config /etc/sluice/sluiced.toml` says what is wrong, if anything is."
            .to_owned(),
    ];
    for (section, help, keys) in sections() {
        lines.push(format!("\n# {help}\n[{section}]"));
        lines.extend(keys.iter().map(|key| {
            let (name, default) = (key.name(), &key.default);
            let setting = match key.kind {
                Kind::Map => format!("{name} = {{ \"name\" = \"value\" }}"),
                Kind::Text => format!("{name} = \"{default}\""),
                Kind::Integer | Kind::Boolean => format!("{name} = {default}"),
            };
            format!("# {}\n# {setting}", key.help)
        }));
    }
    lines.join("\n") + "\n"
}

/// Each table with its help and its keys, in the order of the types.
fn sections() -> Vec<(String, String, Vec<Key>)> {
    let mut sections: Vec<(String, String, Vec<Key>)> = Vec::new();
    for key in keys() {
        if sections.last().is_none_or(|(section, ..)| *section != key.path[0]) {
            sections.push((key.path[0].clone(), key.section_help.clone(), Vec::new()));
        }
        if let Some((.., keys)) = sections.last_mut() {
            keys.push(key);
        }
    }
    sections
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn committed(path: &str) -> String {
        std::fs::read_to_string(format!("{}/../ops/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    #[test]
    fn the_committed_documents_are_those_of_the_types() {
        assert!(committed("docs/configuration.md") == reference(), "run ops/docs/generate");
        assert!(committed("packaging/sluiced.toml") == example(), "run ops/docs/generate");
    }

    #[test]
    fn the_example_shows_the_defaults() {
        assert_eq!(toml::from_str::<Config>(&example()).unwrap(), Config::default());
        // Without the comments too: what they show are values of the right type.
        let uncommented: String = example()
            .lines()
            .filter(|line| !line.contains("{ \"name\""))
            .map(|line| line.strip_prefix("# ").filter(|rest| is_setting(rest)).unwrap_or(line))
            .fold(String::new(), |text, line| text + line + "\n");
        assert_eq!(toml::from_str::<Config>(&uncommented).unwrap(), Config::default());
    }

    fn is_setting(line: &str) -> bool {
        line.split_once(" = ")
            .is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    }
}
