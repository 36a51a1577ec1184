//! The atomics, the cell and the mutex that the machines stand on: the standard ones, or loom's under `--cfg resile_loom`.
//!
//! The cfg has a name of its own because other crates in a tree react to plain `loom`.

#[cfg(not(all(test, resile_loom)))]
mod imp {
    pub(crate) use std::sync::OnceLock;
    pub(crate) use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64};

    pub(crate) use parking_lot::{Mutex, MutexGuard};
}

#[cfg(all(test, resile_loom))]
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

    /// The standard cell, which is trusted to be set in one step: each use of it is a step of the model.
    #[derive(Debug)]
    pub(crate) struct OnceLock<T> {
        step: AtomicU8,
        cell: std::sync::OnceLock<T>,
    }

    impl<T> Default for OnceLock<T> {
        fn default() -> Self {
            Self { step: AtomicU8::new(0), cell: std::sync::OnceLock::new() }
        }
    }

    impl<T> OnceLock<T> {
        pub(crate) fn get(&self) -> Option<&T> {
            self.step.load(super::Acquire);
            self.cell.get()
        }

        pub(crate) fn set(&self, value: T) -> Result<(), T> {
            self.step.fetch_add(1, super::AcqRel);
            self.cell.set(value)
        }
    }
}

pub(crate) use imp::*;
pub(crate) use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
