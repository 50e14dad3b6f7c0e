//! Files that a checkout of a hub has only as pointers of Git LFS.

use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

/// How every pointer begins (Git LFS, docs/spec.md).
const BEGINNING: &[u8] = b"version https://git-lfs.github.com/spec/";

/// A file is the pointer of Git LFS to itself.
#[derive(Debug, thiserror::Error)]
#[error("{} is a pointer of Git LFS and not the file itself; fetch that with `git lfs pull` where it was cloned", .0.display())]
pub struct LfsPointer(PathBuf);

/// Refuses the bytes of a file that begins as a pointer does.
pub fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<(), LfsPointer> {
    if bytes.starts_with(BEGINNING) { Err(LfsPointer(path.to_owned())) } else { Ok(()) }
}

/// The same of a file that is open; it is left at its beginning.
pub fn refuse_pointer_in(path: &Path, file: &mut (impl Read + Seek)) -> io::Result<()> {
    let mut beginning = Vec::new();
    file.by_ref().take(BEGINNING.len() as u64).read_to_end(&mut beginning)?;
    file.rewind()?;
    refuse_pointer(path, &beginning).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use std::io::{Cursor, Read as _};

    use super::{refuse_pointer, refuse_pointer_in};

    #[test]
    fn a_pointer_is_refused_by_its_name_and_other_files_are_not() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
        let path = Path::new("model/model.safetensors");
        let error = refuse_pointer(path, pointer).map_err(|error| error.to_string());
        assert!(
            error.is_err_and(|error| error.starts_with("model/model.safetensors is a pointer of Git LFS"))
        );
        for other in [&b"{\"version\": \"https://git-lfs.github.com/spec/\"}"[..], b"", b"version"] {
            assert!(refuse_pointer(path, other).is_ok());
            let mut file = Cursor::new(other);
            let mut read = Vec::new();
            let whole = refuse_pointer_in(path, &mut file).and_then(|()| file.read_to_end(&mut read));
            assert!(whole.is_ok() && read == other, "it is left at its beginning");
        }
        assert!(refuse_pointer_in(path, &mut Cursor::new(pointer)).is_err());
    }
}
