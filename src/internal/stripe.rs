//! Which stripe of a striped counter a thread writes to: one that is its own while it lives, or the shared one.
//!
//! A word that only one thread writes needs no locked instruction, which is most of what counting costs. So as many
//! threads as there are cores, some more, and no more than [`MOST`], get a number that nobody else has; the others share
//! [`SHARED`]. A number that comes free when its thread ends goes to the next that asks: releasing and claiming it is
//! what lets the new owner see what the old one wrote.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The stripe of all who own none.
pub(crate) const SHARED: usize = 0;
/// Of threads beside those of a runtime that has one for each core: that which started it, and one for the service.
const SPARE: usize = 2;
/// More stripes than this cost more to read than they save.
const MOST: usize = 16;
/// A thread that has not asked yet.
const UNASKED: usize = usize::MAX;

/// A bit for each number that is taken.
static TAKEN: AtomicU32 = AtomicU32::new(1 << SHARED);

std::thread_local! {
    static OWN: Cell<usize> = const { Cell::new(UNASKED) };
    static CLAIM: Cell<Option<Claim>> = const { Cell::new(None) };
}

/// How many stripes there are, the shared one included.
pub(crate) fn count() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    if cfg!(resile_loom) {
        return 1;
    }
    *COUNT.get_or_init(|| {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        (cores + SPARE).min(MOST) + 1
    })
}

/// The stripe of this thread.
#[inline]
pub(crate) fn own() -> usize {
    match OWN.get() {
        UNASKED => ask(),
        own => own,
    }
}

#[cold]
fn ask() -> usize {
    let free = |taken: u32| (SHARED + 1..count()).find(|number| taken & 1 << number == 0);
    let take = |taken| free(taken).map(|number| taken | 1 << number);
    let number = match TAKEN.fetch_update(Ordering::Acquire, Ordering::Relaxed, take) {
        Ok(before) => free(before).unwrap_or(SHARED),
        Err(_) => SHARED,
    };
    OWN.set(number);
    if number != SHARED {
        let claim = Claim(number);
        // A thread that is being torn down keeps nothing: the claim ends right here.
        let _kept = CLAIM.try_with(move |kept| kept.set(Some(claim)));
    }
    OWN.get()
}

/// A number that is given up with its thread.
struct Claim(usize);

impl Drop for Claim {
    fn drop(&mut self) {
        // Whoever still counts on this thread shares.
        OWN.set(SHARED);
        TAKEN.fetch_and(!(1 << self.0), Ordering::Release);
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn no_two_living_threads_own_one_stripe_and_a_dead_one_owns_none() {
        for _ in 0..50 {
            let threads = 24;
            let barrier = Barrier::new(threads);
            let owned: Vec<usize> = std::thread::scope(|scope| {
                let asked = || {
                    let own = own();
                    barrier.wait();
                    own
                };
                let handles: Vec<_> = (0..threads).map(|_| scope.spawn(asked)).collect();
                handles.into_iter().map(|handle| handle.join().expect("no panic")).collect()
            });
            let mut own: Vec<usize> = owned.into_iter().filter(|own| *own != SHARED).collect();
            own.sort_unstable();
            assert!(own.iter().all(|own| *own < count()));
            assert!(own.windows(2).all(|pair| pair[0] < pair[1]), "{own:?}");
        }
    }
}
