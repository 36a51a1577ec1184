//! The breaker of one key among many, and the look without a step inside.

use std::sync::Arc;

use tokio::sync::Notify;

use super::state::Machine;
use super::tally::Counts;
use super::{CircuitBreaker, Locked, Shared, State, word};
use crate::error::Refusal;
use crate::internal::sync::{AtomicU64, Relaxed};
use crate::internal::time::Moment;
use crate::keyed::PerKey;

impl PerKey for CircuitBreaker {
    fn another(&self) -> Self {
        let Shared { tally, rules, locked, listener, name, .. } = &*self.0;
        let machine = Machine::new(locked.lock().machine.settings().clone());
        Self(Arc::new(Shared {
            word: AtomicU64::new(word(State::Closed, machine.generation())),
            until: AtomicU64::new(Moment::NEVER.nanos()),
            streak: AtomicU64::new(0),
            tally: tally.another(),
            rules: rules.clone(),
            would_refuse: AtomicU64::new(0),
            locked: Locked::new(machine),
            changed: Notify::new(),
            listener: listener.clone(),
            name: name.clone(),
        }))
    }

    /// Closed, with nothing in its window, and no failures in a row if those count.
    fn is_fresh(&self, now: Moment) -> bool {
        let closed = self.0.locked.lock().machine.state() == State::Closed;
        let streak = self.0.rules.consecutive.is_none() || self.0.streak.load(Relaxed) == 0;
        closed && streak && self.0.tally.counts(now) == Counts::default()
    }
}

impl CircuitBreaker {
    pub(super) fn look_at(&self, now: Moment) -> Result<(), Refusal> {
        if self.enter_closed().is_some() || self.0.rules.observe_only {
            return Ok(());
        }
        let no = match self.decide_unlocked(now) {
            Some(decided) => decided.err(),
            None => self.change(|machine| {
                machine.tick(now);
                machine.look(now)
            }),
        };
        no.map_or(Ok(()), |no| Err(self.refusal(no, now)))
    }
}
