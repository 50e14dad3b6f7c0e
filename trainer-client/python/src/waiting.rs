//! Waits that Ctrl-C ends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

/// Longest wait between looks at whether Ctrl-C was pressed.
const POLL: Duration = Duration::from_millis(50);

/// Runs what may wait for long, on a thread of its own and without the GIL, while this one looks for Ctrl-C; then, or after
/// `limit`, `stop` is set until the other has given up. After Ctrl-C the exception is raised.
pub(crate) fn interruptible<T: Send>(
    py: Python<'_>,
    stop: &AtomicBool,
    limit: Option<Duration>,
    run: impl FnOnce() -> T + Send,
) -> PyResult<T> {
    py.detach(|| {
        std::thread::scope(|scope| {
            let (done, is_done) = mpsc::sync_channel::<()>(0);
            let running = scope.spawn(move || {
                let outcome = run();
                drop(done);
                outcome
            });
            let (begun, mut is_over) = (Instant::now(), false);
            let mut interrupted = Ok(());
            while let Err(mpsc::RecvTimeoutError::Timeout) = is_done.recv_timeout(POLL) {
                if interrupted.is_ok() {
                    #[allow(
                        clippy::redundant_closure_for_method_calls,
                        reason = "the method alone has one lifetime"
                    )]
                    let checked = Python::attach(|py| py.check_signals());
                    interrupted = checked;
                }
                if !is_over && (interrupted.is_err() || limit.is_some_and(|limit| begun.elapsed() > limit)) {
                    // Unless somebody else has set it, for good.
                    is_over =
                        stop.compare_exchange(false, true, Ordering::Relaxed, Ordering::Relaxed).is_ok();
                }
            }
            let outcome = running.join();
            if is_over {
                stop.store(false, Ordering::Relaxed);
            }
            interrupted?;
            outcome.map_err(|_| {
                PyRuntimeError::new_err("the feed panicked: this is a fault of sluice_feed; see its message")
            })
        })
    })
}
