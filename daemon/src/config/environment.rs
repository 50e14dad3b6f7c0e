//! Variables of the environment that look like ours: ours, slips of the pen, and those that others put there.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::keys::Key;

const PREFIX: &str = "SLUICED_";
/// As far as this from the name of a variable of ours, another is taken for a slip of the pen.
const SLIP_LETTERS: usize = 2;

/// Refuses variables that are slips of the pen: a misspelt variable is as wrong as a misspelt key. Names of others, which
/// set nothing.
pub(super) fn check(
    keys: &[Key],
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Vec<String>, String> {
    let ours: BTreeMap<String, String> = environment
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    let known: Vec<String> = keys.iter().map(Key::variable).chain(["SLUICED_CONFIG".to_owned()]).collect();
    let mut foreign = Vec::new();
    for name in ours.keys().filter(|name| !known.contains(name) && !is_service_link(name, &ours)) {
        if let Some(meant) = meant(name, keys, &known) {
            return Err(format!(
                "the environment variable {name} sets nothing; {meant}; `sluiced serve --help` lists those that do. If it \
                 is there for something else, unset it for this process"
            ));
        }
        foreign.push(name.clone());
    }
    Ok(foreign)
}

/// What a variable that we do not know was meant to be, where it was meant for us.
fn meant(name: &str, keys: &[Key], known: &[String]) -> Option<String> {
    let nearest = known.iter().min_by_key(|known| strsim::levenshtein(known, name))?;
    if strsim::levenshtein(nearest, name) <= SLIP_LETTERS {
        return Some(format!("{nearest} is meant"));
    }
    let rest = name.strip_prefix(PREFIX)?.to_lowercase();
    if let Some(key) = keys.iter().find(|key| key.name() == rest) {
        return Some(format!("{} is meant", key.variable()));
    }
    let section = keys.iter().map(|key| key.path[0].as_str()).find(|section| {
        rest.strip_prefix(section).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    })?;
    Some(format!("no setting of [{section}] has this name"))
}

/// Whether Kubernetes (`enableServiceLinks`), or Docker's links, put `name` beside a service whose name begins with ours.
fn is_service_link(name: &str, all: &BTreeMap<String, String>) -> bool {
    let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // What follows the service's own name: SERVICE_HOST, SERVICE_PORT[_NAME], PORT[_NUMBER_PROTOCOL[_PART]].
    let is_ending = |ending: &str| {
        let parts: Vec<&str> = ending.split('_').collect();
        match parts[..] {
            ["SERVICE", "HOST"] | ["SERVICE", "PORT", ..] | ["PORT"] => true,
            ["PORT", number, "TCP" | "UDP" | "SCTP"]
            | ["PORT", number, "TCP" | "UDP" | "SCTP", "PROTO" | "PORT" | "ADDR"] => is_digits(number),
            _ => false,
        }
    };
    // Only where the service shows otherwise too, so that a port that somebody meant to set is still refused.
    let is_service = |service: &str| {
        all.contains_key(&format!("{service}_SERVICE_HOST"))
            || all.get(&format!("{service}_PORT")).is_some_and(|address| address.contains("://"))
    };
    name.match_indices('_').any(|(at, _)| is_ending(&name[at + 1..]) && is_service(&name[..at]))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::keys::keys;
    use super::*;

    fn check_pairs(pairs: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let environment = pairs.iter().map(|(name, value)| (name.into(), value.into()));
        check(&keys(), environment)
    }

    #[test]
    fn slips_of_the_pen_are_refused() {
        for (name, words) in [
            ("SLUICED_KAFKA_GROUP", "no setting of [kafka]"),
            ("SLUICED_KAFKA_GRUOP_ID", "SLUICED_KAFKA_GROUP_ID is meant"),
            ("SLUICED_DEVICE", "SLUICED_MODEL_DEVICE is meant"),
            ("SLUICED_CONFG", "SLUICED_CONFIG is meant"),
            ("SLUICED_HTTP_PORT", "no setting of [http]"),
            ("SLUICED_LOG", "no setting of [log]"),
        ] {
            let error = check_pairs(&[(name, "9464")]).unwrap_err();
            assert!(error.contains(name) && error.contains(words), "{error}");
        }
    }

    #[test]
    fn what_others_put_there_is_passed_over() {
        let links = [
            ("SLUICED_SERVICE_HOST", "10.0.0.1"),
            ("SLUICED_SERVICE_PORT", "9464"),
            ("SLUICED_SERVICE_PORT_METRICS", "9464"),
            ("SLUICED_PORT", "tcp://10.0.0.1:9464"),
            ("SLUICED_PORT_9464_TCP", "tcp://10.0.0.1:9464"),
            ("SLUICED_PORT_9464_TCP_PROTO", "tcp"),
            ("SLUICED_PORT_9464_TCP_PORT", "9464"),
            ("SLUICED_PORT_9464_TCP_ADDR", "10.0.0.1"),
            ("SLUICED_HTTP_SERVICE_HOST", "10.0.0.2"),
            ("SLUICED_HTTP_PORT", "tcp://10.0.0.2:80"),
            ("SLUICED_HTTP_PORT_80_TCP_ADDR", "10.0.0.2"),
        ];
        assert_eq!(check_pairs(&links).unwrap(), Vec::<String>::new());
        assert_eq!(check_pairs(&links[3..8]).unwrap(), Vec::<String>::new(), "Docker sets no SERVICE_HOST");
        let others = [("SLUICED_VERSION", "1"), ("SLUICED_KAFKA_GROUP_ID", "g"), ("SLUICE_CACHE", "c")];
        assert_eq!(check_pairs(&others).unwrap(), ["SLUICED_VERSION"]);
    }
}
