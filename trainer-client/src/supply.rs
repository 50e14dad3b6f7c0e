//! Micro-batches from a stream, in stream order, with an eye on documents for the token picture.

use crate::pack::{BatchShape, PackedBatch, Packer};
use crate::picture::PictureDocuments;
use crate::stream::{DocumentStream, StreamError};

/// Packs a stream's documents into the micro-batches of one step after the other.
#[derive(Debug)]
pub struct Supply {
    packer: Packer,
    picture: PictureDocuments,
}

impl Supply {
    /// An empty supply of micro-batches of this shape.
    pub fn new(shape: BatchShape) -> Self {
        Self { packer: Packer::new(shape), picture: PictureDocuments::default() }
    }

    /// The next `count` micro-batches; fewer, the last of them perhaps with fewer rows, at the end of the stream, and
    /// none after it.
    pub fn next_batches(
        &mut self,
        stream: &mut dyn DocumentStream,
        count: usize,
    ) -> Result<Vec<PackedBatch>, StreamError> {
        loop {
            if let Some(batches) = self.packer.next_batches(count) {
                return Ok(batches);
            }
            match stream.next_document()? {
                Some(document) => {
                    self.picture.offer(&document);
                    self.packer.push(&document);
                }
                None => return Ok(std::iter::from_fn(|| self.packer.flush()).take(count).collect()),
            }
        }
    }

    /// Names that the source indices of the micro-batches stand for.
    pub fn sources(&self) -> &[String] {
        self.packer.sources().names()
    }

    /// Documents chosen for the token picture so far.
    pub fn picture(&self) -> &PictureDocuments {
        &self.picture
    }
}

/// Micro-batches of this shape that a stream fills, counted by packing it.
pub fn count_batches(stream: &mut dyn DocumentStream, shape: BatchShape) -> Result<u64, StreamError> {
    let mut supply = Supply::new(shape);
    let mut batches = 0;
    loop {
        match supply.next_batches(stream, 1)?.len() {
            0 => return Ok(batches),
            more => batches += more as u64,
        }
    }
}
