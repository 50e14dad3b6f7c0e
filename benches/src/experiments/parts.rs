//! Where the parts of an experiment lie in its folder.

use std::path::PathBuf;

use super::plan::Setting;

/// In the folder of each part that is done.
pub(super) const DONE_FILE: &str = "done.json";

/// There is a reference from the base model and one from fresh weights.
fn reference_name(setting: Setting) -> &'static str {
    let first = if setting.has_base() { Setting::Continual } else { Setting::Scratch };
    first.name()
}

/// The run that makes the reference of a setting.
pub(super) fn reference_folder(setting: Setting) -> PathBuf {
    PathBuf::from(format!("runs/reference-{}", reference_name(setting)))
}

/// The run that makes the base model.
pub(super) fn base_folder() -> PathBuf {
    PathBuf::from("runs/base")
}

/// The reference of a setting, as the daemon scores with it.
pub(super) fn model_folder(setting: Setting) -> PathBuf {
    PathBuf::from(format!("models/reference-{}", reference_name(setting)))
}

/// The base model, as whole documents are scored with it.
pub(super) fn base_model_folder() -> PathBuf {
    PathBuf::from("models/base")
}

/// The texts of a setting's controls.
pub(super) fn texts_folder(setting: Setting) -> PathBuf {
    PathBuf::from(format!("texts/{}", setting.name()))
}

/// What scoring the corpus of a setting took.
pub(super) fn scoring_file(setting: Setting) -> String {
    format!("scoring-{}.json", setting.name())
}
