//! The limiters of one key among many. The state of a bucket is one word as long as nobody waits at it.

use std::sync::Arc;

use super::ledger::{Planned, UnderLock};
use super::pace::{Pace, Take};
use super::word::{Book, Word};
use super::{LeakyBucket, Quota, SlidingWindow, TokenBucket};
use crate::call::Call;
use crate::error::Reason;
use crate::gate::Needs;
use crate::internal::time::Moment;
use crate::keyed::{PerKey, WordEntry};

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
                self.0.is_idle(|word, _| word.at_rest().is_some_and(|state| word.pace().is_full(state, now)))
            }

            /// The rate and the burst; the tokens that are there stay there.
            fn adopt(&self, settings: &Self) {
                let (new, now) = (settings.0.read(|word, _| word.pace()), Moment::now());
                self.0.change(|word, book| word.set_pace(book, now, new));
            }

            #[inline]
            fn word_take(&self, word: u64, cost: u32, now: Moment) -> Option<u64> {
                let pace = self.0.meter.pace();
                if cost.wrapping_sub(1) >= pace.burst { None } else { pace.take_now(word, now, cost) }
            }

            fn word_enter(&self, word: u64, cost: u32, now: Moment) -> WordEntry {
                let pace = self.0.meter.pace();
                if let Some(reason) = never(pace, cost) {
                    return WordEntry::Never(reason);
                }
                // What a paced bucket owes can't be told from what a clock that is ahead has left there.
                let word = if $paced { word } else { pace.healed(word, now, 0) };
                match pace.take(word, now, 0, cost) {
                    Take::Now(word) => WordEntry::In(word),
                    Take::At(due) => WordEntry::Later(due),
                }
            }

            fn word_wait(&self, call: &Call, due: Moment) -> Option<Reason> {
                self.0.why_not_wait(call, due, 0)
            }

            fn word_undo(&self, word: u64, taken: Moment, cost: u32) -> u64 {
                let (pace, now) = (self.0.meter.pace(), Moment::now());
                let (units, _) = Book::default().refund(pace, taken, now, cost);
                pace.refunded(word, now, units)
            }

            fn word_is_fresh(&self, word: u64, now: Moment) -> bool {
                self.0.meter.pace().is_full(word, now)
            }

            fn word_for(&self, word: u64, now: Moment, new: &Self) -> u64 {
                self.0.meter.pace().convert(word, now, new.0.meter.pace())
            }

            fn word_into(&self, word: u64) -> Self {
                let pace = self.0.read(|word, _| word.pace());
                Self(Arc::new(self.0.another(Word::<$paced>::in_state(pace, word), Book::default())))
            }

            /// A debt above the burst is known to the gate only.
            fn word_of(&self, gate: &Self) -> Option<u64> {
                let owes = gate.0.read(|_, book| book.owes());
                gate.0.meter.at_rest().filter(|_| !owes && gate.0.meter.pace() == self.0.meter.pace())
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
                let ledger = self.0.read(|_, locked| locked.ledger.another(now));
                Self(Arc::new(self.0.another(UnderLock::METER, Planned::new(ledger))))
            }

            /// Nothing counts, and nobody waits.
            fn is_fresh(&self, now: Moment) -> bool {
                self.0.is_idle(|_, locked| locked.ledger.is_fresh(now))
            }

            /// What was taken still counts.
            fn adopt(&self, settings: &Self) {
                let (new, now) = (settings.0.read(|_, locked| locked.ledger.clone()), Moment::now());
                self.0.change(|_, locked| locked.ledger.adopt(now, &new));
            }
        }
    };
}
under_lock!(SlidingWindow);
under_lock!(Quota);
