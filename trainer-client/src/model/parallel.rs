//! Work over the cores, with results in the order of the work.
//!
//! Burn's CPU backend runs matrix products on all cores but elementwise operations on one. Cutting a batch into
//! groups of rows and running the groups side by side uses the cores for both, and a group's activations fit
//! the caches.

use std::num::NonZero;
use std::sync::{Mutex, OnceLock};
use std::thread;

use burn::tensor::Device;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::device::is_cpu;

/// Number of pieces of work to run side by side on a device: the host's cores, or 1 on an accelerator.
pub(super) fn workers(device: &Device) -> usize {
    if is_cpu(device) { thread::available_parallelism().map_or(1, NonZero::get) } else { 1 }
}

/// A pool of one thread for each core. Within one, Burn does not cut its operations into parts for all cores, which would
/// wait for one another where every core has work of its own; and memory that a thread frees is there for its next piece.
fn pools() -> &'static [ThreadPool] {
    static POOLS: OnceLock<Vec<ThreadPool>> = OnceLock::new();
    POOLS.get_or_init(|| {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        (0..cores).filter_map(|_| ThreadPoolBuilder::new().num_threads(1).build().ok()).collect()
    })
}

/// Applies `work` to every item on `workers` threads. Results come in the order of the items and do not depend
/// on which thread ran what.
pub(super) fn map<T: Send, R: Send>(workers: usize, items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    if workers <= 1 || items.len() <= 1 || pools().is_empty() {
        return items.into_iter().map(work).collect();
    }
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let threads = workers.min(items.len());
    let queue = Mutex::new(items.into_iter().zip(results.iter_mut()));
    let run = || {
        loop {
            // The guard must go before the work starts, so the lock is a statement of its own.
            let next = queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
            let Some((item, result)) = next else { break };
            *result = Some(work(item));
        }
    };
    // A panic in a thread is raised again here when the scope ends.
    thread::scope(|scope| {
        for pool in pools().iter().take(threads) {
            scope.spawn(|| pool.install(run));
        }
    });
    drop(queue);
    results.into_iter().flatten().collect()
}

/// Applies `work` to every item, as many at a time as the pool has threads in which this is called (one within [`map`]), and
/// `take` to each result, in the order of the items.
pub(super) fn in_waves<T: Send, R: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> R + Sync,
    mut take: impl FnMut(R),
) {
    let threads = rayon::current_num_threads();
    let mut items = items.into_iter();
    loop {
        let wave: Vec<T> = items.by_ref().take(threads).collect();
        match wave.len() {
            0 => break,
            1 => wave.into_iter().for_each(|item| take(work(item))),
            _ => wave.into_par_iter().map(&work).collect::<Vec<R>>().into_iter().for_each(&mut take),
        }
    }
}
