//! Files that are whole or not there.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Reads a JSON file that a run has written.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is not what a run writes there", path.display()))
}

/// Writes a JSON file, whole.
pub fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut bytes =
        serde_json::to_vec_pretty(value).with_context(|| format!("cannot encode {}", path.display()))?;
    bytes.push(b'\n');
    write_whole(path, &bytes)
}

/// Writes a file under a temporary name, waits until it is on the disk, which a rename must not overtake, and renames it
/// into place.
pub fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    write_through(path, |file| Ok(file.write_all(bytes)?))
}

/// As [`write_whole`], piece by piece. Where `write` fails, what was there before stays.
pub fn write_through(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = BufWriter::new(File::create(&temporary)?);
        write(&mut file)?;
        file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
        anyhow::Ok(fs::rename(&temporary, path)?)
    };
    write()
        .inspect_err(|_| {
            // It may be large, and what went wrong is said already.
            let _ = fs::remove_file(&temporary);
        })
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Waits until the names in a folder are on the disk.
pub(crate) fn sync_folder(path: &Path) -> anyhow::Result<()> {
    let synced = File::open(path).and_then(|folder| folder.sync_all());
    synced.with_context(|| format!("cannot write {} to disk", path.display()))
}

/// An empty folder, whatever an interrupted run left there.
pub(crate) fn recreate(folder: &Path) -> anyhow::Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}
