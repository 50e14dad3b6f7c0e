//! Documents held in memory, in a new order for each pass over them: a stream of one lane.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sluice_schemas::fingerprint::Fingerprint;

use super::{DocumentStream, Next, Position, StreamError};
use crate::document::Document;
use crate::random::SplitMix64;

/// Shuffles its documents anew for each epoch; the order depends on the seed and the epoch alone.
#[derive(Clone, Debug)]
pub struct ShuffledDocuments {
    documents: Arc<[Document]>,
    order: Vec<u32>,
    next: usize,
    epoch: u64,
    epochs: u64,
    seed: u64,
    handed_out: u64,
    stop: Arc<AtomicBool>,
}

impl ShuffledDocuments {
    /// `epochs` passes over the documents; ends early once `stop` is set.
    pub fn new(documents: Vec<Document>, epochs: u64, seed: u64, stop: Arc<AtomicBool>) -> Self {
        Self {
            documents: documents.into(),
            order: vec![],
            next: 0,
            epoch: 0,
            epochs,
            seed,
            handed_out: 0,
            stop,
        }
    }
}

impl ShuffledDocuments {
    /// Documents in each pass.
    pub fn documents(&self) -> usize {
        self.documents.len()
    }

    /// The same stream after it has handed out as many documents.
    #[must_use]
    pub fn after(mut self, handed_out: u64) -> Self {
        if let (Some(last), count @ 1..) = (handed_out.checked_sub(1), self.documents.len() as u64) {
            self.begin(last / count + 1);
            self.next = (last % count) as usize + 1;
            self.handed_out = handed_out;
        }
        self
    }

    fn begin(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.next = 0;
        self.order = (0..self.documents.len() as u32).collect();
        SplitMix64::keyed(self.seed, epoch).shuffle(&mut self.order);
    }
}

impl DocumentStream for ShuffledDocuments {
    fn lanes(&self) -> usize {
        1
    }

    fn next_document(&mut self, _lane: usize) -> Result<Next, StreamError> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(Next::Stopped);
        }
        if self.next == self.order.len() {
            if self.epoch == self.epochs || self.documents.is_empty() {
                return Ok(Next::Ended);
            }
            self.begin(self.epoch + 1);
        }
        let document = self.documents[self.order[self.next] as usize].clone();
        self.next += 1;
        self.handed_out += 1;
        Ok(Next::Document(document))
    }

    fn position(&self, _lane: usize) -> Position {
        Position { epoch: self.epoch, documents: self.handed_out, ..Position::default() }
    }

    fn reference_model(&self) -> Option<Fingerprint> {
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::ShuffledDocuments;
    use crate::document::Document;
    use crate::stream::{DocumentStream, Next};

    fn next(stream: &mut ShuffledDocuments) -> Option<Document> {
        match stream.next_document(0).unwrap() {
            Next::Document(document) => Some(document),
            Next::Ended | Next::Stopped => None,
        }
    }

    #[test]
    fn every_epoch_has_every_document_in_an_order_of_its_own() {
        let stop = Arc::new(AtomicBool::new(false));
        let documents: Vec<Document> =
            (0..50).map(|n| Document::plain(n.to_string(), String::new(), vec![n, n])).collect();
        let mut stream = ShuffledDocuments::new(documents, 2, 9, Arc::clone(&stop));
        let mut epoch = || -> Vec<u32> { (0..50).map(|_| next(&mut stream).unwrap().tokens()[0]).collect() };
        let (mut first, mut second) = (epoch(), epoch());
        assert_ne!(first, second);
        first.sort_unstable();
        second.sort_unstable();
        assert_eq!(first, second);
        assert_eq!(stream.next_document(0).unwrap(), Next::Ended);
        assert_eq!(stream.position(0).documents, 100);
        for taken in [0, 1, 49, 50, 51, 100] {
            let documents = stream.documents.to_vec();
            let (mut whole, resumed) = [0, taken]
                .map(|taken| ShuffledDocuments::new(documents.clone(), 2, 9, Arc::default()).after(taken))
                .into();
            (0..taken).for_each(|_| drop(next(&mut whole)));
            assert_eq!(
                (&whole.order, whole.next, whole.position(0)),
                (&resumed.order, resumed.next, resumed.position(0))
            );
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(stream.next_document(0).unwrap(), Next::Stopped);
    }
}
