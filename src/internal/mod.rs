//! Plumbing that no user names: the clock, the waiter queue, striped counters, random numbers, the loom facade.

pub(crate) mod queue;
pub(crate) mod rng;
pub(crate) mod seldom;
pub(crate) mod slab;
pub(crate) mod stripe;
pub(crate) mod sync;
pub(crate) mod time;
pub(crate) mod window;
