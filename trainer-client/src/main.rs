//! `sluice-train`: only wires; see `sluice_trainer::cli`.

use std::process::ExitCode;

// A step allocates and frees tensors of megabytes many times; glibc gives them back to the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    sluice_trainer::watch::process::keep_freed_memory();
    sluice_trainer::cli::main(std::env::args_os())
}
