//! Machines that lie wholly under the queue's lock.

use std::fmt;
use std::marker::PhantomData;

use super::pace::Take;
use super::shell::{Facts, Meter};
use crate::internal::queue::Queue;
use crate::internal::time::Moment;

/// A count that says when so many more may go. All it is asked takes a moment; one before the latest counts as that.
pub(super) trait Ledger: Clone + fmt::Debug + Send + 'static {
    /// The most that one call can cost, if ever so patient.
    fn largest(&self) -> u64;

    /// Takes so many, at least 1 and no more than the largest; or says when they would be there, and changes nothing.
    fn take(&mut self, now: Moment, cost: u64) -> Take;

    /// When so many would be there, `now` if they are. Changes nothing. For a long ledger a copy is to be avoided.
    fn when(&mut self, now: Moment, cost: u64) -> Moment {
        match self.clone().take(now, cost) {
            Take::Now(_) => now,
            Take::At(due) => due,
        }
    }

    /// Undoes a taking, or a part of it, by its note.
    fn undo(&mut self, taken: u64, cost: u64);

    /// Puts back what was taken at some time, so that nothing counts for a shorter time than it should.
    fn put_back(&mut self, now: Moment, tokens: u64);

    /// Takes so many whether they are there or not.
    fn charge(&mut self, now: Moment, tokens: u64);

    fn facts(&mut self, now: Moment) -> Facts;
}

/// A [`Ledger`] as a meter.
#[derive(Debug)]
pub(super) struct UnderLock<L>(PhantomData<fn() -> L>);

impl<L> UnderLock<L> {
    pub(super) const METER: Self = Self(PhantomData);
}

impl<L: Ledger> Meter for UnderLock<L> {
    type Locked = L;

    fn largest(&self, ledger: &L) -> u32 {
        u32::try_from(ledger.largest()).unwrap_or(u32::MAX)
    }

    fn take(&self, ledger: &mut L, now: Moment, cost: u32) -> Take {
        ledger.take(now, cost.into())
    }

    /// Plays the queue forward on a copy. Who asks for more than there will ever be is sent away on reaching the head.
    fn due(&self, ledger: &mut L, queue: &Queue, now: Moment, cost: u32) -> Moment {
        if queue.is_empty() {
            return ledger.when(now, cost.into());
        }
        let mut plan = ledger.clone();
        let mut at = now;
        let largest = self.largest(ledger);
        for need in queue.needs().filter(|need| *need <= largest) {
            at = plan.take_when_due(at, need.into());
        }
        plan.take_when_due(at, cost.into())
    }

    fn undo(&self, ledger: &mut L, taken: u64, cost: u32) {
        ledger.undo(taken, cost.into());
    }

    fn put_back(&self, ledger: &mut L, now: Moment, taken: Option<u64>, tokens: u32) {
        match taken {
            Some(taken) => ledger.undo(taken, tokens.into()),
            None => ledger.put_back(now, tokens.into()),
        }
    }

    fn charge(&self, ledger: &mut L, now: Moment, tokens: u32) {
        ledger.charge(now, tokens.into());
    }

    fn facts(&self, ledger: &mut L, now: Moment) -> Facts {
        ledger.facts(now)
    }
}

/// What can be said with [`Ledger::take`] alone.
trait TakeWhenDue: Ledger {
    /// Takes so many at the first moment from `now` on at which they are there.
    fn take_when_due(&mut self, now: Moment, cost: u64) -> Moment {
        match self.take(now, cost) {
            Take::Now(_) => now,
            Take::At(due) => {
                let taken = self.take(due, cost);
                debug_assert!(matches!(taken, Take::Now(_)) || due == Moment::NEVER, "{self:?}");
                due
            }
        }
    }
}

impl<L: Ledger> TakeWhenDue for L {}
