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

    /// Takes so many whether they are there or not: how many that were.
    fn charge(&mut self, now: Moment, tokens: u64) -> u64;

    /// Dates back what lies further ahead than it could be: another runtime's clock is ahead.
    /// Whether there was anything to date back.
    fn heal(&mut self, now: Moment) -> bool;

    fn facts(&mut self, now: Moment) -> Facts;
}

/// A ledger, and what it will be when everybody who waits has been served.
///
/// Without that, each arrival would play the whole queue forward to know when its turn comes.
#[derive(Clone, Debug)]
pub(super) struct Planned<L> {
    pub(super) ledger: L,
    /// With the moment at which the last one is served. Made when it is asked for, and forgotten when the queue or the
    /// ledger changes in another way than it foresees.
    plan: Option<(L, Moment)>,
}

impl<L> Planned<L> {
    pub(super) const fn new(ledger: L) -> Self {
        Self { ledger, plan: None }
    }
}

/// A [`Ledger`] as a meter.
#[derive(Debug)]
pub(super) struct UnderLock<L>(PhantomData<fn() -> L>);

impl<L> UnderLock<L> {
    pub(super) const METER: Self = Self(PhantomData);
}

impl<L: Ledger> Meter for UnderLock<L> {
    type Locked = Planned<L>;
    const IN_STEPS: bool = true;

    fn largest(&self, locked: &Planned<L>) -> u32 {
        u32::try_from(locked.ledger.largest()).unwrap_or(u32::MAX)
    }

    fn heal(&self, locked: &mut Planned<L>, now: Moment) {
        if locked.ledger.heal(now) {
            locked.plan = None;
        }
    }

    fn take(&self, locked: &mut Planned<L>, now: Moment, cost: u32) -> Take {
        locked.ledger.take(now, cost.into())
    }

    fn due(&self, locked: &mut Planned<L>, queue: &Queue, now: Moment, cost: u32) -> Moment {
        if queue.is_empty() {
            return locked.ledger.when(now, cost.into());
        }
        let largest = self.largest(locked);
        let Planned { ledger, plan } = locked;
        let (plan, at) = plan.get_or_insert_with(|| {
            let (mut plan, mut at) = (ledger.clone(), now);
            // A waiter that asks for more than there will ever be is sent away on reaching the head.
            for need in queue.needs().filter(|need| *need <= largest) {
                at = plan.take_when_due(at, need.into());
            }
            (plan, at)
        });
        plan.when((*at).max(now), cost.into())
    }

    fn queued(&self, locked: &mut Planned<L>, due: Moment, cost: u32) {
        if let Some((plan, at)) = &mut locked.plan {
            *at = plan.take_when_due(due, cost.into());
        }
    }

    fn disturbed(&self, locked: &mut Planned<L>) {
        locked.plan = None;
    }

    fn undo(&self, locked: &mut Planned<L>, taken: u64, cost: u32) {
        locked.ledger.undo(taken, cost.into());
    }

    fn put_back(&self, locked: &mut Planned<L>, now: Moment, taken: Option<u64>, tokens: u32) {
        match taken {
            Some(taken) => locked.ledger.undo(taken, tokens.into()),
            None => locked.ledger.put_back(now, tokens.into()),
        }
    }

    fn charge(&self, locked: &mut Planned<L>, now: Moment, tokens: u32) -> u32 {
        locked.ledger.charge(now, tokens.into()) as u32
    }

    fn facts(&self, locked: &mut Planned<L>, now: Moment) -> Facts {
        locked.ledger.facts(now)
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

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;

    /// One a second, each counted as a step of work.
    #[derive(Clone, Debug)]
    struct Steps {
        free: Moment,
        work: Arc<AtomicU32>,
    }

    impl Ledger for Steps {
        fn largest(&self) -> u64 {
            1
        }

        fn take(&mut self, now: Moment, _: u64) -> Take {
            self.work.fetch_add(1, Relaxed);
            if now < self.free {
                return Take::At(self.free);
            }
            self.free = now.plus_nanos(1_000_000_000);
            Take::Now(0)
        }

        fn undo(&mut self, _: u64, _: u64) {}

        fn put_back(&mut self, _: Moment, _: u64) {}

        fn charge(&mut self, _: Moment, _: u64) -> u64 {
            0
        }

        fn heal(&mut self, _: Moment) -> bool {
            false
        }

        fn facts(&mut self, _: Moment) -> Facts {
            Facts { limit: 1, remaining: 0, window: 1_000_000_000, reset: self.free }
        }
    }

    /// Each arrival played the whole queue forward: 20,000 of them took 200 million steps.
    #[test]
    fn an_arrival_costs_no_more_behind_a_long_queue_than_behind_a_short_one() {
        let (meter, work) = (UnderLock::<Steps>::METER, Arc::new(AtomicU32::new(0)));
        let mut locked = Planned::new(Steps { free: Moment::at(0), work: work.clone() });
        let mut queue = Queue::new();
        let now = Moment::at(0);
        assert!(matches!(meter.take(&mut locked, now, 1), Take::Now(_)));
        for arrival in 1..=20_000_u64 {
            meter.heal(&mut locked, now);
            let due = meter.due(&mut locked, &queue, now, 1);
            assert_eq!(due, now.plus_nanos(arrival * 1_000_000_000));
            // Every second one is refused, for whatever reason.
            if arrival % 2 == 0 {
                assert_eq!(meter.due(&mut locked, &queue, now, 1), due);
            }
            meter.queued(&mut locked, due, 1);
            queue.push(1, Moment::NEVER, None);
        }
        let steps = work.load(Relaxed);
        assert!(steps < 5 * 20_000, "{steps} steps for 20,000 arrivals");
    }
}
