//! CPU time and memory of a process, from /proc.

use std::path::Path;

use anyhow::Context as _;

/// User and system time of a process so far, in seconds.
pub fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    /// The kernel's unit for user space on every Linux.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no command name in /proc/PID/stat")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // Fields 14 and 15 of proc_pid_stat(5); the first two were cut off.
    Ok((ticks(11) + ticks(12)) / TICKS_PER_SECOND)
}

/// Most memory that a process has had at one time, in bytes.
pub fn peak_bytes(process: u32) -> anyhow::Result<u64> {
    status(process, "VmHWM:")
}

/// Forgets this process's peak so far, so that [`peak_bytes`] is that of what follows.
pub fn forget_peak() -> anyhow::Result<()> {
    std::fs::write("/proc/self/clear_refs", "5").context("cannot reset the peak of resident memory")
}

/// Memory that a process has now, in bytes.
pub fn resident_bytes(process: u32) -> anyhow::Result<u64> {
    status(process, "VmRSS:")
}

fn status(process: u32, key: &str) -> anyhow::Result<u64> {
    let path = format!("/proc/{process}/status");
    let text = std::fs::read_to_string(Path::new(&path))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no {key}"))?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

/// The middle of `values`.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
