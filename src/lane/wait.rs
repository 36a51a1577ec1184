//! Waiting: in a gate's queue, for the next attempt, and for whatever ends the call meanwhile.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::{End, Lane, Phase, Woken};
use crate::cancel::Wait;
use crate::drain;
use crate::error::{Reason, Refusal};
use crate::gate::{Entry, Pass};
use crate::internal::time::{Moment, Timer};
use crate::step::{Kind, Limited, Outline, Pipeline, Step};

impl Lane {
    /// Waits until a moment, the deadline or the caller's cancellation, by the one timer.
    ///
    /// The clock decides, not the timer: a runtime that never parks fires no timers, and one that was busy fires them
    /// late, when more than the pause may be over.
    #[inline]
    pub(super) fn poll_pause(&mut self, timer: Pin<&mut Timer>, until: Moment, cx: &mut Context<'_>) -> Poll<Woken> {
        // If nobody has cancelled, the task is woken when somebody does.
        if let Some(said) = self.call.cancels() {
            if self.frames.rare.get_or_insert_default().waits.is_over(said, cx) {
                return Poll::Ready(Woken::Cancelled);
            }
        }
        let deadline = self.call.ends();
        let at = until.min(deadline);
        if at == Moment::NEVER {
            return Poll::Pending;
        }
        let mut now = self.call.now();
        if now < at {
            ready!(timer.poll_until(at, cx));
            now = self.call.read_clock();
        }
        Poll::Ready(if now >= deadline { Woken::Deadline } else { Woken::Due })
    }

    /// What a call ends in that would begin its operation at this moment, if that is too late. A deadline in this very
    /// moment is not over: a limit of zero still allows what is ready at once.
    pub(super) fn too_late(&mut self, pipeline: Pipeline<'_>, now: Moment) -> Option<End> {
        let Pipeline { steps, outline } = pipeline;
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
                Kind::Timeout(_) => ends = self.frames.read::<Limited>(place).outer,
                Kind::Retry(retry) => latest = latest.min((retry.latest_start(ends), place)),
                _ => {}
            }
        }
        latest
    }

    /// When a call leaves a queue because its operation would come too late, although its limit has not passed.
    fn leaves_queue_at(&mut self, pipeline: Pipeline<'_>) -> Moment {
        let Pipeline { steps, outline } = pipeline;
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
    pub(super) fn spare(&self, outline: &Outline) -> u64 {
        if self.call.ends() == Moment::NEVER {
            return 0;
        }
        let least = outline.least.required();
        let learned = if outline.least.is_probe_due(self.call.now()) { 0 } else { least.saturating_mul(2) };
        learned.max(outline.retry_least)
    }

    /// Asks the gate whose queue the call stands in, and waits if it says so. The gate is asked first, so a refusal wins
    /// over a deadline that passes in the same poll. A pass that comes too late goes back.
    pub(super) fn poll_queue(
        &mut self,
        pipeline: Pipeline<'_>,
        timer: Pin<&mut Timer>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), End>> {
        let Pipeline { steps, .. } = pipeline;
        let place = self.depth as usize;
        let gate = steps[place].as_gate().expect("only gates have queues");
        let ticket = self.frames.read(place);
        self.in_user = true;
        let entry = gate.poll_wait(ticket, &self.call, cx);
        self.in_user = false;
        match entry {
            Entry::Pass(pass) => {
                self.frames.write(place, pass);
                self.depth += 1;
                self.phase = Phase::Entering;
                Poll::Ready(self.revalidate(steps))
            }
            Entry::Refused(refusal) => {
                self.phase = Phase::Entering;
                Poll::Ready(Err(End::Refused(place, refusal)))
            }
            Entry::Wait(ticket, at) => {
                self.frames.write(place, ticket);
                self.waited = true;
                // A gate that names a moment gone by is asked again after a tick, not in a spin.
                let at = at.map_or(Moment::NEVER, |at| at.max(self.call.now().plus_nanos(1)));
                if let Some(end) = self.poll_closing(steps, cx) {
                    self.phase = Phase::Left;
                    self.leave_queue(steps);
                    return Poll::Ready(Err(end));
                }
                let leaves = self.leaves_queue_at(pipeline);
                let end = match ready!(self.poll_pause(timer, at.min(leaves), cx)) {
                    Woken::Due => match self.too_late(pipeline, self.call.now()) {
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

    /// Whether a drain that the call has passed closes while it stands in a queue or sleeps: what has not begun can only
    /// be refused then, and is told so at once. If not, the task is woken when one does.
    pub(super) fn poll_closing(&mut self, steps: &[Step], cx: &mut Context<'_>) -> Option<End> {
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

    pub(super) fn leave_queue(&mut self, steps: &[Step]) {
        let place = self.depth as usize;
        if let Some(gate) = steps[place].as_gate() {
            let ticket = self.frames.read(place);
            gate.abandon(ticket);
        }
    }

    /// After a wait or an attempt, asks the gates that were passed before it whether their passes still hold.
    pub(super) fn revalidate(&mut self, steps: &[Step]) -> Result<(), End> {
        for (place, step) in steps[..self.depth as usize].iter().enumerate() {
            if let Some(gate) = step.as_revalidating_gate() {
                let pass: Pass = self.frames.read(place);
                gate.still(&pass, &self.call).map_err(|refusal| End::Refused(place, refusal))?;
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
