//! The semaphore of one key among many, and the look without a step inside.

use std::sync::Arc;

use super::word::{WAITERS, Word};
use super::{Semaphore, Shared};
use crate::error::{Reason, Refusal};
use crate::gate::Needs;
use crate::internal::queue::Queue;
use crate::internal::sync::{AtomicU64, Mutex};
use crate::internal::time::Moment;
use crate::keyed::PerKey;

impl PerKey for Semaphore {
    const NEEDS: Needs = Needs::Nothing;

    fn another(&self) -> Self {
        Self(Arc::new(Shared {
            word: AtomicU64::new(Word::of(self.limit()).0),
            queue: Mutex::new(Queue::new()),
            progress: AtomicU64::new(0),
            max_queue: self.0.max_queue,
            max_wait: self.0.max_wait,
            name: self.0.name.clone(),
        }))
    }

    /// Nothing held, nobody waits, not closed.
    fn is_fresh(&self, _: Moment) -> bool {
        let word = self.read();
        word.0 < WAITERS && word.in_use() == 0
    }

    /// The limit.
    fn adopt(&self, settings: &Self) {
        let fits = self.resize(settings.limit());
        debug_assert!(fits.is_ok(), "the limit of a semaphore is allowed");
    }
}

impl Semaphore {
    pub(super) fn look_at(&self, cost: u32) -> Result<(), Refusal> {
        let word = self.read();
        let reason = if word.is_closed() {
            Reason::Closed
        } else if cost > word.limit() {
            Reason::CostAboveLimit { cost, limit: word.limit() }
        } else if word.has_waiters() || cost > word.available() {
            Reason::Busy
        } else {
            return Ok(());
        };
        Err(Refusal::by(self.0.name.clone(), reason))
    }
}
