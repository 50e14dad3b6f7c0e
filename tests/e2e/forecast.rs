//! `sluice-train forecast` beside what `sluiced model score` says of the same text with both models.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};

use place::{DOCUMENTS, Place, number, sluice_train, stderr, stdout, succeeds, text, tokenizer, word};
use serde_json::{Value, json};
use sluice_tests::{Broker, Daemon};

#[path = "forecast/place.rs"]
mod place;

/// Nats.
const CLOSE: f64 = 1e-4;
const USAGE: i32 = 64;
const WRONG_DATA: i32 = 65;
const UNAVAILABLE: i32 = 69;

fn forecast(command: &mut Command) -> Value {
    serde_json::from_slice(&succeeds(command.arg("--json")).stdout).unwrap()
}

/// The excess of each predicted token, with its source.
fn excess(place: &Place) -> Vec<(String, f64)> {
    let reference = place.losses("reference");
    let mut excess = Vec::new();
    for (id, (source, base)) in place.losses("base") {
        let pairs = base.into_iter().zip(&reference[&id].1);
        let differences = pairs.filter_map(|(base, reference)| Some(base? - (*reference)?));
        excess.extend(differences.map(|difference| (source.clone(), difference)));
    }
    excess
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}

/// Standard error of the mean over the tokens of a source, by leaving out one document after the other (Efron and Tibshirani, An
/// Introduction to the Bootstrap, 1993, chapter 11).
fn jackknife(place: &Place, source: &str) -> f64 {
    let reference = place.losses("reference");
    let documents: Vec<Vec<f64>> = place
        .losses("base")
        .into_iter()
        .filter(|(_, (own, _))| own == source)
        .map(|(id, (_, base))| {
            let pairs = base.into_iter().zip(&reference[&id].1);
            pairs.filter_map(|(base, reference)| Some(base? - (*reference)?)).collect()
        })
        .collect();
    let without = |left_out: usize| {
        let others = documents.iter().enumerate().filter(|(index, _)| *index != left_out);
        mean(others.flat_map(|(_, document)| document.iter().copied()))
    };
    let means: Vec<f64> = (0..documents.len()).map(without).collect();
    let of_all = mean(means.iter().copied());
    let squares: f64 = means.iter().map(|mean| (mean - of_all).powi(2)).sum();
    let count = documents.len() as f64;
    (squares * (count - 1.0) / count).sqrt()
}

/// Tokens of `source` among those of `share` with the highest excess.
fn kept(excess: &[(String, f64)], share: f64, source: &str) -> f64 {
    let mut sorted: Vec<&(String, f64)> = excess.iter().collect();
    sorted.sort_by(|left, right| right.1.total_cmp(&left.1));
    let count = (share * sorted.len() as f64 + 0.5).floor() as usize;
    sorted[..count].iter().filter(|(own, _)| own == source).count() as f64
}

/// Every number of a forecast of the whole stream, beside what the scored lines come to.
fn check(found: &Value, place: &Place) {
    let excess = excess(place);
    assert_eq!(found["documents_read"], DOCUMENTS);
    assert_eq!(found["ending"], "stream_ended");
    assert_eq!(found["all"]["tokens"], excess.len());
    let sources = found["sources"].as_array().unwrap();
    let names: Vec<String> = sources.iter().map(|source| word(&source["source"])).collect();
    assert_eq!(names, ["math", "prose"], "the highest mean excess first");
    let means: BTreeMap<&str, BTreeMap<String, f64>> = ["base", "reference"]
        .into_iter()
        .map(|model| {
            let losses = place.losses(model);
            let of = |name: &String| {
                let own = losses.values().filter(|(source, _)| source == name);
                (name.clone(), mean(own.flat_map(|(_, losses)| losses.iter().flatten().copied())))
            };
            (model, names.iter().map(of).collect())
        })
        .collect();
    for (name, source) in names.iter().zip(sources) {
        let own: Vec<f64> = excess.iter().filter(|(own, _)| own == name).map(|(_, excess)| *excess).collect();
        let close = |key: &str, expected: f64| {
            let value = key.split('/').fold(source, |value, key| &value[key]);
            assert!((number(value) - expected).abs() < CLOSE, "{name} {key}: {value} is not {expected}");
        };
        let count = |key: &str, expected: f64| {
            let value = key.split('/').fold(source, |value, key| &value[key]);
            assert!((number(value) - expected).abs() <= 1.0, "{name} {key}: {value} is not {expected}");
        };
        assert_eq!(source["documents"], if name == "math" { 30 } else { 90 });
        assert_eq!(source["tokens"], own.len());
        assert_eq!(source["compared_tokens"], source["tokens"]);
        close("share_of_tokens", own.len() as f64 / excess.len() as f64);
        close("reference_loss", means["reference"][name]);
        close("base_loss", means["base"][name]);
        close("excess/mean", mean(own.iter().copied()));
        // Student's quantile for 29 and for 89 degrees of freedom.
        let quantile = if name == "math" { 2.045 } else { 1.987 };
        let half = (number(&source["excess"]["high"]) - number(&source["excess"]["low"])) / 2.0;
        let expected = quantile * jackknife(place, name);
        assert!((half / expected - 1.0).abs() < 0.1, "{name}: {half} is not {expected}");
        let positive: Vec<f64> = own.iter().copied().filter(|excess| *excess >= 0.0).collect();
        count("kept/adaptive/tokens", positive.len() as f64);
        let one_token = 1.0 / own.len() as f64 + CLOSE;
        let below = number(&source["share_below_zero"]) - (1.0 - positive.len() as f64 / own.len() as f64);
        assert!(below.abs() < one_token, "{name}: {below}");
        // A token near 0 may be on either side of it, and moves a mean by no more than its own excess.
        close("excess_of_kept", mean(positive.into_iter()));
        close("excess_of_rest", mean(own.iter().copied().filter(|excess| *excess < 0.0)));
        for share in ["0.6", "0.3"] {
            count(&format!("kept/{share}/tokens"), kept(&excess, share.parse().unwrap(), name));
        }
    }
    let of_all = number(&found["all"]["kept"]["0.3"]["tokens"]);
    let share = number(&sources[0]["kept"]["0.3"]["share_of_kept"]);
    assert!((share - number(&sources[0]["kept"]["0.3"]["tokens"]) / of_all).abs() < 1e-9);
}

#[test]
fn a_topic_is_forecast_as_its_scored_lines_say() {
    let place = Place::new();
    let base = place.path("base-checkpoint");
    let with_base = ["--init", text(&base)];

    // From files, and from a topic that the daemon has scored, the numbers are those of the lines.
    let from_files = forecast(&mut place.of_files("reference", &with_base));
    check(&from_files, &place);
    assert_eq!(from_files["verdict"], "may_help");
    assert_eq!(from_files["target"]["sources"], json!(["math"]));
    assert_eq!(from_files["is_map_measured"], from_files["map"].is_object());
    let again = forecast(&mut place.of_files("reference", &with_base));
    assert_eq!(again, from_files, "nothing is left to chance");

    let broker = Broker::start(&["sluice.documents:2", "sluice.scored:2", "sluice.dead-letters:1"]);
    let servers = broker.bootstrap_servers.as_str();
    let stream = place.path("stream.jsonl");
    let ingest = ["ingest", "--bootstrap-servers", servers, "--tokenizer", text(&tokenizer()), text(&stream)]
        .map(str::to_owned);
    succeeds(&mut place.sluiced(&ingest.each_ref().map(String::as_str)));
    let daemon = Daemon::start(servers, &place.path("reference-onnx"), &[]);
    daemon.wait("all documents", |daemon| daemon.finished() >= DOCUMENTS);
    assert!(daemon.stop().success());
    let of_topic = |flags: &[&str]| {
        let mut command = sluice_train(&["forecast", "--bootstrap-servers", servers]);
        command.args(["--tokenizer", text(&tokenizer())]).args(flags);
        command
    };
    let from_topic = forecast(&mut of_topic(&with_base));
    check(&from_topic, &place);
    assert_eq!(from_topic["documents_of"], "topic sluice.scored");
    assert_eq!(from_topic["reference_model"], from_files["reference_model"]);
    let some = forecast(of_topic(&with_base).args(["--documents", "7"]));
    assert_eq!((&some["documents_read"], &some["ending"]), (&json!(7), &json!("full")));

    // Without a base model the table says what it can, and the command that it prints says the rest.
    let alone = succeeds(&mut of_topic(&[]));
    let page = stdout(&alone);
    assert!(page.starts_with("Without the model that will be trained nobody can say"), "{page}");
    assert!(page.contains("reference loss") && !page.contains("adaptive"), "{page}");
    assert!(stderr(&alone).contains("100/2000 documents"), "{}", stderr(&alone));
    let command = page.lines().find(|line| line.trim_start().starts_with("sluice-train forecast")).unwrap();
    let words: Vec<&str> = command.split_whitespace().skip(1).collect();
    let filled: Vec<&str> =
        words.into_iter().map(|word| if word == "BASE_FOLDER" { text(&base) } else { word }).collect();
    assert_eq!(forecast(&mut sluice_train(&filled)), from_topic);

    // For people.
    let page = stdout(&succeeds(&mut of_topic(&with_base)));
    eprintln!("{page}");
    assert!(page.starts_with("Selection may help on math"), "{page}");
    for part in ["part of adaptive's", "95 %", "What this does not know"] {
        assert!(page.contains(part), "{part} is not in:\n{page}");
    }
    if from_topic["is_map_measured"] == false {
        assert!(page.contains("has not been measured in this build"), "{page}");
    }
    let mut closed = of_topic(&with_base);
    let mut child = closed.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{said}");
    assert!(!said.contains("error") && !said.contains("panicked"), "{said}");

    a_run_keeps_at_its_first_step_what_was_forecast(&place, &from_files);
    a_signal_ends_it_with_what_was_found(&place);
    a_reference_that_is_worse_is_said_first(&place);
    what_is_wrong_ends_as_a_run_does(&place, servers);
}

/// Of a step that holds the whole stream.
fn a_run_keeps_at_its_first_step_what_was_forecast(place: &Place, found: &Value) {
    let (file, base) = (place.path("by-reference.jsonl"), place.path("base-checkpoint"));
    for rule in ["adaptive", "0.3"] {
        let out = place.path(&format!("run-{rule}"));
        let mut run = sluice_train(&["run", "--files", text(&file), "--init", text(&base), "--keep", rule]);
        run.args(["--tokenizer", text(&tokenizer()), "--out", text(&out)]);
        succeeds(run.args(["--batch-size", "400", "--steps", "1"]));
        let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let mut lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let step = lines.find(|line| line["type"] == "step").unwrap();
        assert_eq!(step["scored"], found["all"]["compared_tokens"], "the step holds all of it");
        for source in found["sources"].as_array().unwrap() {
            let own = &step["sources"][word(&source["source"])];
            assert_eq!(own["scored"], source["compared_tokens"]);
            let difference = number(&own["kept"]) - number(&source["kept"][rule]["tokens"]);
            assert!(difference.abs() <= 1.0, "{rule}: {own} is not {source}");
        }
    }
}

/// Of more documents than anybody waits for.
fn a_signal_ends_it_with_what_was_found(place: &Place) {
    let base = place.path("base-checkpoint");
    let mut command = place.of_files("reference", &["--init", text(&base), "--json", "--documents", "20000"]);
    let file = place.path("by-reference.jsonl");
    command.args((0..200).flat_map(|_| ["--files", text(&file)]));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(said.any(|line| line.contains("1000/20000 documents")));
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let rest: Vec<String> = said.collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{rest:?}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["ending"], "stopped");
    let read = number(&found["documents_read"]);
    assert!((1000.0..20_000.0).contains(&read), "{read}");
    let looked_at = number(&found["all"]["documents"]);
    assert!(0.0 < looked_at && looked_at <= read, "{looked_at} of {read}");
}

/// With the roles exchanged the reference knows less than the model to be trained.
fn a_reference_that_is_worse_is_said_first(place: &Place) {
    let reference = place.path("reference-checkpoint");
    let flags = ["--init", text(&reference), "--target-source", "math"];
    let worse = succeeds(&mut place.of_files("base", &flags));
    let page = stdout(&worse);
    let first = page.lines().next().unwrap();
    assert!(first.starts_with("Selection cannot be expected to help on math"), "{page}");
    assert!(first.contains("it is worse, mean excess -"), "{page}");
    let found = forecast(&mut place.of_files("base", &flags));
    assert_eq!(found["verdict"], "not_expected_to_help");
    assert_eq!(found["headline"], first);
    // A name that no document has.
    let base = place.path("base-checkpoint");
    let found =
        forecast(&mut place.of_files("reference", &["--init", text(&base), "--target-source", "maths"]));
    assert_eq!(found["verdict"], "target_not_seen");
    assert!(word(&found["headline"]).contains("the sources are math, prose"), "{found}");
    // Shorter sequences than the reference's windows: what cannot be compared is left out, and said to be.
    let short = ["--init", text(&base), "--sequence-length", "16"];
    let found = forecast(&mut place.of_files("reference", &short));
    assert!(number(&found["all"]["compared_tokens"]) < number(&found["all"]["tokens"]), "{found}");
    let page = stdout(&succeeds(&mut place.of_files("reference", &short)));
    assert!(page.contains("of the tokens are left out below"), "{page}");
}

fn what_is_wrong_ends_as_a_run_does(place: &Place, servers: &str) {
    let other = place.path("other.json");
    let mut bytes = std::fs::read(tokenizer()).unwrap();
    bytes.push(b'\n');
    std::fs::write(&other, bytes).unwrap();
    let damaged = place.path("damaged");
    std::fs::create_dir(&damaged).unwrap();
    let base = place.path("base-checkpoint");
    std::fs::copy(base.join("config.json"), damaged.join("config.json")).unwrap();
    let weights = std::fs::read(base.join("model.safetensors")).unwrap();
    std::fs::write(damaged.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    let out = place.path("refused");
    let (tokenizer, base) = (tokenizer(), text(&base).to_owned());
    let right = ["--topic", "sluice.scored", "--tokenizer", text(&tokenizer), "--init", &base];
    // Each changes one of them.
    let with = |at: usize, value: &str| {
        let mut flags = right.map(str::to_owned);
        value.clone_into(&mut flags[at]);
        flags
    };
    for (flags, code, expected) in [
        (with(1, "nowhere"), UNAVAILABLE, "does not exist"),
        (with(1, "sluice.documents"), WRONG_DATA, "`forecast` want"),
        (with(3, text(&other)), WRONG_DATA, "tokenizer"),
        (with(3, text(&place.path("absent.json"))), 66, "absent.json"),
        (with(5, text(place.folder.path())), USAGE, "holds no config.json"),
        (with(5, text(&damaged)), WRONG_DATA, "model.safetensors"),
    ] {
        for command in ["forecast", "run"] {
            let mut command = sluice_train(&[command, "--bootstrap-servers", servers]);
            command.args(&flags);
            if command.get_args().next().is_some_and(|name| name == "run") {
                command.args(["--steps", "1", "--until-end", "--out", text(&out)]);
            }
            let output = command.output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{command:?}: {}", stderr(&output));
            assert!(stderr(&output).contains(expected), "{expected} is not in: {}", stderr(&output));
            assert!(output.stdout.is_empty(), "{command:?}: {}", stdout(&output));
        }
    }
    for (flags, expected) in [
        (["--documents", "0"], "must be a whole number from 1 to"),
        (["--property", "sasl.password:hunter2"], "not KEY=VALUE"),
        (["--precision", "f8"], "--precision"),
    ] {
        let output = sluice_train(&["forecast"]).args(right).args(flags).output().unwrap();
        assert_eq!(output.status.code(), Some(USAGE), "{flags:?}: {}", stderr(&output));
        let said = stderr(&output);
        assert!(said.contains(expected) && !said.contains("hunter2"), "{said}");
    }
    assert!(!out.exists(), "nothing was begun");
}
