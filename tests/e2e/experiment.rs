//! `experiment 1 --quick` of the benches: from text to table and plot, interrupted once.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sluice_tests::experiments::{array, marks, quick, results};
use sluice_trainer::model::optimizer::AdamWConfig;

/// Kinds that choose among the tokens of what they read.
const CHOOSERS: [&str; 3] = ["random", "slm", "adaptive"];

fn experiment(out: &Path) -> Command {
    quick("1", out)
}

/// Where an experiment with `--quick` leaves its results, and what it left.
const RESULTS: &str = "results/experiment-1";

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
