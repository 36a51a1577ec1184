//! The limiters of one key among many. The state of a bucket is one word as long as nobody waits at it.

use std::sync::Arc;

use super::ledger::UnderLock;
use super::pace::{Pace, Take};
use super::word::Word;
use super::{LeakyBucket, Quota, SlidingWindow, TokenBucket};
use crate::call::Call;
use crate::error::Reason;
use crate::gate::Needs;
use crate::internal::time::Moment;
use crate::keyed::PerKey;

/// Why a call of this cost is never let in.
fn never(pace: Pace, cost: u32) -> Option<Reason> {
    let limit = pace.largest();
    match cost {
        0 => Some(Reason::ZeroCost),
        cost if cost > limit => Some(Reason::CostAboveLimit { cost, limit }),
        _ => None,
    }
}

macro_rules! in_a_word {
    ($bucket:ident, $paced:literal) => {
        impl PerKey for $bucket {
            const NEEDS: Needs = Needs::Now;
            const IN_A_WORD: bool = true;

            fn another(&self) -> Self {
                self.word_into(0)
            }

            /// Full, and nobody waits.
            fn is_fresh(&self, now: Moment) -> bool {
                self.0.is_idle(|word, ()| word.at_rest().is_some_and(|state| word.pace().is_full(state, now)))
            }

            /// The rate and the burst; the tokens that are there stay there.
            fn adopt(&self, settings: &Self) {
                let (new, now) = (settings.0.read(|word, ()| word.pace()), Moment::now());
                self.0.change(|word, ()| word.set_pace(now, new));
            }

            #[inline]
            fn word_take(&self, word: u64, cost: u32, now: Moment) -> Option<u64> {
                let pace = self.0.meter.pace();
                if cost.wrapping_sub(1) >= pace.burst { None } else { pace.take_now(word, now, cost) }
            }

            fn word_refuse(&self, word: u64, call: &Call, patient: bool) -> Option<(Reason, Moment)> {
                let (pace, cost, now) = (self.0.meter.pace(), call.cost(), call.now());
                if let Some(reason) = never(pace, cost) {
                    return Some((reason, Moment::NEVER));
                }
                match pace.take(word, now, 0, cost) {
                    Take::Now(_) => None,
                    Take::At(due) if !patient => Some((Reason::Busy, due)),
                    Take::At(due) => self.0.why_not_wait(call, due, 0).map(|reason| (reason, due)),
                }
            }

            fn word_untake(&self, word: u64, cost: u32) -> u64 {
                self.0.meter.pace().put_back(word, cost)
            }

            fn word_is_fresh(&self, word: u64, now: Moment) -> bool {
                self.0.meter.pace().is_full(word, now)
            }

            fn word_for(&self, word: u64, now: Moment, new: &Self) -> u64 {
                self.0.meter.pace().convert(word, now, new.0.meter.pace())
            }

            fn word_into(&self, word: u64) -> Self {
                let pace = self.0.read(|word, ()| word.pace());
                Self(Arc::new(self.0.another(Word::<$paced>::in_state(pace, word), ())))
            }

            fn word_of(&self, gate: &Self) -> Option<u64> {
                gate.0.meter.at_rest().filter(|_| gate.0.meter.pace() == self.0.meter.pace())
            }
        }
    };
}
in_a_word!(TokenBucket, false);
in_a_word!(LeakyBucket, true);

macro_rules! under_lock {
    ($limiter:ident) => {
        impl PerKey for $limiter {
            const NEEDS: Needs = Needs::Now;

            fn another(&self) -> Self {
                let now = Moment::now();
                let ledger = self.0.read(|_, ledger| ledger.another(now));
                Self(Arc::new(self.0.another(UnderLock::METER, ledger)))
            }

            /// Nothing counts, and nobody waits.
            fn is_fresh(&self, now: Moment) -> bool {
                self.0.is_idle(|_, ledger| ledger.is_fresh(now))
            }

            /// What was taken still counts.
            fn adopt(&self, settings: &Self) {
                let (new, now) = (settings.0.read(|_, ledger| ledger.clone()), Moment::now());
                self.0.change(|_, ledger| ledger.adopt(now, &new));
            }
        }
    };
}
under_lock!(SlidingWindow);
under_lock!(Quota);
