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
    /// Looks at about so many entries, some of each part in turn, and gives up those that are as good as new.
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
