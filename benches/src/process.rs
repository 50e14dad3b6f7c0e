//! CPU time and memory of a process, from /proc.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;

/// User and system time of a process so far, in seconds.
pub fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    Ok(stat(Path::new(&format!("/proc/{process}/stat")))?.1)
}

/// User and system time of a process's threads so far, in seconds, by their names. Threads that have ended are missing.
pub fn thread_cpu_seconds(process: u32) -> anyhow::Result<BTreeMap<String, f64>> {
    let mut seconds = BTreeMap::new();
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may end while we look.
        if let Ok((name, spent)) = stat(&thread?.path().join("stat")) {
            *seconds.entry(name).or_default() += spent;
        }
    }
    Ok(seconds)
}

/// Name, and user and system time in seconds, out of a file as `proc_pid_stat(5)` describes it.
fn stat(path: &Path) -> anyhow::Result<(String, f64)> {
    /// The kernel's unit for user space on every Linux.
    const TICKS_PER_SECOND: f64 = 100.0;
    let text = std::fs::read_to_string(path)?;
    let (head, fields) = text.rsplit_once(')').context("no command name in a stat file")?;
    let name = head.split_once('(').map_or("", |(_, name)| name);
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // Fields 14 and 15; the first two were cut off.
    Ok((name.to_owned(), (ticks(11) + ticks(12)) / TICKS_PER_SECOND))
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
