//! What somebody else knows and may never tell: asked on a thread of its own, so that whoever wants it has the last answer
//! and waits for none.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Between an answer and the next question.
const PAUSE: Duration = Duration::from_secs(5);

type Last<T> = Mutex<Option<(T, Instant)>>;

/// The last answer. The asking ends with this value, once the question under way has its answer.
#[derive(Debug)]
pub struct LastAnswer<T>(Arc<Last<T>>);

impl<T: Copy + Send + 'static> LastAnswer<T> {
    /// Asks again and again, on a thread of this name.
    pub fn start(name: &str, ask: impl FnMut() -> Option<T> + Send + 'static) -> Self {
        let last = Arc::new(Mutex::default());
        let weak = Arc::downgrade(&last);
        if let Err(error) = Builder::new().name(name.to_owned()).spawn(move || keep_asking(&weak, ask)) {
            tracing::warn!(%error, name, "cannot start a thread");
        }
        Self(last)
    }

    /// The last answer and its age; none where there was none yet.
    pub fn seen(&self) -> Option<(T, Duration)> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.map(|(answer, at)| (answer, at.elapsed()))
    }
}

fn keep_asking<T>(last: &Weak<Last<T>>, mut ask: impl FnMut() -> Option<T>) {
    while last.strong_count() > 0 {
        if let (Some(answer), Some(last)) = (ask(), last.upgrade()) {
            *last.lock().unwrap_or_else(PoisonError::into_inner) = Some((answer, Instant::now()));
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_who_does_not_answer() {
        let (answers, asked) = std::sync::mpsc::channel();
        let last = LastAnswer::start("test", move || asked.recv().ok());
        assert_eq!(last.seen(), None);
        answers.send(7).expect("it asks");
        let begun = Instant::now();
        while last.seen().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the answer is not taken");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(last.seen().map(|(answer, _)| answer), Some(7));
    }
}
