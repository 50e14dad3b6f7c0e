//! What each run was asked to do.

use std::collections::BTreeMap;

use serde_json::Value;

use super::html::{Html, PALETTE, escape};
use super::summary::Comparison;

/// A row for each setting, a column for each run; settings in which the runs differ come first.
pub(super) fn section(html: &mut Html, comparison: &Comparison<'_>) {
    let runs: Vec<BTreeMap<String, String>> = comparison
        .runs
        .iter()
        .map(|run| {
            let mut settings = BTreeMap::new();
            let record = serde_json::to_value(&run.run.record).unwrap_or_default();
            flatten("", &record, &mut settings);
            settings
        })
        .collect();
    if runs.is_empty() {
        return;
    }
    html.section(
        "Settings",
        "Everything that is in each run's <code>run.json</code>; what differs between the runs stands first.",
    );
    let mut names: Vec<&String> = runs.iter().flat_map(BTreeMap::keys).collect();
    names.sort();
    names.dedup();
    let differs = |name: &str| runs.iter().any(|run| run.get(name) != runs[0].get(name));
    names.sort_by_key(|name| !differs(name));
    html.push("<details open><summary>All settings</summary><div class=\"scroll\"><table class=\"settings\"><thead><tr><th scope=\"col\">setting</th>");
    for (index, run) in comparison.runs.iter().enumerate() {
        html.push(&format!(
            "<th scope=\"col\"><i class=\"dot series-{}\"></i>{}</th>",
            index % PALETTE,
            escape(run.name())
        ));
    }
    html.push("</tr></thead><tbody>");
    for name in names {
        html.push(&format!("<tr><th scope=\"row\">{}</th>", escape(name)));
        for run in &runs {
            let value = run.get(name).map_or("–".to_owned(), |value| escape(value));
            html.push(&if differs(name) {
                format!("<td><b>{value}</b></td>")
            } else {
                format!("<td>{value}</td>")
            });
        }
        html.push("</tr>");
    }
    html.push("</tbody></table></div></details></section>");
}

/// The leaves of a JSON value under names such as `schedule.peak`; a list is a leaf.
fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                flatten(&name, value, into);
            }
        }
        Value::String(text) => {
            into.insert(prefix.to_owned(), text.clone());
        }
        other => {
            into.insert(prefix.to_owned(), other.to_string());
        }
    }
}
