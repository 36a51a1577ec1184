//! The token bucket of one key among many: its whole state is one word as long as nobody waits at it.

use std::sync::Arc;

use super::{BUSY, STATE, Shared, TokenBucket, WAITERS};
use crate::call::Call;
use crate::error::{Reason, Refusal};
use crate::gate::Needs;
use crate::internal::queue::Queue;
use crate::internal::sync::{Acquire, AtomicU64, Mutex};
use crate::internal::time::Moment;
use crate::keyed::PerKey;
use crate::rate::pace::{Pace, Take};

impl PerKey for TokenBucket {
    const NEEDS: Needs = Needs::Now;
    const IN_A_WORD: bool = true;

    fn another(&self) -> Self {
        self.word_into(0)
    }

    /// Full, and nobody waits.
    fn is_fresh(&self, now: Moment) -> bool {
        let still = self.0.queue.lock();
        let word = self.0.word.load(Acquire);
        still.is_empty() && word <= STATE && self.word_is_fresh(word, now)
    }

    /// The rate and the burst; the tokens that are there stay there.
    fn adopt(&self, settings: &Self) {
        let (new, now) = (settings.pace_at_rest(), Moment::now());
        let queue = self.0.queue.lock();
        self.set_pace(queue, new, now);
    }

    #[inline]
    fn word_take(&self, word: u64, cost: u32, now: Moment) -> Option<u64> {
        let pace = self.pace();
        if cost > pace.burst { None } else { pace.take_now(word, now, cost) }
    }

    fn word_refuse(&self, word: u64, call: &Call, patient: bool) -> Option<(Reason, Moment)> {
        let (pace, cost, now) = (self.pace(), call.cost(), call.now());
        if cost > pace.burst {
            return Some((Reason::CostAboveLimit { cost, limit: pace.burst }, Moment::NEVER));
        }
        match pace.take(word, now, 0, cost) {
            Take::Now(_) => None,
            Take::At(due) if !patient => Some((Reason::Busy, due)),
            Take::At(due) => {
                self.why_not_wait(call, due, now.plus_nanos(self.0.max_wait), 0).map(|reason| (reason, due))
            }
        }
    }

    fn word_untake(&self, word: u64, cost: u32) -> u64 {
        word.saturating_sub(self.pace().cost(cost))
    }

    fn word_is_fresh(&self, word: u64, now: Moment) -> bool {
        word <= self.pace().virtual_time(now)
    }

    fn word_for(&self, word: u64, now: Moment, new: &Self) -> u64 {
        self.pace().convert(word, now, new.pace())
    }

    fn word_into(&self, word: u64) -> Self {
        let pace = self.pace_at_rest();
        Self(Arc::new(Shared {
            word: AtomicU64::new(word),
            multiplier: AtomicU64::new(pace.multiplier),
            shape: AtomicU64::new(super::shape(pace)),
            queue: Mutex::new(Queue::new()),
            max_queue: self.0.max_queue,
            max_wait: self.0.max_wait,
            name: self.0.name.clone(),
        }))
    }

    fn word_of(&self, gate: &Self) -> Option<u64> {
        let word = gate.0.word.load(Acquire);
        (word & (WAITERS | BUSY) == 0 && gate.pace() == self.pace()).then_some(word)
    }
}

impl TokenBucket {
    /// The pace, not while it is being changed.
    fn pace_at_rest(&self) -> Pace {
        let _still = self.0.queue.lock();
        self.pace()
    }

    pub(super) fn look_at(&self, call: &Call) -> Result<(), Refusal> {
        let (cost, now) = (call.cost(), call.now());
        let word = self.0.word.load(Acquire);
        // A pace that is read half while it changes goes with no word that is still there.
        if word <= STATE && self.word_take(word, cost, now).is_some() && self.0.word.load(Acquire) == word {
            return Ok(());
        }
        let queue = self.0.queue.lock();
        let pace = self.pace();
        let (reason, due) = if cost > pace.burst {
            (Reason::CostAboveLimit { cost, limit: pace.burst }, now)
        } else {
            let ahead = queue.weight().saturating_mul(1 << pace.bits);
            match pace.take(self.0.word.load(Acquire) & STATE, now, ahead, cost) {
                Take::Now(_) if queue.is_empty() => return Ok(()),
                Take::Now(_) => (Reason::Busy, now),
                Take::At(due) => (Reason::Busy, due),
            }
        };
        drop(queue);
        let refusal = Refusal::by(self.0.name.clone(), reason);
        Err(if due > now { refusal.after(due.since(now)) } else { refusal })
    }
}
