//! The way in: through the steps, their queues and the pauses between attempts, to the operation.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::{End, Lane, Phase, Woken};
use crate::cancel::{CancelReason, Wait};
use crate::drain;
use crate::error::{Reason, Refusal};
use crate::gate::{Entry, Needs, Pass, Ticket};
use crate::internal::time::{Moment, Timer};
use crate::retry::Frame as RetryFrame;
use crate::step::{self, Kind, Outline, Step};

impl Lane {
    /// Brings the call to the operation: through the steps, their queues, and the pause before a retry.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    pub(crate) fn poll_in(
        &mut self,
        steps: &[Step],
        outline: &Outline,
        timer: Pin<&mut Timer>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        if matches!(self.phase, Phase::Bare | Phase::Start) {
            let now = self.start(steps, outline);
            if !self.call.is_cancelled() && self.walk_in_at_once(steps, now) && self.has_time(outline, now) {
                self.arrive(steps, now);
                return Poll::Ready(Ok(()));
            }
        }
        if self.phase == Phase::Running {
            return Poll::Ready(Ok(()));
        }
        self.poll_steps(steps, outline, timer, cx)
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    fn start(&mut self, steps: &[Step], outline: &Outline) -> Moment {
        self.frames.begin(steps.len());
        self.needs = outline.needs;
        if self.needs >= Needs::Now {
            self.begun = self.call.read_clock();
        }
        self.call.start(outline.said.as_ref());
        self.phase = Phase::Entering;
        self.begun
    }

    /// The time, if a step asks for it.
    #[inline]
    fn now(&self) -> Moment {
        if self.needs >= Needs::Now { self.call.now() } else { Moment::NEVER }
    }

    /// Enters the steps from `depth` on that let the call in at once; whether those were all. This much is compiled into
    /// one loop: it is the way in of almost all calls.
    fn walk_in_at_once(&mut self, steps: &[Step], now: Moment) -> bool {
        let Self { call, depth, .. } = self;
        let cost = call.cost();
        let mut ends = call.ends();
        let mut passed = *depth as usize;
        let mut frames = self.frames.get()[passed..].iter_mut();
        for step in &steps[passed..] {
            let Some(frame) = frames.next() else { break };
            let pass = match &step.0 {
                Kind::Timeout(limit) => {
                    let before = ends;
                    ends = before.min(now.plus_nanos(*limit));
                    Some(Pass::new(before.nanos(), 0))
                }
                Kind::Retry(retry) => Some(retry.enter()),
                Kind::Semaphore(gate) => gate.enter_at_once(cost),
                Kind::Breaker(gate) => gate.enter_at_once(),
                Kind::Bucket(gate) => gate.enter_at_once(cost, now),
                Kind::Drain(gate) => gate.enter_at_once(),
                Kind::Part(_) | Kind::Gate(_) => None,
            };
            let Some(pass) = pass else { break };
            *frame = pass.words();
            passed += 1;
        }
        call.set_end(ends);
        *depth = passed as u32;
        passed == steps.len()
    }

    /// Enters the steps from `depth` on, up to the first one that makes the call wait or refuses it.
    fn walk_in(&mut self, steps: &[Step], outline: &Outline) -> Result<(), Refusal> {
        while !self.walk_in_at_once(steps, self.now()) {
            let place = self.depth as usize;
            let gate = steps[place].as_gate().expect("all but gates are entered at once");
            self.call.set_spare(self.spare(outline));
            self.in_user = true;
            let entry = step::enter(gate, &self.call, self.call.may_wait());
            self.in_user = false;
            match entry {
                Entry::Pass(pass) => {
                    *self.frame(place) = pass.words();
                    self.depth += 1;
                }
                Entry::Wait(ticket, _) => {
                    *self.frame(place) = ticket.words();
                    self.phase = Phase::Queued;
                    return Ok(());
                }
                Entry::Refused(refusal) => return Err(refusal),
            }
        }
        Ok(())
    }

    /// All steps are passed: the operation's own clock starts.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a fifth of what a call without steps costs")]
    fn arrive(&mut self, steps: &[Step], now: Moment) {
        self.phase = Phase::Running;
        self.operating = true;
        self.count();
        self.started = now;
        if self.call.attempt() > 1 {
            self.arrive_again(steps);
        }
    }

    /// What the budgets of retries were charged for is made.
    #[cold]
    fn arrive_again(&mut self, steps: &[Step]) {
        for (place, step) in steps.iter().enumerate() {
            if let Kind::Retry(_) = step.0 {
                let frame = self.frame(place);
                *frame = RetryFrame::from_words(*frame).attempt_made().to_words();
            }
        }
    }

    /// Whether a call that has waited for nothing may make its operation by the reading it came in with. Its deadline is
    /// not over, and leaves the time that the policy fixes. Without a reading (`NEVER`) this is true only if there is no
    /// deadline; otherwise the slow path reads the clock and decides.
    #[inline]
    fn has_time(&self, outline: &Outline, now: Moment) -> bool {
        now.plus_nanos(outline.least.fixed()) <= self.call.ends()
    }

    /// Is there still time for the operation that is about to be made? Asked once for each, whatever led to it, by a
    /// fresh reading: user code may have run since the last one, or the task may have been polled late.
    fn check_time(&mut self, steps: &[Step], outline: &Outline) -> Result<(), End> {
        let ends = self.call.ends();
        if ends == Moment::NEVER {
            return Ok(());
        }
        let now = self.call.read_clock();
        if let Some(end) = self.too_late(steps, outline, now) {
            return Err(end);
        }
        // Only those that waited are refused by the rule, so only they can show that it has become too strict.
        if self.waited {
            outline.least.start(now, ends);
        }
        Ok(())
    }

    /// What a call ends in that would begin its operation at this moment, if that is too late. A deadline in this very
    /// moment is not over: a limit of zero still allows what is ready at once.
    fn too_late(&mut self, steps: &[Step], outline: &Outline, now: Moment) -> Option<End> {
        let ends = self.call.ends();
        let (latest, place) = self.latest_start(steps);
        if ends < now {
            Some(self.timed_out(steps))
        } else if now > latest {
            Some(End::Refused(place, Refusal::new("retry", Reason::TooLate)))
        } else if (self.waited || outline.least.fixed() > 0) && !outline.least.leaves_room(now, ends) {
            let (left, takes) = (ends.nanos_since(now), outline.least.required());
            Some(End::Refused(self.depth as usize, Refusal::of_time("min_attempt", left, takes)))
        } else {
            None
        }
    }

    /// The latest moment at which the retries that were passed allow an attempt to begin, and the place of the strictest.
    fn latest_start(&mut self, steps: &[Step]) -> (Moment, usize) {
        let depth = self.depth as usize;
        let (mut ends, mut latest) = (self.call.ends(), (Moment::NEVER, depth));
        if !self.waited {
            return latest;
        }
        for place in (0..depth).rev() {
            match &steps[place].0 {
                // What the deadline was outside of it.
                Kind::Timeout(_) => ends = Moment::from_nanos(self.frame(place)[0]),
                Kind::Retry(retry) => latest = latest.min((retry.latest_start(ends), place)),
                _ => {}
            }
        }
        latest
    }

    /// When a call leaves a queue because its operation would come too late, although its limit has not passed.
    fn leaves_queue_at(&mut self, steps: &[Step], outline: &Outline) -> Moment {
        let ends = self.call.ends();
        if ends == Moment::NEVER {
            return Moment::NEVER;
        }
        let (latest, _) = self.latest_start(steps);
        let least = outline.least.required();
        let own = if least == 0 || outline.least.is_probe_due(self.call.now()) {
            Moment::NEVER
        } else {
            ends.minus_nanos(least)
        };
        // A start at the last nanosecond that leaves enough time is in time.
        own.min(latest).plus_nanos(1)
    }

    /// How much time must be left when the wait at a gate ends: twice what an operation needs, since the next gate's queue
    /// has to have its share (measured: once is not enough in front of a semaphore). Or what a retry wants an attempt to
    /// have, if that is more: who would be given up after the queue is told at its door.
    fn spare(&self, outline: &Outline) -> u64 {
        if self.call.ends() == Moment::NEVER {
            return 0;
        }
        let least = outline.least.required();
        let learned = if outline.least.is_probe_due(self.call.now()) { 0 } else { least.saturating_mul(2) };
        learned.max(outline.retry_least)
    }

    fn poll_steps(
        &mut self,
        steps: &[Step],
        outline: &Outline,
        mut timer: Pin<&mut Timer>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        loop {
            match self.phase {
                Phase::Entering => {
                    // No attempt begins after the caller has cancelled.
                    if self.call.is_cancelled() {
                        return Poll::Ready(Err(self.cancelled_entering(steps)));
                    }
                    if let Err(refusal) = self.walk_in(steps, outline) {
                        return Poll::Ready(Err(End::Refused(self.depth as usize, refusal)));
                    }
                    if self.phase == Phase::Entering {
                        if let Err(end) = self.check_time(steps, outline) {
                            return Poll::Ready(Err(end));
                        }
                        let reads = self.needs >= Needs::Now || self.call.ends() != Moment::NEVER;
                        self.arrive(steps, if reads { self.call.now() } else { Moment::NEVER });
                    }
                }
                Phase::Queued => {
                    if let Err(end) = ready!(self.poll_queue(steps, outline, timer.as_mut(), cx)) {
                        return Poll::Ready(Err(end));
                    }
                }
                Phase::Backoff => {
                    if let Some(end) = self.poll_closing(steps, cx) {
                        return Poll::Ready(Err(end));
                    }
                    match ready!(self.poll_pause(timer.as_mut(), self.until, cx)) {
                        Woken::Due => self.phase = Phase::Again,
                        Woken::Deadline => return Poll::Ready(Err(self.timed_out(steps))),
                        Woken::Cancelled => return Poll::Ready(Err(self.cancelled(steps))),
                    }
                }
                Phase::Again => {
                    self.phase = Phase::Entering;
                    if let Err(end) = self.ask_still(steps) {
                        return Poll::Ready(Err(end));
                    }
                }
                Phase::Running => return Poll::Ready(Ok(())),
                Phase::Bare | Phase::StillBare | Phase::Start | Phase::Left | Phase::Done => {
                    panic!("polled again after it was ready")
                }
            }
        }
    }

    /// What the call ends in whose earliest deadline has passed.
    #[cold]
    fn timed_out(&mut self, steps: &[Step]) -> End {
        let place = self.fired(steps);
        if place.is_none() {
            self.call.note_end();
        }
        End::TimedOut(place)
    }

    /// What the call ends in that was cancelled. The reason is asked for once, here: error, report and cleanup tell it.
    #[cold]
    fn cancelled(&mut self, steps: &[Step]) -> End {
        match self.call.cancel_reason(self.frames.rare.as_ref().map(|rare| &rare.waits)) {
            Some(reason) => End::Cancelled(reason),
            None => self.timed_out(steps),
        }
    }

    /// The same for a call on its way in. If it is a drain's shutdown that cancelled it, and that drain's gate is still
    /// ahead, the gate's refusal tells better what happened: the call came too late, and nothing of it was done.
    #[cold]
    fn cancelled_entering(&mut self, steps: &[Step]) -> End {
        let end = self.cancelled(steps);
        let depth = self.depth as usize;
        if !matches!(end, End::Cancelled(CancelReason::Shutdown)) || self.made > 0 {
            return end;
        }
        let ahead = steps.iter().enumerate().skip(depth);
        let closed = ahead.filter_map(|(place, step)| Some((place, step.as_drain()?)));
        let mut closed = closed.filter(|(_, drain)| drain.phase() != drain::Phase::Open);
        closed.next().map_or(end, |(place, drain)| End::Refused(place, drain.refuse()))
    }

    /// Whether a drain that the call has passed closes while it stands in a queue or sleeps: what has not begun can only
    /// be refused then, and is told so at once. If not, the task is woken when one does.
    fn poll_closing(&mut self, steps: &[Step], cx: &mut Context<'_>) -> Option<End> {
        for (place, step) in steps[..self.depth as usize].iter().enumerate() {
            let Some(drain) = step.as_drain() else { continue };
            let waits = &mut self.frames.rare.get_or_insert_default().closings;
            let at = waits.iter().position(|(other, _)| *other == place).unwrap_or_else(|| {
                waits.push((place, Wait::for_(drain.closing_token())));
                waits.len() - 1
            });
            // The waker is left before the phase is read. One of a round that is over waits for nothing any more.
            if waits[at].1.is_over(cx.waker()) && drain.phase() == drain::Phase::Open {
                waits[at].1 = Wait::for_(drain.closing_token());
                waits[at].1.is_over(cx.waker());
            }
            if drain.phase() != drain::Phase::Open {
                return Some(End::Refused(place, drain.refuse()));
            }
        }
        None
    }

    /// The step whose deadline is the earliest, or `None` if it is the caller's: the innermost one that narrowed it.
    fn fired(&mut self, steps: &[Step]) -> Option<usize> {
        let deadline = self.call.ends().nanos();
        let depth = self.depth as usize;
        (0..depth).rev().find(|place| matches!(steps[*place].0, Kind::Timeout(_)) && self.frame(*place)[0] != deadline)
    }

    /// Asks the gate whose queue the call stands in, and waits if it says so. The gate is asked first, so a refusal wins
    /// over a deadline that passes in the same poll. A pass that comes too late goes back.
    fn poll_queue(
        &mut self,
        steps: &[Step],
        outline: &Outline,
        timer: Pin<&mut Timer>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        let place = self.depth as usize;
        let gate = steps[place].as_gate().expect("only gates have queues");
        let [a, b] = *self.frame(place);
        self.in_user = true;
        let entry = gate.poll_wait(Ticket::new(a, b), &self.call, cx);
        self.in_user = false;
        match entry {
            Entry::Pass(pass) => {
                *self.frame(place) = pass.words();
                self.depth += 1;
                self.phase = Phase::Entering;
                Poll::Ready(self.ask_still(steps))
            }
            Entry::Refused(refusal) => {
                self.phase = Phase::Entering;
                Poll::Ready(Err(End::Refused(place, refusal)))
            }
            Entry::Wait(ticket, at) => {
                *self.frame(place) = ticket.words();
                self.waited = true;
                // A gate that names a moment gone by is asked again after a tick, not in a spin.
                let at = at.map_or(Moment::NEVER, |at| at.max(self.call.now().plus_nanos(1)));
                if let Some(end) = self.poll_closing(steps, cx) {
                    self.phase = Phase::Left;
                    self.leave_queue(steps);
                    return Poll::Ready(Err(end));
                }
                let leaves = self.leaves_queue_at(steps, outline);
                let end = match ready!(self.poll_pause(timer, at.min(leaves), cx)) {
                    Woken::Due => match self.too_late(steps, outline, self.call.now()) {
                        Some(end) => end,
                        None => return Poll::Ready(Ok(())),
                    },
                    Woken::Deadline => self.timed_out(steps),
                    Woken::Cancelled => self.cancelled(steps),
                };
                self.phase = Phase::Left;
                self.leave_queue(steps);
                Poll::Ready(Err(end))
            }
        }
    }

    pub(super) fn leave_queue(&mut self, steps: &[Step]) {
        let place = self.depth as usize;
        if let Some(gate) = steps[place].as_gate() {
            let [a, b] = *self.frame(place);
            gate.abandon(Ticket::new(a, b));
        }
    }

    /// After a wait or an attempt, asks the gates that were passed before it whether their passes still hold.
    fn ask_still(&mut self, steps: &[Step]) -> Result<(), End> {
        for (place, step) in steps[..self.depth as usize].iter().enumerate() {
            if let Some(gate) = step.as_revoking_gate() {
                let [a, b] = *self.frame(place);
                gate.still(&Pass::new(a, b), &self.call).map_err(|refusal| End::Refused(place, refusal))?;
            }
        }
        Ok(())
    }

    /// While the operation is pending: waits for what could end it.
    #[inline]
    pub(crate) fn poll_interrupt(&mut self, steps: &[Step], timer: Pin<&mut Timer>, cx: &mut Context<'_>) -> Poll<End> {
        Poll::Ready(match ready!(self.poll_pause(timer, Moment::NEVER, cx)) {
            Woken::Cancelled => self.cancelled(steps),
            _ => self.timed_out(steps),
        })
    }
}
