//! A buffer that hands documents on in another order than they came in.

use crate::document::Document;
use crate::random::SplitMix64;
use crate::stream::Next;

/// Holds up to `capacity` documents and hands on one drawn from them; the order depends on the seed and the stream
/// alone. A capacity of at most 1 leaves the order as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct ShuffleBuffer {
    capacity: usize,
    seed: u64,
    draws: u64,
    documents: Vec<Document>,
}

impl ShuffleBuffer {
    /// An empty buffer.
    pub fn new(capacity: usize, seed: u64) -> Self {
        Self { capacity, seed, draws: 0, documents: vec![] }
    }

    /// The same buffer with documents that an earlier run has left in it, after as many draws.
    #[must_use]
    pub fn holding(self, documents: Vec<Document>, draws: u64) -> Self {
        Self { draws, documents, ..self }
    }

    /// Documents waiting, in an order that the next draws depend on.
    pub fn documents(&self) -> &[Document] {
        &self.documents
    }

    /// Documents handed on so far.
    pub fn draws(&self) -> u64 {
        self.draws
    }

    /// The next document, from what `read` gives. [`Next::Ended`] once that has ended and the buffer is empty;
    /// [`Next::Stopped`] leaves the buffer as it is.
    pub fn next_document<E>(&mut self, mut read: impl FnMut() -> Result<Next, E>) -> Result<Next, E> {
        while self.documents.len() < self.capacity.max(1) {
            match read()? {
                Next::Document(document) => self.documents.push(document),
                Next::Stopped => return Ok(Next::Stopped),
                Next::Ended => break,
            }
        }
        if self.documents.is_empty() {
            return Ok(Next::Ended);
        }
        let index = SplitMix64::keyed(self.seed, self.draws).below(self.documents.len());
        self.draws += 1;
        Ok(Next::Document(self.documents.swap_remove(index)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use std::convert::Infallible;

    use super::ShuffleBuffer;
    use crate::document::Document;
    use crate::stream::Next;

    /// Fifty documents in order.
    fn stream() -> impl Iterator<Item = Document> {
        (0..50).map(|n| Document::plain(n.to_string(), String::new(), vec![n, n]))
    }

    fn drain(
        buffer: &mut ShuffleBuffer,
        stream: &mut impl Iterator<Item = Document>,
        count: usize,
    ) -> Vec<u32> {
        let mut read = || Ok::<_, Infallible>(stream.next().map_or(Next::Ended, Next::Document));
        let next = || match buffer.next_document(&mut read).unwrap() {
            Next::Document(document) => Some(document.tokens()[0]),
            Next::Ended | Next::Stopped => None,
        };
        std::iter::from_fn(next).take(count).collect()
    }

    #[test]
    fn every_document_comes_out_once_in_an_order_named_by_the_seed() {
        let order = |capacity, seed| drain(&mut ShuffleBuffer::new(capacity, seed), &mut stream(), 99);
        let plain = order(0, 1);
        assert_eq!(plain, (0..50).collect::<Vec<_>>(), "without room nothing is shuffled");
        assert_eq!(plain, order(1, 2));
        assert_ne!(order(10, 1), plain);
        assert_ne!(order(10, 1), order(10, 2));
        assert_eq!(order(10, 1), order(10, 1));
        let mut sorted = order(10, 1);
        sorted.sort_unstable();
        assert_eq!(sorted, plain);
    }

    #[test]
    fn what_is_left_in_a_buffer_is_where_it_goes_on() {
        let whole = drain(&mut ShuffleBuffer::new(8, 3), &mut stream(), 99);
        for cut in [0, 1, 20, 45, 50] {
            let (mut buffer, mut stream) = (ShuffleBuffer::new(8, 3), stream());
            let mut order = drain(&mut buffer, &mut stream, cut);
            let (left, draws) = (buffer.documents().to_vec(), buffer.draws());
            let mut resumed = ShuffleBuffer::new(8, 3).holding(left, draws);
            order.extend(drain(&mut resumed, &mut stream, 99));
            assert_eq!(order, whole);
        }
    }

    #[test]
    fn a_request_to_stop_leaves_the_buffer_as_it_is() {
        let mut buffer = ShuffleBuffer::new(8, 3);
        drain(&mut buffer, &mut stream(), 3);
        let before = buffer.clone();
        let stopped = buffer.next_document(|| Ok::<_, Infallible>(Next::Stopped)).unwrap();
        assert!(matches!(stopped, Next::Stopped));
        assert_eq!(format!("{buffer:?}"), format!("{before:?}"));
    }
}
