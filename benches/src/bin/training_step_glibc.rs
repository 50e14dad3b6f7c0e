//! The same steps as `training_step worker`, with the C library's allocator instead of mimalloc.

fn main() -> anyhow::Result<()> {
    sluice_benches::step::worker()
}
