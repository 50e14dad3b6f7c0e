//! Where the parts of the experiments lie in their folder.

use std::path::PathBuf;

use super::group::Size;
use super::reference::{Reference, Stream};
use super::setting::Setting;

/// In the folder of each part that is done.
pub(super) const DONE_FILE: &str = "done.json";

/// The run that makes the base model of a size.
pub(super) fn base_folder(size: Size) -> PathBuf {
    PathBuf::from(format!("runs/base-{}", size.name))
}

/// The base model of a size, as the daemon scores with it.
pub(super) fn base_model_folder(size: Size) -> PathBuf {
    PathBuf::from(format!("models/base-{}", size.name))
}

/// The run that makes the reference of a stream, which is of this size.
pub(super) fn reference_folder(stream: Stream, size: Size) -> PathBuf {
    match stream.reference {
        Reference::General => base_folder(size),
        _ => PathBuf::from(format!("runs/reference-{}", stream.reference_name())),
    }
}

/// The reference of a stream, as the daemon scores with it.
pub(super) fn model_folder(stream: Stream, size: Size) -> PathBuf {
    match stream.reference {
        Reference::General => base_model_folder(size),
        _ => PathBuf::from(format!("models/reference-{}", stream.reference_name())),
    }
}

/// The texts of a setting's controls.
pub(super) fn texts_folder(setting: Setting) -> PathBuf {
    PathBuf::from(format!("texts/{}", setting.name()))
}

/// What scoring the corpus of a stream took.
pub(super) fn scoring_file(stream: Stream) -> String {
    format!("scoring-{}.json", stream.name())
}
