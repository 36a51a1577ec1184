//! Room for a key that is new: a hand that goes round and gives up what is as good as new.

use std::sync::Arc;

use smallvec::SmallVec;

use super::PerKey;
use super::enter::Shared;
use super::shard::{Rest, Shard, Waste};
use crate::internal::sync::{MutexGuard, Relaxed};
use crate::internal::time::Moment;

/// How many entries are looked at for one that can be given up, when a new key finds the table full.
pub(super) const STEPS: u32 = 64;
/// How many of them, if their gates have to be asked.
pub(super) const ASKED: usize = 8;

impl<G: PerKey> Shared<G> {
    /// Checks about `entries` entries, some of each shard in turn, and evicts those in their default state.
    pub(super) fn sweep(&self, entries: u32) -> u32 {
        let now = Moment::now();
        let at_once = if G::IN_A_WORD { STEPS } else { ASKED as u32 };
        let entries = entries.min(self.capacity);
        let (mut looked, mut evicted) = (0, 0);
        while looked < entries {
            let number = self.sweeper.fetch_add(1, Relaxed) as usize % self.shards.len();
            let steps = at_once.min(entries - looked);
            looked += steps;
            let mut waste = Waste::new();
            let shard = self.shards[number].lock();
            let (shard, some) = self.give_up(number as u32, shard, (steps, steps), now, &mut waste);
            drop(shard);
            evicted += some;
        }
        evicted
    }

    /// Looks at up to so many entries and gives up so many of those that are as good as new. It may let go of the lock
    /// in between.
    pub(super) fn give_up<'a>(
        &'a self,
        number: u32,
        mut shard: MutexGuard<'a, Shard<G>>,
        (steps, want): (u32, u32),
        now: Moment,
        waste: &mut Waste<G>,
    ) -> (MutexGuard<'a, Shard<G>>, u32) {
        let mut evicted = 0;
        let mut asked: SmallVec<[(u32, u64, Arc<G>); ASKED]> = SmallVec::new();
        for _ in 0..steps {
            if evicted == want || asked.len() == ASKED {
                break;
            }
            let slot = shard.table.advance();
            match shard.rest(slot, now) {
                Rest::Busy => {}
                Rest::Fresh => {
                    shard.evict(slot, waste);
                    evicted += 1;
                }
                Rest::Ask(touched, gate) => asked.push((slot, touched, gate)),
            }
        }
        if evicted == want || asked.is_empty() {
            return (shard, evicted);
        }
        drop(shard);
        // The handles go before the lock is taken again: another may have given the gates up meanwhile.
        let fresh = asked.into_iter().filter(|(_, _, gate)| gate.is_fresh(now));
        let fresh: SmallVec<[(u32, u64); ASKED]> = fresh.map(|(slot, touched, _)| (slot, touched)).collect();
        let mut shard = self.shards[number as usize].lock();
        for (slot, touched) in fresh {
            if evicted < want && shard.is_untouched(slot, touched) {
                shard.evict(slot, waste);
                evicted += 1;
            }
        }
        (shard, evicted)
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::time::Duration;

    use super::ASKED;
    use crate::call::Call;
    use crate::gate::{Entry, Gate, Outcome, Pass};
    use crate::internal::time::Moment;
    use crate::keyed::{Keyed, OneKey, PerKey};
    use crate::rate::TokenBucket;
    use crate::semaphore::Semaphore;
    use crate::{Guard, Reason, Refusal};

    /// The bounds that are stated on the module's page.
    const LET_IN: usize = 32;
    const KNOWN: usize = 96;
    const NEW: usize = 256;
    const NEW_AND_FULL: usize = 288;

    /// What a decision comes to, and what it looked at.
    fn decide<G: PerKey, R>(keyed: &Keyed<G>, key: u64, decide: impl FnOnce(OneKey<G>) -> R) -> (R, usize) {
        let looked = || keyed.0.shards.iter().map(|shard| shard.lock().table.looked()).sum::<usize>();
        looked();
        let decided = decide(keyed.of(key));
        (decided, looked())
    }

    #[allow(clippy::needless_pass_by_value, reason = "what is to be decided is given the key")]
    fn take(key: OneKey<TokenBucket>) -> Result<(), Refusal> {
        key.try_take(1)
    }

    fn buckets(capacity: u32) -> Keyed<TokenBucket> {
        Keyed::by("tenant", TokenBucket::per_second(1000).burst(2)).capacity(capacity).build().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn no_decision_of_a_flood_looks_at_more_than_is_stated() {
        const KEYS: u64 = 300_000;
        let keyed = buckets(20_000);
        let (mut most, mut full) = ([0; 2], 0);
        for key in 0..KEYS {
            let (took, looked) = decide(&keyed, key, take);
            // Before that no part is full.
            let may_be_full = usize::from(key >= 16_000);
            most[may_be_full] = most[may_be_full].max(looked);
            match took.map_err(|no| no.reason()) {
                Ok(()) => {}
                Err(Reason::KeySpaceFull) => full += 1,
                Err(other) => panic!("{other:?}"),
            }
            if key % 40_000 == 0 {
                tokio::time::advance(Duration::from_millis(1)).await;
            }
        }
        assert!(full > KEYS / 4 && full < KEYS - KEYS / 4, "{full} found no room");
        assert!(most[0] <= NEW && most[1] <= NEW_AND_FULL, "{most:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn no_decision_on_a_known_key_looks_at_more_than_is_stated() {
        let keyed = buckets(20_000);
        let keys: Vec<u64> = (0..20_000).filter(|key| keyed.try_take(*key, 1).is_ok()).collect();
        assert!(keys.len() > 18_000);
        let most = |is_ok: bool| {
            let looks = keys.iter().map(|key| {
                let (took, looked) = decide(&keyed, *key, take);
                assert_eq!(took.is_ok(), is_ok);
                looked
            });
            looks.max().unwrap_or(0)
        };
        assert!(most(true) <= LET_IN);
        assert!(most(false) <= KNOWN);
        for change in [0, 1] {
            tokio::time::advance(Duration::from_millis(1)).await;
            if change == 0 {
                keyed.plan().set(TokenBucket::per_second(1000).burst(3)).unwrap();
            } else {
                keyed.reassign();
            }
            assert!(most(true) <= KNOWN);
            assert!(most(false) <= KNOWN);
        }
    }

    /// The same for gates that have to be asked, and that hold a pass for a while.
    #[tokio::test(start_paused = true)]
    async fn no_decision_on_gates_that_have_to_be_asked_looks_at_more_than_is_stated() {
        let keyed = Keyed::by("tenant", Semaphore::permits(1)).capacity(500).build().unwrap();
        let mut held: Vec<Guard> = Vec::new();
        let mut full = 0;
        for key in 0..50_000_u64 {
            let (guard, looked) = decide(&keyed, key, |key| key.try_acquire());
            assert!(looked <= NEW_AND_FULL, "{looked}");
            match guard.map_err(|no| no.reason()) {
                Ok(guard) => held.push(guard),
                Err(Reason::KeySpaceFull) => full += 1,
                Err(other) => panic!("{other:?}"),
            }
            if key % 700 == 0 {
                held.clear();
            }
        }
        assert!(full > 0);
        drop(held);
        assert_eq!(keyed.stats().pinned, 0);
    }

    /// Never fresh, and counts how often it was asked.
    struct Stubborn(Arc<AtomicUsize>);

    impl Gate for Stubborn {
        fn enter(&self, _: &Call) -> Entry {
            Entry::Pass(Pass::default())
        }

        fn leave(&self, _: Pass, _: Outcome) {}
    }

    impl PerKey for Stubborn {
        fn another(&self) -> Self {
            Self(self.0.clone())
        }

        fn is_fresh(&self, _: Moment) -> bool {
            self.0.fetch_add(1, Relaxed);
            false
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_gates_are_asked_for_a_new_key_than_is_stated() {
        let asked = Arc::new(AtomicUsize::new(0));
        let keyed = Keyed::by("tenant", Stubborn(asked.clone())).capacity(100).build().unwrap();
        let full = (0..200_u64).filter(|key| keyed.of(*key).try_acquire().is_err()).count();
        assert_eq!((full, asked.load(Relaxed)), (100, 100 * ASKED));
    }
}
