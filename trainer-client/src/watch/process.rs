//! CPU time of a process, from /proc.

use anyhow::Context;

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
