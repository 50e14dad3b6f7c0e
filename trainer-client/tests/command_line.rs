//! The program as people run it: a reference model made and exported, a student trained, and the ways to fail.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use sluice_schemas::fingerprint::Fingerprint;
use sluice_schemas::record::{LossFormat, Losses};
use support::program::{Place, SMALL, fingerprint_of, json, sluice_train, stderr, succeed};
use support::{mixture, produce, produce_scored, write_tokenizer};

/// A number that no machine has, so that the answer is the same where there is a GPU. With `--features cuda` this shows that
/// a missing driver is one line too.
#[test]
fn a_device_that_is_not_there_is_named_before_anything_is_made() {
    let place = Place::new();
    let mut training = place.training("run", "scored", "out");
    let output = training.args(["--steps", "1", "--device", "cuda:99"]).output().unwrap();
    let (code, advice) = if cfg!(feature = "cuda") {
        (69, "check the NVIDIA driver")
    } else {
        (64, "build sluice-train with --features cuda")
    };
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(advice) && said.trim_end().lines().count() == 1, "{said}");
    assert!(!Path::new(&place.path("out")).exists());
}

#[test]
fn a_checkpoint_that_lacks_its_optimizer_or_is_damaged_is_not_gone_on_from() {
    let place = Place::new();
    let run = || {
        let mut training = place.training("run", "scored", "run");
        training.args(["--steps", "6", "--checkpoint-every", "2", "--until-end", "--resume"]);
        training.output().unwrap()
    };
    assert!(run().status.success());
    let metrics = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let last = place.path("run/checkpoints/step-0000006");
    std::fs::remove_file(format!("{last}/optimizer.safetensors")).unwrap();
    let output = run();
    assert_eq!(output.status.code(), Some(65), "{}", stderr(&output));
    assert!(stderr(&output).contains(&format!("remove {last}")), "{}", stderr(&output));
    // As it says; beside it lies a copy that somebody has made, which is no checkpoint of the run's.
    std::fs::rename(&last, format!("{last}-mine")).unwrap();
    let output = run();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(Path::new(&format!("{last}-mine")).is_dir());
    let digests = |text: &str| -> Vec<Value> {
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| line["digest"].clone()).filter(|digest| !digest.is_null()).collect()
    };
    let again = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    assert_eq!(digests(&again), digests(&metrics));

    // A byte that is another one on the disk.
    let documents = format!("{last}/feed.safetensors");
    let mut bytes = std::fs::read(&documents).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let layout: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let first = 8 + header + layout["tokens"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[first + 3] = 0x7f;
    std::fs::write(&documents, bytes).unwrap();
    let output = run();
    assert_eq!(output.status.code(), Some(65), "{}", stderr(&output));
    assert!(stderr(&output).contains("not those that were written"), "{}", stderr(&output));
}

#[test]
fn a_run_says_what_its_gradients_flow_through() {
    let place = Place::new();
    let run = |name: &str, flags: &[&str]| {
        let mut training = place.training("run", "scored", name);
        succeed(training.args(["--steps", "4", "--accumulate", "2", "--until-end"]).args(flags));
        let record = json(&place.path(&format!("{name}/run.json")));
        let weights = format!("{name}/checkpoints/step-0000004/model.safetensors");
        (record["settings"]["backward"].clone(), std::fs::read(place.path(&weights)).unwrap())
    };
    let (by_default, exact) = run("exact", &[]);
    let (said, kept) = run("kept", &["--backward", "kept"]);
    assert_eq!((by_default, said), ("exact".into(), "kept".into()));
    assert!(exact != kept, "it is another gradient");
    // Chosen before the forward pass, with and without tapes.
    let random = ["--backward", "kept", "--objective", "random"];
    run("random", &random);
    run("recomputed", &[&random[..], &["--recompute-activations"]].concat());
}

#[test]
fn a_reference_is_made_and_exported_and_students_are_trained_and_compared() {
    let place = Place::new();
    succeed(place.training("reference", "documents", "reference").args(["--epochs", "2"]));
    assert_eq!(json(&place.path("reference/run.json"))["command"], "reference");
    succeed(sluice_train().args(["export", "--run", &place.path("reference"), "--out", &place.path("onnx")]));
    for file in ["model.onnx", "config.json", "tokenizer.json"] {
        assert!(Path::new(&place.path("onnx")).join(file).is_file(), "{file}");
    }
    let mut starts = Vec::new();
    for objective in ["slm", "clm", "random"] {
        let mut training = place.training("run", "scored", objective);
        succeed(training.args(["--objective", objective, "--steps", "12", "--until-end", "--epochs", "2"]));
        let run = json(&place.path(&format!("{objective}/run.json")));
        assert_eq!(run["reference_model"], Fingerprint::of_bytes(b"model").to_string());
        starts.push(run["initial_weights"].clone());
    }
    assert!(starts.iter().all(|start| *start == starts[0]), "one seed, one start: {starts:?}");
    let state = json(&place.path("slm/checkpoints/step-0000012/state.json"));
    assert_eq!(state["step"], 12);
    assert!(state["partitions"]["0"]["next_offset"].as_i64().unwrap() > 0);

    let page = place.path("report.html");
    let runs = ["slm", "clm", "random"].map(|run| place.path(run));
    let table = succeed(sluice_train().args(["report", "--out", &page]).args(&runs));
    assert!(table.contains("words: final loss") && table.contains("began with the same weights"), "{table}");
    assert!(std::fs::read_to_string(page).unwrap().contains("Tokens, one by one"));

    let held_out = format!("words={}", place.path("held-out.jsonl"));
    let line =
        succeed(sluice_train().args(["evaluate", "--checkpoint", &place.path("slm"), "--eval", &held_out]));
    let measured: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&measured["set"], &measured["predictions"]), (&Value::from("words"), &Value::from(10)));
    let metrics = std::fs::read_to_string(place.path("slm/metrics.jsonl")).unwrap();
    let logged: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = logged.iter().rfind(|line| line["type"] == "eval").unwrap();
    let difference = last["loss"].as_f64().unwrap() - measured["loss"].as_f64().unwrap();
    assert!(difference.abs() < 1e-5, "a checkpoint has the loss of the model it was made from: {difference}");

    let mut warm = sluice_train();
    warm.args([
        "run",
        "--bootstrap-servers",
        &place.cluster.bootstrap_servers(),
        "--topic",
        "scored",
        "--until-end",
    ]);
    warm.args(["--tokenizer", &place.path("tokenizer.json"), "--out", &place.path("warm"), "--steps", "2"]);
    warm.args(["--sequence-length", "32", "--init", &place.path("clm/checkpoints/step-0000012")]);
    succeed(&mut warm);
}

#[test]
fn a_signal_ends_a_run_with_a_checkpoint_and_success() {
    let place = Place::new();
    // The topic ends long before the steps do, and the run waits for more.
    let mut child = place.training("run", "scored", "followed").args(["--steps", "100000"]).spawn().unwrap();
    let checkpoints = place.path("followed/checkpoints");
    let metrics = place.path("followed/metrics.jsonl");
    let deadline = Instant::now() + Duration::from_mins(1);
    while !std::fs::read_to_string(&metrics).is_ok_and(|lines| lines.contains("\"step\":3,")) {
        assert!(Instant::now() < deadline, "three steps take less than a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(checkpoints).unwrap().count(), 1);
}

#[test]
fn the_environment_stands_in_for_flags() {
    let place = Place::new();
    let mut run = sluice_train();
    run.arg("run").env("SLUICE_TRAIN_BOOTSTRAP_SERVERS", place.cluster.bootstrap_servers());
    run.env("SLUICE_TRAIN_TOPIC", "scored")
        .env("SLUICE_TRAIN_STEPS", "1")
        .env("SLUICE_TRAIN_UNTIL_END", "true");
    run.env("SLUICE_TRAIN_TOKENIZER", place.path("tokenizer.json"))
        .env("SLUICE_TRAIN_OUT", place.path("run"));
    let held_out = place.path("held-out.jsonl");
    run.env("SLUICE_TRAIN_EVAL", format!("a={held_out}\nb={held_out}")).args(&SMALL[..12]);
    succeed(run.env("SLUICE_TRAIN_PROPERTY", "client.id=test\nfetch.wait.max.ms=100"));
    let settings = json(&place.path("run/run.json"))["settings"].clone();
    assert_eq!(settings["evals"].as_array().unwrap().len(), 2);
    assert_eq!(settings["stream"]["properties"], serde_json::json!(["client.id", "fetch.wait.max.ms"]));
}

#[test]
fn failures_have_their_exit_codes_and_say_what_to_do() {
    let place = Place::new();
    let mut other = std::fs::read_to_string(place.path("tokenizer.json")).unwrap();
    other.push('\n');
    std::fs::write(place.path("other.json"), other).unwrap();
    let refuse = |change: &dyn Fn(&mut Command), code: i32, expected: &str| {
        let mut command = place.training("run", "scored", "refused");
        change(command.args(["--steps", "1", "--until-end"]));
        let output = command.output().unwrap();
        let shown = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{shown}");
        assert!(shown.contains(expected), "{expected:?} is missing in: {shown}");
        let _ = std::fs::remove_dir_all(place.path("refused"));
    };
    // Of a flag given twice, clap complains; so these come as a whole command.
    let tokenizer = |file: &str| {
        let mut command = sluice_train();
        command.args(["run", "--bootstrap-servers", &place.cluster.bootstrap_servers(), "--topic", "scored"]);
        command
            .args(["--steps", "1", "--tokenizer", &place.path(file), "--out", &place.path("refused")])
            .args(SMALL);
        command.output().unwrap()
    };
    let foreign = tokenizer("other.json");
    assert_eq!(foreign.status.code(), Some(65));
    for file in ["tokenizer.json", "other.json"] {
        let fingerprint = Fingerprint::of_bytes(&std::fs::read(place.path(file)).unwrap()).to_string();
        assert!(stderr(&foreign).contains(&fingerprint), "{}", stderr(&foreign));
    }
    assert!(!Path::new(&place.path("refused/run.json")).exists(), "it stopped before the first step");
    succeed(place.training("run", "scored", "refused").args(["--steps", "1"]));
    let again = place.training("run", "scored", "refused").args(["--steps", "1"]).output().unwrap();
    assert_eq!(again.status.code(), Some(64), "a run never overwrites another: {}", stderr(&again));
    std::fs::remove_dir_all(place.path("refused")).unwrap();
    assert_eq!(tokenizer("absent.json").status.code(), Some(66), "as `sluiced ingest` has it");
    refuse(
        &|command| {
            command.args(["--keep", "1.5"]);
        },
        64,
        "keep must be above 0 and at most 1",
    );
    for too_many in ["4294967295", "18446744073709551615"] {
        refuse(
            &|command| {
                command.args(["--accumulate", too_many]);
            },
            64,
            "must be a whole number from 1 to 65536",
        );
    }
    refuse(
        &|command| {
            command.args(["--kv-heads", "3"]);
        },
        64,
        "kv_heads 3",
    );
    refuse(
        &|command| {
            command.args(["--property", "isolation.level=read_uncommitted"]);
        },
        64,
        "isolation.level",
    );
    refuse(
        &|command| {
            command.args(["--property", "no.such.setting=1"]);
        },
        64,
        "no.such.setting",
    );
    refuse(
        &|command| {
            command.args(["--eval", "x=/absent.jsonl"]);
        },
        64,
        "/absent.jsonl",
    );
    refuse(
        &|command| {
            command.args(["--follow"]);
        },
        64,
        "cannot be used with",
    );
}

#[test]
fn every_selection_trains_on_a_topic_that_has_what_it_looks_at() {
    let place = Place::new();
    let with_entropies: Vec<_> = mixture(80, fingerprint_of(&place), Fingerprint::of_bytes(b"model"))
        .into_iter()
        .map(|mut scored| {
            let entropies: Vec<f32> =
                scored.reference_losses.to_vec().iter().map(|loss| loss / 2.0).collect();
            scored.reference_entropies = Some(Losses::new(&entropies, LossFormat::F32).unwrap());
            scored
        })
        .collect();
    place.cluster.create_topic("entropies", 2, 1).unwrap();
    produce_scored(&place.cluster, "entropies", 2, &with_entropies);
    let check = |out: &str, topic: &str, flags: &[&str]| {
        let mut training = place.training("run", topic, out);
        succeed(training.args(["--steps", "4", "--until-end", "--accumulate", "2"]).args(flags));
        let metrics = std::fs::read_to_string(place.path(&format!("{out}/metrics.jsonl"))).unwrap();
        let steps = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let steps: Vec<Value> = steps.filter(|line| line["type"] == "step").collect();
        assert_eq!(steps.len(), 4, "{flags:?}");
        let share = |step: &Value| step["kept"].as_f64().unwrap() / step["scored"].as_f64().unwrap();
        steps.iter().map(share).collect::<Vec<f64>>()
    };
    let scores =
        ["excess", "reference-loss", "reference-entropy", "intersection", "union", "loss", "entropy"];
    for score in scores {
        let shares = check(score, "entropies", &["--score", score, "--keep", "0.5"]);
        let is_exact = !["intersection", "union"].contains(&score);
        assert!(!is_exact || shares.iter().all(|share| (share - 0.5).abs() < 0.01), "{score}: {shares:?}");
    }
    check("average", "scored", &["--score", "improvement", "--history-decay", "0.5"]);
    let older = place.path("average/checkpoints/step-0000004");
    check("older", "scored", &["--score", "improvement", "--history", &older]);
    check("quantile", "scored", &["--scope", "running-quantile"]);
    check("sequence", "scored", &["--scope", "sequence"]);
    let adaptive = check("adaptive", "scored", &["--keep", "adaptive:0.2:0.4"]);
    assert!(adaptive.iter().all(|share| (0.19..0.41).contains(share)), "{adaptive:?}");
    check("adaptive-step", "scored", &["--keep", "adaptive", "--scope", "batch"]);
    let falling = check("falling", "scored", &["--keep", "linear:0.9:0.3", "--keep-warmup-steps", "1"]);
    assert!(
        falling.iter().zip([1.0, 0.9, 0.6, 0.3]).all(|(found, expected)| (found - expected).abs() < 0.01)
    );
    let across = ["--attend-across-documents", "--unequal-contexts", "allow", "--first-token", "predict"];
    check("across", "scored", &[&across[..], &["--schedule", "wsd", "--warmup-steps", "1"]].concat());
    // Nothing is above such a threshold: no token is learnt from, and the run goes on all the same.
    assert_eq!(check("nothing", "scored", &["--threshold", "1e9"]), [0.0; 4]);

    let mut missing = place.training("run", "scored", "missing");
    let output = missing.args(["--steps", "4", "--score", "reference-entropy"]).output().unwrap();
    assert_eq!(output.status.code(), Some(64), "{}", stderr(&output));
    assert!(stderr(&output).contains("carries no reference entropies"), "{}", stderr(&output));
}

#[test]
fn no_step_is_taken_before_a_record_of_every_partition_fits() {
    let place = Place::new();
    let model = Fingerprint::of_bytes(b"model");
    let good = mixture(40, fingerprint_of(&place), model);
    let foreign = mixture(1, Fingerprint::of_bytes(b"other tokenizer"), model);
    place.cluster.create_topic("spoilt", 8, 1).unwrap();
    // The first few documents fill a batch, long before it is the turn of the foreign one.
    let records = good.iter().zip((0..7).cycle()).map(|(document, partition)| (partition, document));
    let records = records
        .chain([(7, &foreign[0])])
        .map(|(partition, document)| (partition, document.encode().to_vec()));
    produce(&place.cluster.bootstrap_servers(), "spoilt", records);
    let mut training = place.training("run", "spoilt", "spoilt");
    let output = training.args(["--steps", "5", "--until-end"]).output().unwrap();
    assert_eq!(output.status.code(), Some(65), "{}", stderr(&output));
    assert!(stderr(&output).contains("partition 7, offset 0"), "{}", stderr(&output));
    assert!(!Path::new(&place.path("spoilt/run.json")).exists(), "it stopped before the first step");
}

#[test]
fn a_second_reference_model_is_refused_unless_it_is_on_the_list() {
    let place = Place::new();
    let models = [Fingerprint::of_bytes(b"one"), Fingerprint::of_bytes(b"other")];
    place.cluster.create_topic("switched", 2, 1).unwrap();
    for (model, reference) in models.iter().enumerate() {
        let documents = mixture(80, fingerprint_of(&place), *reference);
        let half = if model == 0 { &documents[..40] } else { &documents[40..] };
        produce_scored(&place.cluster, "switched", 2, half);
    }
    let train = |out: &str, allowed: &[Fingerprint]| {
        let mut training = place.training("run", "switched", out);
        training.args(["--steps", "1000", "--until-end", "--schedule", "constant"]);
        for reference in allowed {
            training.args(["--reference-model", &reference.to_string()]);
        }
        training.output().unwrap()
    };
    let refused = train("refused", &[]);
    let shown = stderr(&refused);
    assert_eq!(refused.status.code(), Some(65), "{shown}");
    for expected in [models[0].to_string(), models[1].to_string(), "name both with --reference-model".into()]
    {
        assert!(shown.contains(&expected), "{expected} is missing in: {shown}");
    }
    let other = train("other", &models[..1]);
    assert_eq!(other.status.code(), Some(65));
    assert!(stderr(&other).contains("no --reference-model names"), "{}", stderr(&other));
    let both = train("both", &models);
    assert!(both.status.success(), "{}", stderr(&both));
    assert_eq!(json(&place.path("both/run.json"))["reference_model"], models[0].to_string());
}

#[test]
fn a_broker_that_is_down_ends_the_program_with_69() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = write_tokenizer(folder.path());
    let mut run = sluice_train();
    run.args(["run", "--bootstrap-servers", "127.0.0.1:1", "--steps", "1", "--out"])
        .arg(folder.path().join("run"));
    let output = run.arg("--tokenizer").arg(tokenizer).args(SMALL).output().unwrap();
    assert_eq!(output.status.code(), Some(69), "{}", stderr(&output));
    assert!(stderr(&output).contains("127.0.0.1:1"), "{}", stderr(&output));
}
