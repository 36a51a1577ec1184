//! The atomics and the mutex that the machines stand on: the standard ones, or loom's under `--cfg resile_loom`.
//!
//! The cfg has a name of its own because other crates in a tree react to plain `loom`.

#[cfg(not(resile_loom))]
mod imp {
    pub(crate) use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64};

    pub(crate) use parking_lot::{Mutex, MutexGuard};
}

#[cfg(resile_loom)]
mod imp {
    pub(crate) use loom::sync::MutexGuard;
    pub(crate) use loom::sync::atomic::{AtomicI64, AtomicU8, AtomicU64};

    /// Loom's mutex with the signature of `parking_lot`'s: no poisoning.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}

pub(crate) use imp::*;
pub(crate) use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
