//! How often, on this thread, a device was waited for and weights were cast: counted in tests alone, which say how often that is.

#[cfg(test)]
use std::cell::Cell;

#[cfg(test)]
thread_local! {
    static WAITS: Cell<u32> = const { Cell::new(0) };
    static CASTS: Cell<u32> = const { Cell::new(0) };
}

/// Values are copied from a device, which has to compute them first.
pub(super) fn count_wait() {
    #[cfg(test)]
    WAITS.set(WAITS.get() + 1);
}

/// A model's weights are cast.
pub(super) fn count_cast() {
    #[cfg(test)]
    CASTS.set(CASTS.get() + 1);
}

/// Waits and casts since this was asked last.
#[cfg(test)]
pub(super) fn counted() -> (u32, u32) {
    (WAITS.take(), CASTS.take())
}
