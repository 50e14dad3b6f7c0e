//! The experiments of the benches with `--quick`: from text to table and plot, interrupted once, and side by side.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sluice_tests::{binary, onnxruntime, root};
use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::run::checkpoints::latest_checkpoint;

/// Settings of the caller, which must not become settings of the runs: the scope alone would have the plain runs refused.
const EXPORTED: [(&str, &str); 4] = [
    ("SLUICE_TRAIN_SCOPE", "sequence"),
    ("SLUICE_TRAIN_WEIGHT_DECAY", "0.5"),
    ("SLUICED_SCORE_STRIDE_TOKENS", "1"),
    ("SLUICED_LIMITS_IN_FLIGHT_TOKENS", "nonsense"),
];

/// Kinds that choose among the tokens of what they read.
const CHOOSERS: [&str; 3] = ["random", "slm", "adaptive"];

fn experiment(out: &Path) -> Command {
    named("1", out)
}

fn named(name: &str, out: &Path) -> Command {
    let mut command = Command::new(binary("experiment"));
    command.args([name, "--quick", "--out"]).arg(out).current_dir(root());
    command.envs(EXPORTED);
    command.env("ORT_DYLIB_PATH", onnxruntime()).stdin(Stdio::null());
    command
}

/// Run folders that are marked as done, with the time of the mark.
fn marks(out: &Path) -> Vec<(String, std::time::SystemTime)> {
    let mut found = Vec::new();
    let mut folders = vec![out.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.ends_with("done.json") {
                let name = path.strip_prefix(out).unwrap().display().to_string();
                found.push((name, path.metadata().unwrap().modified().unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// Where an experiment with `--quick` leaves its results, and what it left.
const RESULTS: &str = "results/experiment-1";

fn results(out: &Path, folder: &str) -> Value {
    serde_json::from_slice(&std::fs::read(out.join(folder).join("results.json")).unwrap()).unwrap()
}

fn array(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

/// Mean loss over templates, weighted by their tokens; of one half or of all.
fn weighted(templates: &[Value], losses: &Value, half: Option<&str>) -> f64 {
    let of_half = |template: &Value| half.is_none_or(|half| template["half"] == half);
    let (mut sum, mut all) = (0.0, 0.0);
    for (template, loss) in templates.iter().zip(array(losses)).filter(|(template, _)| of_half(template)) {
        let weight = template["predictions"].as_f64().unwrap();
        sum += weight * loss.as_f64().unwrap();
        all += weight;
    }
    sum / all
}

#[test]
fn an_interrupted_experiment_goes_on_and_ends_with_data_table_and_plots() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("experiment");
    let mut first = experiment(&out).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_mins(5);
    let students = |out: &Path| marks(out).iter().filter(|(name, _)| name.contains("-seed-")).count();
    while students(&out) < 2 {
        assert!(Instant::now() < deadline && first.try_wait().unwrap().is_none(), "no student is done");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Killed outright it would leave the student that is in training to finish by itself.
    let terminate = Command::new("kill").args(["-TERM", &first.id().to_string()]).status().unwrap();
    assert!(terminate.success());
    assert_eq!(first.wait().unwrap().code(), Some(0));
    let before = marks(&out);

    let output = experiment(&out).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("runs to go, about ") && said.contains(" left"), "{said}");
    let after = marks(&out);
    assert!(before.iter().all(|mark| after.contains(mark)), "what was done is not done again");
    assert_eq!(students(&out), 36, "ten kinds in the paper's setting and four in two others, two seeds");

    let table = String::from_utf8_lossy(&output.stdout);
    for part in [
        "scratch-tiny",
        "continual-tiny",
        "continual-mixed-tiny",
        "A smoke run",
        "One half chooses, the other reports",
        "Tokens to plain at k = 60 %",
        "FLOPs to plain, scoring counted",
        "| null |",
        "| reference |",
        "| stream-and-curated |",
    ] {
        assert!(table.contains(part), "{part} is missing:\n{table}");
    }
    assert_eq!(
        std::fs::read_to_string(out.join(RESULTS).join("README.md")).unwrap().trim_end(),
        table.trim_end()
    );
    let found = results(&out, RESULTS);
    let templates = array(&found["templates"]);
    let of_half = |half: &str| templates.iter().filter(|template| template["half"] == half).count();
    assert_eq!((of_half("choosing"), of_half("reporting")), (10, 11));
    for group in array(&found["groups"]) {
        check_runs(group, templates);
        check_rows(group);
        let name = format!("{}-{}", group["setting"].as_str().unwrap(), group["size"].as_str().unwrap());
        let lines = |file: &str| {
            let plot = std::fs::read_to_string(out.join(RESULTS).join(format!("{file}-{name}.svg"))).unwrap();
            plot.matches("<polyline").count()
        };
        let is_papers = group["setting"] == "continual";
        assert_eq!(lines("loss"), if is_papers { 6 } else { 4 }, "a line for each rule");
        let rule = usize::from(!group["chosen"]["by_tokens"].is_null());
        let controls = if is_papers { 6 } else { 2 };
        assert_eq!(lines("controls"), controls + rule, "plain, the chosen rule, the controls, the reference");
        let page = std::fs::read_to_string(out.join(format!("report-1-{name}.html"))).unwrap();
        for part in ["Four kinds of tokens", "Scores", "k over time", "Settings"] {
            assert!(page.contains(part), "{part} is not in the report");
        }
    }
    check_controls(&found);
    // What the caller has exported is in no run.
    let run = out.join("runs/scratch-tiny/slm-60-seed-1/run.json");
    let run: Value = serde_json::from_slice(&std::fs::read(run).unwrap()).unwrap();
    assert_eq!(run["objective"]["scope"], "batch");
    assert_eq!(run["settings"]["optimizer"]["weight_decay"], AdamWConfig::default().weight_decay);
    // Nothing is left to chance: what is done is read once more, and comes to the same.
    let data = || std::fs::read(out.join(RESULTS).join("results.json")).unwrap();
    let before = data();
    assert!(experiment(&out).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    assert!(before == data(), "the intervals have moved");
    // Seeds can be left out and added again, and nothing that is done is done anew.
    let output = experiment(&out).args(["--seeds", "1"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for run in array(&results(&out, RESULTS)["groups"]).iter().flat_map(|group| array(&group["runs"])) {
        assert_eq!(run["seed"], 1);
    }
    assert!(experiment(&out).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    assert!(before == data(), "a seed is missing");
    assert_eq!(marks(&out), after);

    // Another plan does not mix with this one, and a folder of somebody else's is left alone.
    let other = experiment(&out).args(["--gsm8k", "/nowhere"]).status().unwrap();
    assert_eq!(other.code(), Some(64));
    std::fs::write(folder.path().join("thesis.txt"), "mine").unwrap();
    assert_eq!(experiment(folder.path()).status().unwrap().code(), Some(64));
    for flag in ["--sources", "--daemon", "--trainer"] {
        let nowhere = experiment(&folder.path().join("x")).args([flag, "/nowhere"]).status().unwrap();
        assert_eq!(nowhere.code(), Some(64), "{flag}");
    }
}

fn check_runs(group: &Value, templates: &[Value]) {
    for run in array(&group["runs"]) {
        let number = |name: &str| run["effort"][name].as_f64().unwrap();
        assert!(number("flops") > 0.0 && number("cpu_seconds") > 0.0 && number("seconds") > 0.0, "{run}");
        let curve = array(&run["curve"]);
        let sets: Vec<_> = curve.iter().map(|eval| &eval["set"]).collect();
        assert!(["math", "rest", "answers"].iter().all(|set| sets.contains(&&(*set).into())), "{sets:?}");
        let whole: Vec<&Value> = curve.iter().filter(|eval| eval["set"] == "math").collect();
        let by_template = array(&run["templates"]);
        assert_eq!(whole.len(), by_template.len());
        for (whole, eval) in whole.into_iter().zip(by_template) {
            assert_eq!(whole["step"], eval["step"]);
            let mean = weighted(templates, &eval["losses"], None);
            assert!((mean - whole["loss"].as_f64().unwrap()).abs() < 2e-5, "{mean} is not of {whole}");
        }
        let kind = run["kind"].as_str().unwrap();
        if CHOOSERS.iter().any(|chooser| kind.starts_with(chooser)) {
            assert!(run["tokens_kept"].as_u64() < run["effort"]["tokens"].as_u64(), "{kind}");
        } else {
            assert_eq!(run["tokens_kept"], run["effort"]["tokens"], "{kind}");
        }
        // Plain reaches its own end with all of its own tokens, if it does not go up again.
        if kind == "plain" {
            let ratio = run["to_plain"]["tokens"].as_f64().unwrap();
            assert!(ratio > 0.0 && ratio <= 1.0, "{run}");
        }
    }
}

/// Plain training differs from itself in nothing, but by chance where other seeds are drawn; scoring is counted where scores
/// are looked at, and nowhere else.
fn check_rows(group: &Value) {
    let plain = &array(&group["rows"])[0];
    assert_eq!(plain["kind"], "plain");
    for end in ["value", "low", "high"] {
        assert_eq!(plain["reporting"]["difference"][end], 0.0, "{plain}");
    }
    let null = &group["null"]["difference"];
    assert!(null["low"].as_f64().unwrap() < 0.0 && null["high"].as_f64().unwrap() > 0.0, "{null}");
    for row in array(&group["rows"]) {
        let found = &row["reporting"];
        let [flops, scored] = ["flops", "flops_with_scoring"].map(|name| found[name]["value"].as_f64());
        let kind = row["kind"].as_str().unwrap();
        let is_paid = row["is_scored"] == true || kind.starts_with("documents");
        assert_eq!(flops.is_some() && is_paid, scored > flops, "{kind}: {flops:?}, {scored:?}");
        let difference = &found["difference"];
        assert!(difference["low"].as_f64() <= difference["high"].as_f64(), "{row}");
    }
}

fn check_controls(results: &Value) {
    let group = array(&results["groups"]).iter().find(|group| group["setting"] == "continual").unwrap();
    let setting = &results["streams"]["continual"];
    let text = |name: &str, key: &str| setting["texts"][name][key].as_f64().unwrap();
    for name in ["oracle", "curated"] {
        assert_eq!(setting["texts"][name]["target_tokens"], setting["texts"][name]["tokens"], "{name}");
    }
    // Scored documents have a token more than they have predictions.
    let stream = text("stream-and-curated", "tokens") - text("curated", "tokens");
    assert!(stream < setting["scoring"]["tokens"].as_f64().unwrap());
    let kept = text("documents-60", "tokens") / stream;
    assert!((0.6..0.7).contains(&kept), "whole documents with {kept} of the tokens");
    // The reference was trained on mathematics: whole documents of it go last.
    let share = |name: &str| text(name, "target_tokens") / text(name, "tokens");
    let of_stream = text("oracle", "tokens") / stream;
    assert!(share("documents-60") > of_stream, "{} and {of_stream}", share("documents-60"));
    // A backward pass through kept tokens alone is cheaper.
    let flops = |kind: &str| {
        let run = array(&group["runs"]).iter().find(|run| run["kind"] == kind).unwrap();
        run["effort"]["flops"].as_f64().unwrap()
    };
    assert!(flops("slm-30-kept") < 0.7 * flops("slm-60"));
}

#[test]
fn each_kind_is_reported_at_the_learning_rate_that_the_choosing_half_chooses() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("experiment");
    let with = |rates: &str| {
        let mut command = experiment(&out);
        command.args(["--setting", "continual-mixed", "--learning-rates", rates]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().unwrap()
    };
    assert_eq!(with("1e-3,0").code(), Some(64));
    assert!(with("1e-5,4e-3").success());
    let found = results(&out, "results/experiment-1-continual-mixed-rates");
    let templates = array(&found["templates"]);
    let group = &array(&found["groups"])[0];
    let runs = array(&group["runs"]);
    assert_eq!(runs.len(), 4 * 2 * 2 + 1, "four kinds, two rates, two seeds, and the reference");
    for row in array(&group["rows"]).iter().filter(|row| row["kind"] != "reference") {
        let end = |rate: f64| {
            let ends = runs.iter().filter(|run| run["kind"] == row["kind"] && run["learning_rate"] == rate);
            let ends: Vec<f64> = ends
                .flat_map(|run| array(&run["templates"]).iter().rev().take(3))
                .map(|eval| weighted(templates, &eval["losses"], Some("choosing")))
                .collect();
            assert_eq!(ends.len(), 6, "three evaluations of two seeds");
            ends.iter().sum::<f64>()
        };
        let best = if end(1e-5) <= end(4e-3) { 1e-5 } else { 4e-3 };
        assert_eq!(row["learning_rate"], best, "{}", row["kind"]);
    }
}

#[test]
fn experiments_in_one_folder_train_once_what_they_share_and_each_answers_its_question() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("experiments");
    let run = |name: &str| {
        let before = marks(&out);
        let output = named(name, &out).args(["--seeds", "1"]).output().unwrap();
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
    let output = named("pretrained", &out).arg("--base").arg(&base).output().unwrap();
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
        let mut command = named("1", &folder.join("x"));
        command.args(arguments).stderr(Stdio::null()).status().unwrap().code()
    };
    assert_eq!(refused(&["--base", "/nowhere"]), Some(64), "it is of another experiment");
    let mut nowhere = named("pretrained", &folder.join("x"));
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
