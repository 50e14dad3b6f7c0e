//! What the program refuses, without a broker: exit codes, nothing destroyed, and no secret on a screen.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sluice_trainer::model::optimizer::AdamWConfig;
use sluice_trainer::model::{BurnLearner, ModelConfig, Variant};
use sluice_trainer::training::learner::Learner;
use support::write_tokenizer;

fn sluice_train(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-train"));
    command.stdin(Stdio::null()).args(arguments);
    command
}

/// Runs the command and holds its exit code and words against what is expected.
fn ends(mut command: Command, code: i32, expected: &str) -> Output {
    let output = command.output().unwrap();
    let shown = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {shown}");
    assert!(shown.contains(expected), "{expected:?} is missing in: {shown}");
    output
}

/// A run folder with one checkpoint in it; the checkpoint's path.
fn checkpoint(folder: &Path, max_position_embeddings: usize) -> PathBuf {
    let checkpoint = folder.join("run/checkpoints/step-0000001");
    std::fs::create_dir_all(&checkpoint).unwrap();
    let config = ModelConfig {
        vocab_size: 256,
        hidden_size: 8,
        intermediate_size: 8,
        layers: 1,
        heads: 2,
        kv_heads: 2,
        max_position_embeddings,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        variant: Variant::default(),
    };
    BurnLearner::new(config, AdamWConfig::default(), 1).unwrap().save(&checkpoint).unwrap();
    write_tokenizer(&checkpoint);
    std::fs::write(folder.join("held-out.jsonl"), "{\"text\": \"one and two\"}\n").unwrap();
    checkpoint
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn an_export_never_writes_onto_what_it_exports() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(folder.path(), 16);
    let tokenizer = std::fs::read(checkpoint.join("tokenizer.json")).unwrap();
    let run = text(&folder.path().join("run"));
    let roundabout = format!("{}/../step-0000001", text(&checkpoint));
    for out in [&text(&checkpoint), &roundabout, &run] {
        for source in [&run, &text(&checkpoint)] {
            if out == &run && source != &run {
                continue;
            }
            ends(
                sluice_train(&["export", "--run", source, "--out", out]),
                64,
                "is the folder that is exported",
            );
            assert_eq!(std::fs::read(checkpoint.join("tokenizer.json")).unwrap(), tokenizer);
        }
    }
    let out = folder.path().join("onnx");
    ends(sluice_train(&["export", "--run", &run, "--out", &text(&out)]), 0, "exported");
    assert_eq!(std::fs::read(out.join("tokenizer.json")).unwrap(), tokenizer);
}

#[test]
fn a_damaged_checkpoint_is_wrong_data() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(folder.path(), 16);
    let (from, out) = (text(&checkpoint), text(&folder.path().join("out")));
    let held_out = format!("x={}", text(&folder.path().join("held-out.jsonl")));
    // A copy, because the tokenizer of the checkpoint will be damaged as well.
    let tokenizer = text(&write_tokenizer(folder.path()));
    let export = || sluice_train(&["export", "--run", &from, "--out", &out]);
    let evaluate = || sluice_train(&["evaluate", "--checkpoint", &from, "--eval", &held_out]);
    let init = |init: &str| {
        let mut command = sluice_train(&["run", "--bootstrap-servers", "127.0.0.1:1", "--steps", "1"]);
        command.args(["--sequence-length", "16", "--tokenizer", &tokenizer, "--out", &out, "--init", init]);
        command
    };
    ends(init(&text(folder.path())), 64, "holds no config.json");
    for (file, commands) in [
        ("model.safetensors", vec![export(), evaluate(), init(&from)]),
        ("config.json", vec![export(), evaluate(), init(&from)]),
        ("tokenizer.json", vec![export(), evaluate()]),
    ] {
        let path = checkpoint.join(file);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        for command in commands {
            ends(command, 65, file);
        }
        std::fs::write(&path, whole).unwrap();
    }
    assert!(!Path::new(&out).exists(), "nothing was begun");
    ends(evaluate(), 0, "");
}

#[test]
fn a_model_that_predicts_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let from = text(&checkpoint(folder.path(), 1));
    let held_out = format!("x={}", text(&folder.path().join("held-out.jsonl")));
    ends(sluice_train(&["evaluate", "--checkpoint", &from, "--eval", &held_out]), 65, "predicts none");
}

#[test]
fn sizes_out_of_all_proportion_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, out) = (text(&write_tokenizer(folder.path())), text(&folder.path().join("run")));
    for (flag, expected) in [
        ("--sequence-length", "must be a whole number from 2 to 67108864"),
        ("--batch-size", "must be a whole number from 1 to 67108864"),
        ("--accumulate", "must be a whole number from 1 to 65536"),
        ("--hidden-size", "must be between 1 and"),
        ("--layers", "must be between 1 and"),
    ] {
        let mut command = sluice_train(&["run", "--steps", "1", "--tokenizer", &tokenizer, "--out", &out]);
        command.args([flag, "10000000000000000000"]);
        ends(command, 64, expected);
    }
}

#[test]
fn a_tokenizer_with_an_id_past_all_ids_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = write_tokenizer(folder.path());
    let file = std::fs::read_to_string(&path).unwrap().replace("\"a\":", "\"zzz\":4294967295,\"a\":");
    std::fs::write(&path, file).unwrap();
    let out = text(&folder.path().join("run"));
    ends(sluice_train(&["run", "--steps", "1", "--tokenizer", &text(&path), "--out", &out]), 65, "token id");
}

#[test]
fn no_property_is_repeated_with_its_value() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, out) = (text(&write_tokenizer(folder.path())), text(&folder.path().join("run")));
    for (property, expected) in [
        ("sasl.passwrd=hunter2", "sasl.passwrd is unknown"),
        ("security.protocol=hunter2", "security.protocol is not accepted"),
        ("sasl.password:hunter2", "not KEY=VALUE"),
        ("=hunter2", "not KEY=VALUE"),
    ] {
        let mut command = sluice_train(&["run", "--steps", "1", "--tokenizer", &tokenizer, "--out", &out]);
        command.args(["--property", property]).env("SLUICE_TRAIN_LOG", "trace");
        let output = ends(command, 64, expected);
        assert!(!String::from_utf8_lossy(&output.stderr).contains("hunter2"), "{property}");
        assert!(!Path::new(&out).exists(), "nothing was begun");
    }
}

#[test]
fn a_reader_who_has_seen_enough_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let from = text(&checkpoint(folder.path(), 16));
    let held_out = format!("x={}", text(&folder.path().join("held-out.jsonl")));
    let mut evaluate = sluice_train(&["evaluate", "--checkpoint", &from, "--eval", &held_out]);
    let mut child = evaluate.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(0), ""));
}

#[test]
fn selections_that_contradict_themselves_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (tokenizer, out) = (text(&write_tokenizer(folder.path())), text(&folder.path().join("run")));
    let absent = text(&folder.path().join("absent"));
    for (flags, expected) in [
        (vec!["--objective", "clm", "--score", "loss"], "keeps every token"),
        (vec!["--objective", "clm", "--scope", "sequence"], "keeps every token"),
        (vec!["--objective", "clm", "--backward", "kept"], "drops no token"),
        (vec!["--objective", "random", "--score", "excess"], "looks at no score"),
        (vec!["--objective", "random", "--threshold", "1"], "looks at no score"),
        (vec!["--objective", "random", "--scope", "running-quantile"], "follows scores"),
        (vec!["--score", "loss", "--entropy-keep", "0.5"], "second share"),
        (vec!["--keep", "adaptive:0.9:0.1"], "MIN at most MAX"),
        (vec!["--keep", "adaptive", "--score", "loss"], "one model is better than another"),
        (vec!["--keep", "adaptive", "--objective", "random"], "one model is better than another"),
        (vec!["--keep", "adaptive", "--scope", "running-quantile"], "follows a share"),
        (vec!["--score", "union", "--threshold", "-1.5"], "look at two"),
        (vec!["--threshold", "0", "--scope", "batch"], "no token competes"),
        (vec!["--threshold", "0", "--keep", "0.5"], "cannot be used with"),
        (vec!["--threshold", "nan"], "finite number"),
        (vec!["--score", "improvement"], "give --history FOLDER or --history-decay"),
        (vec!["--history-decay", "0.9"], "serve --score improvement alone"),
        (vec!["--score", "improvement", "--history-decay", "1"], "above 0 and below 1"),
        (vec!["--score", "improvement", "--history", &absent], "holds no config.json"),
        (vec!["--keep-warmup-steps", "10"], "nothing would ever be left out"),
        (vec!["--keep", "steps:0.8,11=0.6"], "after the last of the --steps"),
        (vec!["--keep", "steps:0.8,9=0.6,5=0.7"], "ascending steps"),
        (vec!["--accumulate", "0"], "from 1 to 65536"),
        (vec!["--first-token", "predict"], "nothing to predict from"),
        (vec!["--decay-steps", "5"], "part of --schedule wsd"),
        (vec!["--schedule", "wsd", "--warmup-steps", "8", "--decay-steps", "5"], "more than the 10 steps"),
    ] {
        let mut command = sluice_train(&["run", "--bootstrap-servers", "127.0.0.1:1", "--steps", "10"]);
        command.args(["--sequence-length", "16", "--tokenizer", &tokenizer, "--out", &out]).args(&flags);
        ends(command, 64, expected);
        assert!(!Path::new(&out).join("run.json").exists(), "nothing was begun");
    }
    // An older checkpoint of another shape.
    let other = text(&checkpoint(folder.path(), 16));
    let mut command =
        sluice_train(&["run", "--steps", "10", "--sequence-length", "16", "--score", "improvement"]);
    command.args(["--tokenizer", &tokenizer, "--out", &absent, "--history", &other]);
    ends(command, 64, "another shape");
}
