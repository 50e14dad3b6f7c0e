//! `sluice-train`: only wires; see `sluice_trainer::cli`.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

// A step allocates and frees tensors of megabytes many times; glibc gives them back to the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Milliseconds after which mimalloc gives freed memory back to the kernel, -1 for never; it looks at the variable as the
/// process begins. Its own 10 ms are shorter than a step, which then had its memory zeroed anew by the kernel: a quarter of
/// its time (ops/adr/0014-memory-stays.md).
const PURGE_DELAY: &str = "MIMALLOC_PURGE_DELAY";

fn main() -> ExitCode {
    if std::env::var_os(PURGE_DELAY).is_none()
        && let Ok(this) = std::env::current_exe()
    {
        // A process cannot safely change its own environment, so it begins again with another. Where that fails it is
        // only slower.
        let mut arguments = std::env::args_os();
        let _ = Command::new(this)
            .arg0(arguments.next().unwrap_or_default())
            .args(arguments)
            .env(PURGE_DELAY, "-1")
            .exec();
    }
    sluice_trainer::cli::main(std::env::args_os())
}
