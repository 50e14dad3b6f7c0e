//! What concerns a whole process: its CPU time from /proc, the signals that ask it to stop, the memory that it keeps.

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;

use crate::failure::Failure;

/// Milliseconds after which mimalloc gives freed memory back to the kernel, -1 for never; it looks at the variable as the
/// process begins. Its own 10 ms are shorter than a step, which then had its memory zeroed anew by the kernel: a quarter of
/// its time (ops/adr/0014-memory-stays.md).
const PURGE_DELAY: &str = "MIMALLOC_PURGE_DELAY";

/// Has mimalloc keep what is freed, unless the caller has chosen. To be called first of all, by programs whose allocator it
/// is: a process cannot safely change its own environment, so it begins again with another. Where that fails it is only
/// slower.
pub fn keep_freed_memory() {
    if std::env::var_os(PURGE_DELAY).is_none()
        && let Ok(this) = std::env::current_exe()
    {
        let mut arguments = std::env::args_os();
        let _ = Command::new(this)
            .arg0(arguments.next().unwrap_or_default())
            .args(arguments)
            .env(PURGE_DELAY, "-1")
            .exec();
    }
}

/// A flag that the first SIGINT or SIGTERM sets; a second one ends the process at once.
pub fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for (signal, code) in [(signal_hook::consts::SIGINT, 130), (signal_hook::consts::SIGTERM, 143)] {
        // Registered first, so that it still sees the flag unset when the first signal arrives.
        signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(|error| Failure::Usage(format!("cannot listen for signal {signal}: {error}")))?;
    }
    Ok(stop)
}

/// User and system time of a process so far, in seconds, all its threads together.
pub fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    /// The kernel's unit for user space on every Linux.
    const TICKS_PER_SECOND: f64 = 100.0;
    let path = format!("/proc/{process}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let ticks = || {
        // The command's name may hold blanks and parentheses.
        let (_, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        // Fields 14 and 15 of proc_pid_stat(5); the first two were cut off.
        Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
    };
    Ok(ticks().with_context(|| format!("{path} names no CPU time"))? / TICKS_PER_SECOND)
}

/// As [`cpu_seconds`] of this process; 0 where the system does not say.
pub fn own_cpu_seconds() -> f64 {
    cpu_seconds(std::process::id()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::own_cpu_seconds;

    #[test]
    fn work_takes_cpu_time_and_sleep_does_not() {
        let before = own_cpu_seconds();
        let started = Instant::now();
        while started.elapsed() < Duration::from_millis(200) {
            std::hint::black_box(started.elapsed());
        }
        assert!(own_cpu_seconds() - before >= 0.02, "{before} s before, {} s after", own_cpu_seconds());
    }
}
