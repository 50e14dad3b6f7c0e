//! Files as people and their tools make them, and readers that go away: `sluice-train` as `sluiced` does.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod support;

use std::fs::File;
use std::io::Write as _;
use std::process::{Output, Stdio};

use serde_json::Value;
use support::program::{Place, sluice_train, stderr, succeed};

/// The place of a run of two steps, in the folder `run`.
fn trained() -> Place {
    let place = Place::new();
    let mut training = place.training("run", "scored", "run");
    succeed(training.args(["--objective", "clm", "--steps", "2", "--until-end"]));
    place
}

fn evaluate(place: &Place, file: &str) -> Output {
    let set = format!("x={}", place.path(file));
    sluice_train().args(["evaluate", "--checkpoint", &place.path("run"), "--eval", &set]).output().unwrap()
}

fn losses(place: &Place, file: &str) -> Value {
    let output = evaluate(place, file);
    assert!(output.status.success(), "{file}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn held_out_text_is_read_as_the_daemon_reads_text() {
    let place = trained();
    let lines =
        "{\"text\":\"one and two\",\"score\":NaN}\n\n{\"text\":\"two and one\",\"context\":\"one \"}\r\n";
    let write = |name: &str, bytes: &[u8]| std::fs::write(place.path(name), bytes).unwrap();
    write("plain", lines.as_bytes());
    let expected = losses(&place, "plain");
    assert!(expected["predictions"].as_u64().unwrap() > 10);

    let halves = lines.split_inclusive('\n').map(|line| {
        let mut member = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        member.write_all(line.as_bytes()).unwrap();
        member.finish().unwrap()
    });
    write("multi.gz", &halves.collect::<Vec<_>>().concat());
    write("marked", format!("\u{feff}{lines}").as_bytes());
    let frame = zstd::encode_all(lines.as_bytes(), 1).unwrap();
    write("skippable", &[&[0x5f, 0x2a, 0x4d, 0x18, 0, 0, 0, 0][..], &frame].concat());
    for file in ["multi.gz", "marked", "skippable"] {
        assert_eq!(losses(&place, file), expected, "{file}");
    }

    // A set is compared between runs, so one bad line spoils it; the line is named.
    write("bad", b"{\"text\":\"one\"}\noops\n");
    let output = evaluate(&place, "bad");
    assert_eq!(output.status.code(), Some(65));
    assert!(stderr(&output).contains("bad:2: not a JSON object"), "{}", stderr(&output));
}

#[test]
fn a_config_as_python_writes_it_is_read() {
    let place = trained();
    let expected = losses(&place, "held-out.jsonl");
    let checkpoint = place.path("run/checkpoints/step-0000002");
    let path = format!("{checkpoint}/config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let opened = config.trim_start().strip_prefix('{').unwrap();
    std::fs::write(&path, format!("\u{feff}{{\"time_step_limit\": [0.0, Infinity], {opened}")).unwrap();
    assert_eq!(losses(&place, "held-out.jsonl"), expected);
    std::fs::write(&path, config.replacen("\"rms_norm_eps\": 1e-6", "\"rms_norm_eps\": NaN", 1)).unwrap();
    let output = evaluate(&place, "held-out.jsonl");
    assert_eq!(output.status.code(), Some(65), "{}", stderr(&output));
    assert!(stderr(&output).contains("\"NaN\""), "{}", stderr(&output));
    // Of a key that stands there twice the last one counts.
    std::fs::write(&path, format!("{{\"hidden_size\": 1, {opened}")).unwrap();
    assert_eq!(losses(&place, "held-out.jsonl"), expected);
}

#[test]
fn a_pointer_of_git_lfs_is_named_whichever_file_it_stands_for() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n";
    for name in ["model.safetensors", "config.json"] {
        let place = trained();
        std::fs::write(place.path(&format!("run/checkpoints/step-0000002/{name}")), pointer).unwrap();
        let output = evaluate(&place, "held-out.jsonl");
        assert_eq!(output.status.code(), Some(65), "{name}: {}", stderr(&output));
        let words = format!("{name} is a pointer of Git LFS");
        assert!(stderr(&output).contains(&words), "{name}: {}", stderr(&output));
    }
}

#[test]
fn a_loss_that_is_not_finite_is_no_mean_over_the_others() {
    let place = trained();
    // Weights that are finite, and whose products are not: the largest number there is.
    let path = place.path("run/checkpoints/step-0000002/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let layout: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let span = layout["model.norm.weight"]["data_offsets"].as_array().unwrap();
    let [start, end] = [&span[0], &span[1]].map(|offset| 8 + header + offset.as_u64().unwrap() as usize);
    bytes[start..end].copy_from_slice(&f32::MAX.to_le_bytes().repeat((end - start) / 4));
    std::fs::write(&path, bytes).unwrap();
    let output = evaluate(&place, "held-out.jsonl");
    assert_eq!(output.status.code(), Some(65), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(stderr(&output).contains("a loss that is not finite"), "{}", stderr(&output));
}

#[test]
fn a_closed_pipe_is_no_failure_and_a_full_disk_is_one() {
    let place = trained();
    let (run, page) = (place.path("run"), place.path("report.html"));
    let set = format!("x={}", place.path("held-out.jsonl"));
    let printing = [
        vec!["--help"],
        vec!["--version"],
        vec!["evaluate", "--checkpoint", &run, "--eval", &set],
        vec!["report", "--out", &page, &run],
    ];
    for arguments in printing {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = sluice_train().args(&arguments).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = sluice_train().args(&arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains("cannot write to standard output: No space left"), "{arguments:?}: {said}");
    }
}
