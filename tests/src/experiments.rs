//! The experiments of the benches with `--quick`, as their tests run them and look at what they leave.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::SystemTime;

use serde_json::Value;

use crate::{binary, onnxruntime, root};

/// Settings of the caller, which must not become settings of the runs: the scope alone would have the plain runs refused.
const EXPORTED: [(&str, &str); 4] = [
    ("SLUICE_TRAIN_SCOPE", "sequence"),
    ("SLUICE_TRAIN_WEIGHT_DECAY", "0.5"),
    ("SLUICED_SCORE_STRIDE_TOKENS", "1"),
    ("SLUICED_LIMITS_IN_FLIGHT_TOKENS", "nonsense"),
];

/// An experiment by its name, its runs in `out`.
pub fn quick(name: &str, out: &Path) -> Command {
    let mut command = Command::new(binary("experiment"));
    command.args([name, "--quick", "--out"]).arg(out).current_dir(root());
    command.envs(EXPORTED);
    command.env("ORT_DYLIB_PATH", onnxruntime()).stdin(Stdio::null());
    command
}

/// Run folders that are marked as done, with the time of the mark.
pub fn marks(out: &Path) -> Vec<(String, SystemTime)> {
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

/// What an experiment left in a folder below `out`.
pub fn results(out: &Path, folder: &str) -> Value {
    serde_json::from_slice(&std::fs::read(out.join(folder).join("results.json")).unwrap()).unwrap()
}

/// The elements of a list.
pub fn array(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}
