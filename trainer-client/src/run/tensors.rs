//! Tensors in safetensors files, read and written one after the other, so that no second copy of a model is in memory.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use sha2::{Digest, Sha256};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_text::refuse_pointer_in;

use crate::run::files::write_through;

/// Bytes of the number that a file begins with: the length of its header.
const LENGTH_BYTES: u64 = 8;
/// Longest header, as in the library.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Tensor data begin at a multiple of this.
const ALIGNMENT: usize = 8;
/// Values that are encoded at once.
const VALUES_AT_ONCE: usize = 1 << 16;

/// A tensor on the host, row-major: a weight, gradient or moment of a model, or what a run has measured.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Its name; for a weight that of Hugging Face, such as `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// `[out, in]` for a matrix, `[width]` for a norm or a bias.
    pub shape: Vec<usize>,
    /// `shape.product()` values.
    pub values: Vec<f32>,
}

/// What a value is stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Stored {
    /// Single precision
    #[default]
    F32,
    /// IEEE 754 half precision: 11 significant bits, up to 65,504
    F16,
    /// bfloat16: 8 significant bits, as far as single precision
    Bf16,
}

impl Stored {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// `PyTorch`'s name for it, as in `config.json`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// Little-endian values, rounded to the nearest. Fails where a finite one is beyond what the type holds.
    pub fn encode(self, name: &str, values: &[f32]) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(values.len() * self.bytes());
        let rounded = |value: f32, is_finite: bool| {
            let fits = is_finite || !value.is_finite();
            ensure!(
                fits,
                "{value} in {name} is beyond what {} holds: store it as bf16 or f32",
                self.torch_name()
            );
            Ok(())
        };
        for &value in values {
            match self {
                Self::F32 => bytes.extend(value.to_le_bytes()),
                Self::F16 => {
                    let half = f16::from_f32(value);
                    rounded(value, half.is_finite())?;
                    bytes.extend(half.to_le_bytes());
                }
                Self::Bf16 => {
                    let half = bf16::from_f32(value);
                    rounded(value, half.is_finite())?;
                    bytes.extend(half.to_le_bytes());
                }
            }
        }
        Ok(bytes)
    }
}

/// A tensor to be written, whose values are fetched when it is its turn.
pub struct Pending<'a> {
    name: String,
    shape: Vec<usize>,
    values: Box<dyn FnOnce() -> Result<Vec<f32>> + 'a>,
}

impl<'a> Pending<'a> {
    /// A tensor whose `values` are `shape.product()`, row-major.
    pub fn new(name: String, shape: Vec<usize>, values: impl FnOnce() -> Result<Vec<f32>> + 'a) -> Self {
        Self { name, shape, values: Box::new(values) }
    }

    /// One that is at hand.
    pub fn of(tensor: &'a NamedTensor) -> Self {
        Self::new(tensor.name.clone(), tensor.shape.clone(), || Ok(tensor.values.clone()))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of its values where they are stored so.
    pub fn bytes(&self, stored: Stored) -> usize {
        self.shape.iter().product::<usize>() * stored.bytes()
    }
}

/// Writes a file, whole or not at all, with one metadata entry (transformers insists on `format: pt` for weights).
pub fn write_pending(
    path: &Path,
    tensors: Vec<Pending<'_>>,
    stored: Stored,
    metadata: (&str, &str),
) -> Result<()> {
    write_through(path, |file| lay_out(file, tensors, stored, metadata))
}

/// Writes f32 tensors that are at hand.
pub fn write_tensors(path: &Path, tensors: &[NamedTensor], metadata: (&str, &str)) -> Result<()> {
    write_pending(path, tensors.iter().map(Pending::of).collect(), Stored::F32, metadata)
}

/// Digest of the file that [`write_pending`] would write in single precision.
pub fn digest(tensors: Vec<Pending<'_>>, metadata: (&str, &str)) -> Result<Fingerprint> {
    let mut hasher = Sha256::new();
    lay_out(&mut hasher, tensors, Stored::F32, metadata)?;
    let digest: [u8; Fingerprint::LEN] = hasher.finalize().into();
    Ok(digest.into())
}

/// The bytes of a file: as the library's own `serialize` lays it out, which wants all tensors in memory.
fn lay_out(
    to: &mut dyn Write,
    mut tensors: Vec<Pending<'_>>,
    stored: Stored,
    metadata: (&str, &str),
) -> Result<()> {
    tensors.sort_by(|one, other| one.name.cmp(&other.name));
    let mut end = 0;
    let info = |tensor: &Pending<'_>| {
        let begin = end;
        end += tensor.bytes(stored);
        let info =
            TensorInfo { dtype: stored.dtype(), shape: tensor.shape.clone(), data_offsets: (begin, end) };
        (tensor.name.clone(), info)
    };
    let infos = tensors.iter().map(info).collect();
    let metadata = HashMap::from([(metadata.0.to_owned(), metadata.1.to_owned())]);
    let header = Metadata::new(Some(metadata), infos).context("cannot lay out the tensors")?;
    let mut header = serde_json::to_vec(&header).context("cannot encode the tensors' names")?;
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    to.write_all(&(header.len() as u64).to_le_bytes())?;
    to.write_all(&header)?;
    for Pending { name, shape, values } in tensors {
        let values = values()?;
        ensure!(
            values.len() == shape.iter().product::<usize>(),
            "{name} has {} values, not the {shape:?} of its shape",
            values.len()
        );
        for some in values.chunks(VALUES_AT_ONCE) {
            to.write_all(&stored.encode(&name, some)?)?;
        }
    }
    Ok(())
}

/// A safetensors file whose tensors are read one by one, as f32.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Where tensor data begin.
    begin: u64,
}

impl TensorFile {
    /// Reads the header of a file, and checks that the file is whole.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let damaged = || format!("{} is not a whole safetensors file: it may be damaged", path.display());
        let size = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        refuse_pointer_in(path, &mut file).with_context(|| format!("cannot read {}", path.display()))?;
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact(&mut length).with_context(damaged)?;
        let length = u64::from_le_bytes(length);
        if length > HEADER_BYTES_MAX.min(size - LENGTH_BYTES) {
            return Err(anyhow::anyhow!("its header is said to have {length} bytes")).with_context(damaged);
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).with_context(damaged)?;
        let header: Metadata = serde_json::from_slice(&header).with_context(damaged)?;
        let begin = LENGTH_BYTES + length;
        if begin + header.data_len() as u64 != size {
            let error = anyhow::anyhow!("it has {size} bytes, not {}", begin + header.data_len() as u64);
            return Err(error).with_context(damaged);
        }
        Ok(Self { path: path.to_owned(), file, header, begin })
    }

    /// Names of its tensors, in the order of their data.
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// The entries beside its tensors.
    pub fn metadata(&self) -> HashMap<String, String> {
        self.header.metadata().clone().unwrap_or_default()
    }

    /// Reads a tensor; one in half precision is widened, which changes no value.
    pub fn read(&mut self, name: &str) -> Result<NamedTensor> {
        let Self { path, file, header, begin } = self;
        let info = header.info(name).with_context(|| format!("{} holds no tensor {name}", path.display()))?;
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0; to - from];
        let read = file.seek(SeekFrom::Start(*begin + from as u64)).and_then(|_| file.read_exact(&mut bytes));
        read.with_context(|| format!("cannot read tensor {name} in {}", path.display()))?;
        let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        let values = match info.dtype {
            Dtype::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            Dtype::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            other => bail!(
                "tensor {name} in {} is {other:?}, expected F32, F16 or BF16: take the model as it was before it was \
                 quantized, or convert the file first",
                path.display()
            ),
        };
        Ok(NamedTensor { name: name.to_owned(), shape: info.shape.clone(), values })
    }
}

/// Reads a whole file: its tensors, and its metadata.
pub fn read_tensors(path: &Path) -> Result<(Vec<NamedTensor>, HashMap<String, String>)> {
    let mut file = TensorFile::open(path)?;
    let tensors = file.names().iter().map(|name| file.read(name)).collect::<Result<_>>()?;
    Ok((tensors, file.metadata()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use safetensors::tensor::TensorView;

    use super::*;

    fn tensors() -> Vec<NamedTensor> {
        let tensor = |name: &str, shape: &[usize]| {
            let count = shape.iter().product::<usize>();
            let values = (0..count).map(|index| (index as f32 - 3.0) / 7.0).collect();
            NamedTensor { name: name.to_owned(), shape: shape.to_vec(), values }
        };
        vec![tensor("b.weight", &[3, 5]), tensor("a.weight", &[7]), tensor("c", &[0, 4])]
    }

    /// Bytes of the library's own writer.
    fn by_the_library(stored: Stored) -> Vec<u8> {
        let tensors = tensors();
        let bytes: Vec<_> =
            tensors.iter().map(|tensor| stored.encode(&tensor.name, &tensor.values).unwrap()).collect();
        let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
            let view = TensorView::new(stored.dtype(), tensor.shape.clone(), bytes).unwrap();
            (tensor.name.as_str(), view)
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    #[test]
    fn a_file_is_what_the_library_writes_and_its_digest_needs_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.safetensors");
        let tensors = tensors();
        let pending = || tensors.iter().map(Pending::of).collect();
        for stored in [Stored::F32, Stored::F16, Stored::Bf16] {
            write_pending(&path, pending(), stored, ("format", "pt")).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), by_the_library(stored), "{stored:?}");
        }
        let expected = Fingerprint::of_bytes(&by_the_library(Stored::F32));
        assert_eq!(digest(pending(), ("format", "pt")).unwrap(), expected);
    }

    #[test]
    fn sixteen_bits_are_rounded_to_the_nearest_and_widened_without_loss() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.safetensors");
        // 1 + 2^-8 lies between 1 and 1 + 2^-7 in bfloat16, and ties go to the even one.
        let values = vec![1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.1, f32::INFINITY];
        let tensor = NamedTensor { name: "w".to_owned(), shape: vec![4], values };
        write_pending(&path, vec![Pending::of(&tensor)], Stored::Bf16, ("format", "pt")).unwrap();
        let (read, metadata) = read_tensors(&path).unwrap();
        assert_eq!(read[0].values, [1.0, 1.015_625, -0.100_097_656, f32::INFINITY]);
        assert_eq!(metadata["format"], "pt");
        let too_large = NamedTensor { name: "w".to_owned(), shape: vec![1], values: vec![70_000.0] };
        let error = write_pending(&path, vec![Pending::of(&too_large)], Stored::F16, ("format", "pt"));
        assert!(format!("{:#}", error.unwrap_err()).contains("70000 in w is beyond what float16 holds"));
        assert_eq!(read_tensors(&path).unwrap().0, read, "the file that was there");
    }

    #[test]
    fn a_file_that_is_not_whole_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.safetensors");
        let whole = by_the_library(Stored::F32);
        let mut longer = whole.clone();
        longer.push(0);
        for bytes in [&whole[..3], &whole[..20], &whole[..whole.len() - 1], &longer, &[0xff; 64][..]] {
            std::fs::write(&path, bytes).unwrap();
            let error = format!("{:#}", read_tensors(&path).unwrap_err());
            assert!(error.contains("some.safetensors is not a whole safetensors file"), "{error}");
        }
    }
}
