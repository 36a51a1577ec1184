//! A lane: one attempt's way in through the steps, and its outcome's way back out. What a lane holds, it gives back.
//!
//! ```text
//!             first poll             all steps passed
//!   Start ──────────────▶ Entering ───────────────────▶ Running
//!                         │  ▲  ▲                          │
//!           a gate says   ▼  │  └────── Again ◀── Backoff  │ the attempt is over
//!           to wait      Queued           ▲          ▲     ▼
//!                         │               └──────────┴── leave: a retry asks for another attempt,
//!             too late,   ▼                              or it is the end ──▶ Done
//!             cancelled  Left ──▶ leave
//! ```
//!
//! | file | what happens there |
//! | --- | --- |
//! | `enter` | the steps are entered, those that admit at once in one loop |
//! | `wait` | queues, pauses between attempts, and what ends a call meanwhile |
//! | `leave` | the steps are left, in one loop, and retries are asked |
//! | `end` | how an attempt ended, and how that is reported |
//! | `frames` | what each step keeps while the call is further in |
//!
//! 1. `frames[..depth]` belong to the steps that the call has passed: a timeout keeps the deadline from before, a retry
//!    its count, a gate its pass. Nothing else is held, but for the ticket of a gate whose queue the call stands in,
//!    which lies in `frames[depth]`.
//! 2. `depth` goes down before a pass is handed back, so no pass is handed back twice, whatever panics. It may go down by
//!    more than one where the steps between have nothing to do.
//! 3. A clock reading belongs to one poll. It is forgotten when the next begins, and read when somebody asks.

mod end;
mod enter;
mod frames;
mod leave;
mod wait;

use std::time::Duration;

use crate::call::Call;
use crate::context;
use crate::error::Stop;
use crate::gate::{Needs, Pass};
use crate::internal::time::Moment;
pub(crate) use end::End;
use frames::Frames;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not polled yet, and the caller has set nothing that could end it.
    Bare,
    /// Polled at least once; the task's context is not looked up again.
    StillBare,
    /// Not polled yet.
    Start,
    Done,
    /// Walking in, at step `depth`.
    Entering,
    /// In the queue of the gate at step `depth`.
    Queued,
    /// Left the queue without a pass.
    Left,
    /// Between two attempts, until `until`.
    Backoff,
    /// About to enter for another attempt.
    Again,
    /// All steps are passed.
    Running,
}

/// Where the way out led.
#[derive(Debug)]
pub(crate) enum Out {
    /// To a retry, which has scheduled another attempt.
    Again,
    /// To the caller.
    Caller(Stop),
}

/// What a pause ended with.
enum Woken {
    Due,
    Deadline,
    Cancelled,
}

/// Everything about a call but the operation itself.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each is one fact, and a byte is cheaper to set than a bit")]
pub(crate) struct Lane {
    call: Call,
    frames: Frames,
    /// The first poll; `NEVER` where no step reads the clock.
    begun: Moment,
    /// When the operation was made.
    started: Moment,
    /// When the attempt before was over.
    ended: Moment,
    /// The end of a backoff.
    until: Moment,
    /// How many times the operation was made.
    made: u32,
    depth: u32,
    phase: Phase,
    needs: Needs,
    /// The operation can't be made again.
    once: bool,
    /// The call stood in a queue or repeats an attempt, so an operation may come too late.
    waited: bool,
    /// The operation of this attempt was made: passes come back with its times.
    operating: bool,
    /// User code is running; still set in `drop`, it means a panic.
    in_user: bool,
}

impl Lane {
    #[inline]
    pub(crate) fn new(call: Call, once: bool) -> Self {
        let phase = if call.is_bare() { Phase::Bare } else { Phase::Start };
        Self {
            call,
            frames: Frames::none(),
            begun: Moment::NEVER,
            started: Moment::NEVER,
            ended: Moment::NEVER,
            until: Moment::NEVER,
            made: 0,
            depth: 0,
            phase,
            needs: Needs::Nothing,
            once,
            waited: false,
            operating: false,
            in_user: false,
        }
    }

    #[inline]
    pub(crate) fn call(&self) -> &Call {
        &self.call
    }

    pub(crate) fn call_mut(&mut self) -> &mut Call {
        self.phase = Phase::Start;
        &mut self.call
    }

    pub(crate) fn made(&self) -> u32 {
        self.made
    }

    /// How long the call has lasted, if anything of it was measured.
    pub(crate) fn elapsed(&self) -> Option<Duration> {
        (self.begun != Moment::NEVER).then(|| self.call.read_clock().since(self.begun))
    }

    /// Refuses to go on with a call whose user code panicked: it is over, although its future still exists.
    #[inline]
    pub(crate) fn assert_sound(&self) {
        assert!(!self.in_user, "polled again after a panic");
    }

    /// Runs user code; a panic in it leaves the mark by which [`Lane::give_back`] knows.
    #[inline]
    pub(crate) fn user<R>(&mut self, code: impl FnOnce() -> R) -> R {
        self.in_user = true;
        let result = code();
        self.in_user = false;
        result
    }

    /// A call that nothing but its operation can end, if its policy has no steps. It stays as it is until it is over:
    /// there is nothing to give back.
    #[inline]
    pub(crate) fn is_bare(&self) -> bool {
        (self.phase == Phase::Bare && !context::is_present()) || self.phase == Phase::StillBare
    }

    #[inline]
    pub(crate) fn stay_bare(&mut self) {
        self.phase = Phase::StillBare;
    }

    #[inline]
    pub(crate) fn end_bare(&mut self) {
        self.phase = Phase::Done;
    }

    /// The operation was made.
    #[inline]
    pub(crate) fn count(&mut self) {
        self.made += 1;
    }

    /// Hands the pass of the only step to a guard, which gives it back instead.
    pub(crate) fn take_pass(&mut self) -> Pass {
        self.depth = 0;
        self.phase = Phase::Done;
        self.frames.read(0)
    }
}
