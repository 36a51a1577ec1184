//! [`FastGate`]: what the crate's own gates offer the lane beyond [`Gate`].

use super::{Gate, Outcome, Pass, Times};
use crate::internal::time::Moment;
use crate::verdict::Verdict;

/// A gate that the lane calls directly. An indirect call costs as much as a whole uncontended permit.
pub(crate) trait FastGate: Gate {
    /// Whether the gate records operations that went well. A gate that does not is skipped on the way out.
    const RECORDS_SUCCESS: bool = true;
    /// Whether a pass can become invalid during a wait: the gate has a [`still`](Gate::still) of its own.
    const REVALIDATES: bool = false;

    /// Admits the call if that takes no wait, no lock and no user code. `None` leaves the decision to [`Gate::enter`].
    fn enter_now(&self, cost: u32, now: Moment) -> Option<Pass>;

    /// Takes the pass back after an operation that went well.
    #[inline]
    fn leave_well(&self, pass: Pass, verdict: Verdict, times: Times) {
        self.leave_as(pass, &Outcome::Judged(verdict, times));
    }

    /// Takes the pass back: [`Gate::leave`] without a copy of the outcome.
    #[inline]
    fn leave_as(&self, pass: Pass, outcome: &Outcome) {
        self.leave(pass, *outcome);
    }
}
