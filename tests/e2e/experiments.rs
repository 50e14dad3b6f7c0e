//! Experiments 2 to 8, the map and the pretrained model with `--quick`, side by side in one folder.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::Stdio;

use serde_json::Value;
use sluice_tests::experiments::{array, marks, quick, results};
use sluice_trainer::run::checkpoints::latest_checkpoint;

#[test]
fn experiments_in_one_folder_train_once_what_they_share_and_each_answers_its_question() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("experiments");
    let run = |name: &str| {
        let before = marks(&out);
        let output = quick(name, &out).args(["--seeds", "1"]).output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let after = marks(&out);
        assert!(before.iter().all(|mark| after.contains(mark)), "{name} has done again what was done");
        let students =
            |marks: &[(String, _)]| marks.iter().filter(|(name, _)| name.contains("-seed-")).count();
        let table = String::from_utf8_lossy(&output.stdout).into_owned();
        let results_of = if name == "map" { "map".to_owned() } else { format!("experiment-{name}") };
        (results(&out, &format!("results/{results_of}")), table, students(&after) - students(&before))
    };
    let row = |group: &Value, kind: &str| -> Value {
        array(&group["rows"]).iter().find(|row| row["kind"] == kind).unwrap().clone()
    };

    let (gradients, _, trained) = run("8");
    assert_eq!(trained, 7, "plain, and three rules with both gradients");
    let flops = |kind: &str| {
        let runs = array(&gradients["groups"][0]["runs"]);
        let run = runs.iter().find(|run| run["kind"] == kind).unwrap();
        let at_evaluations = array(&run["flops"]);
        assert_eq!(at_evaluations.len(), array(&run["templates"]).len());
        assert_eq!(at_evaluations[0], 0.0);
        let last = at_evaluations.last().unwrap().as_f64().unwrap();
        assert!((last / run["effort"]["flops"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{run}");
        last
    };
    for rule in ["slm-60", "slm-30", "adaptive"] {
        assert!(flops(&format!("{rule}-kept")) < flops(rule), "{rule}");
    }
    assert!(out.join("results/experiment-8/flops-continual-tiny.svg").is_file());

    let (tokens, table, trained) = run("7");
    assert_eq!(trained, 1, "random selection alone is new");
    check_tokens(&tokens["groups"][0]);
    assert!(table.contains("| all students |") && table.contains("H→L"), "{table}");

    let (shares, _, trained) = run("2");
    assert_eq!(trained, 0, "all of them are there");
    assert_eq!(
        array(&shares["groups"][0]["rows"]).len(),
        6,
        "plain, random, two shares, adaptive, the reference"
    );

    let (references, table, trained) = run("3");
    assert_eq!(trained, 4, "two rules by each of two other references");
    let general = &references["streams"]["continual-by-general"];
    assert_eq!(general["reference_loss"], general["base_loss"], "it is the base model");
    assert_ne!(references["streams"]["continual-by-mismatched"]["reference_loss"], general["base_loss"]);
    assert!(table.contains("| continual | mismatched |"), "{table}");

    let (schedules, _, trained) = run("4");
    assert_eq!(trained, 4);
    // Of the twelve steps the first keeps 80 % and the last 40.
    let kept = row(&schedules["groups"][0], "slm-linear-0.8-0.4")["kept"]["mean"].as_f64().unwrap();
    assert!((kept - 0.6).abs() < 0.02, "{kept}");

    let (own, _, trained) = run("6");
    assert_eq!(
        trained,
        5 + 2,
        "random and four scores by the stream itself, two rules by the small reference"
    );
    let of_stream = |name: &str| {
        let groups = array(&own["groups"]);
        groups.iter().find(|group| group["stream"] == name).unwrap().clone()
    };
    let kept =
        |kind: &str| row(&of_stream("continual-by-own-stream"), kind)["kept"]["mean"].as_f64().unwrap();
    let [both, one, either] = ["intersection-70", "reference-loss-70", "union-70"].map(kept);
    assert!(both < one && one < either && (one - 0.7).abs() < 0.01, "{both}, {one}, {either}");
    let small = &own["streams"]["continual-by-curated-small"];
    let flops = |stream: &Value| stream["scoring"]["flops"].as_f64().unwrap();
    assert!(flops(small) < flops(&own["streams"]["continual"]));

    let (sizes, table, trained) = run("5");
    assert_eq!(trained, 3 * 5, "five kinds of three further sizes");
    let parameters: Vec<u64> =
        array(&sizes["groups"]).iter().map(|group| group["parameters"].as_u64().unwrap()).collect();
    assert!(parameters.len() == 4 && parameters.is_sorted(), "{parameters:?}");
    assert!(table.contains("## Over sizes"), "{table}");

    let (map, table, trained) = run("map");
    assert_eq!(trained, 4 * 4, "four kinds in four cells");
    assert!(table.contains("| 50 % |") && table.contains("### adaptive"), "{table}");
    check_map(&out, &map);

    check_pretrained(&out, folder.path());
}

/// A base model of other experiments goes on as a pretrained one, with its own shape and tokenizer.
fn check_pretrained(experiments: &Path, folder: &Path) {
    let out = folder.join("pretrained");
    let base = latest_checkpoint(&experiments.join("runs/base-small")).unwrap().unwrap();
    std::fs::copy(experiments.join("tokenizer.json"), base.join("tokenizer.json")).unwrap();
    let output = quick("pretrained", &out).arg("--base").arg(&base).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found = results(&out, "results/pretrained");
    let group = &array(&found["groups"])[0];
    let config: Value = serde_json::from_slice(&std::fs::read(base.join("config.json")).unwrap()).unwrap();
    assert_eq!(found["plan"]["vocabulary"], config["vocab_size"]);
    assert_eq!(array(&group["rows"]).len(), 4, "plain, adaptive, random and the reference");
    let own = std::fs::read(out.join("tokenizer.json")).unwrap();
    assert!(own == std::fs::read(base.join("tokenizer.json")).unwrap());
    // All of them begin with that model. The reference's run knows no scored topic, whose windows cut long documents otherwise.
    let first = |run: &Value| {
        let eval = array(&run["curve"]).iter().find(|eval| eval["set"] == "math").unwrap();
        eval["loss"].as_f64().unwrap()
    };
    let losses: Vec<f64> = array(&group["runs"]).iter().map(first).collect();
    let base_loss = found["streams"]["continual"]["base_loss"].as_f64().unwrap();
    assert!(losses.iter().all(|loss| (loss - base_loss).abs() < 1e-3), "{base_loss}: {losses:?}");
    // A path of this machine is not for others.
    let page = std::fs::read_to_string(out.join("results/pretrained/results.json")).unwrap();
    assert!(!page.contains(&base.display().to_string()));

    let refused = |arguments: &[&str]| {
        let mut command = quick("1", &folder.join("x"));
        command.args(arguments).stderr(Stdio::null()).status().unwrap().code()
    };
    assert_eq!(refused(&["--base", "/nowhere"]), Some(64), "it is of another experiment");
    let mut nowhere = quick("pretrained", &folder.join("x"));
    assert_eq!(nowhere.args(["--base", "/nowhere"]).status().unwrap().code(), Some(64));
}

/// Both parts of the held-out tokens together are all of them, and so are the four categories.
fn check_tokens(group: &Value) {
    for run in array(&group["runs"]) {
        let tokens = &run["tokens"];
        for shares in array(&tokens["shares"]) {
            let sum: f64 = array(&shares["shares"]).iter().map(|share| share.as_f64().unwrap()).sum();
            assert!((sum - 1.0).abs() < 1e-9, "{shares}");
        }
        let math: Vec<&Value> = array(&run["curve"]).iter().filter(|eval| eval["set"] == "math").collect();
        let losses = array(&tokens["losses"]);
        assert_eq!(math.len(), losses.len());
        for (eval, split) in math.into_iter().zip(losses) {
            let all = eval["predictions"].as_f64().unwrap();
            let kept = (0.6 * all).ceil();
            let part = |name: &str| split[name].as_f64().unwrap();
            let mean = (kept * part("selected") + (all - kept) * part("unselected")) / all;
            assert!((mean - eval["loss"].as_f64().unwrap()).abs() < 1e-4, "{mean} is not of {eval}");
        }
    }
}

/// The file for the forecast says what the results say, and the streams hold what their names say.
fn check_map(out: &Path, results: &Value) {
    let file: Value =
        serde_json::from_slice(&std::fs::read(out.join("results/map/map.json")).unwrap()).unwrap();
    let cells = array(&file["cells"]);
    assert_eq!(cells.len(), 4);
    for (cell, group) in cells.iter().zip(array(&results["groups"])) {
        let rarity = cell["rarity_percent"].as_u64().unwrap();
        let name = format!("map-{rarity:02}-{}", cell["noise"].as_str().unwrap());
        assert_eq!(group["setting"], name);
        let rules = array(&cell["rules"]);
        assert_eq!(rules.len(), 3, "{cell}");
        for rule in rules {
            let row = array(&group["rows"]).iter().find(|row| row["kind"] == rule["rule"]).unwrap();
            let tokens = &row["reporting"]["tokens"];
            assert_eq!(
                [&rule["tokens"], &rule["low"], &rule["high"]],
                [&tokens["value"], &tokens["low"], &tokens["high"]]
            );
        }
    }
    let texts = |name: &str| -> Vec<(String, String)> {
        let lines = std::fs::read_to_string(out.join(format!("text-map/map-50-{name}.jsonl"))).unwrap();
        let mathematics =
            lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).filter_map(|line| {
                let number = line["id"].as_str()?.split_once("-mathematics-")?.1.to_owned();
                Some((number, line["text"].as_str()?.to_owned()))
            });
        let mut found: Vec<_> = mathematics.collect();
        found.sort();
        found
    };
    let (clean, wrong) = (texts("none"), texts("corrupted-30"));
    assert!(clean.len() > 10 && clean.len() == wrong.len());
    let words = |texts: &[(String, String)]| -> Vec<String> {
        texts.iter().flat_map(|(_, text)| text.split_whitespace().map(str::to_owned)).collect()
    };
    let (clean, wrong) = (words(&clean), words(&wrong));
    assert_eq!(clean.len(), wrong.len(), "words are changed, not added");
    let changed = clean.iter().zip(&wrong).filter(|(one, other)| one != other).count();
    let share = changed as f64 / clean.len() as f64;
    assert!((0.25..0.32).contains(&share), "{share} of the words are wrong");
}
