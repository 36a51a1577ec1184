//! How a closing goes on: its phases, and the task that takes it through them whoever waits for it.
//!
//! 1. The phase moves under the lock of the [`State`] only, and each round goes from open to done once.
//! 2. The driver leaves its waker before it reads the count, under the lock where the last one out looks for it: that
//!    one is either seen gone or finds the waker.
//! 3. Who waits for a phase is told outside of the lock, after the word has moved.
//! 4. A driver that is dropped takes the closing to its end: nobody waits for a runtime that is gone.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use pin_project::{pin_project, pinned_drop};
use tokio::runtime::Handle;
use tokio::sync::{SetOnce, watch};

use super::course::{Account, Course, Next};
use super::names::Held;
use super::report::Drained;
use super::word::Word;
use super::{Phase, Shared};
use crate::cancel::{Cancel, CancelReason};
use crate::internal::sync::AcqRel;
use crate::internal::time::{Moment, Timer};

/// One life of a drain, from open to done: what those hold on to who wait for its phases.
#[derive(Debug)]
pub(super) struct Round {
    phase: watch::Sender<Phase>,
    pub(super) cancel: Cancel,
    report: SetOnce<Drained>,
}

impl Round {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { phase: watch::Sender::new(Phase::Open), cancel: Cancel::new(), report: SetOnce::new() })
    }

    /// Waits until it has come to a phase, or past it.
    pub(super) async fn reached(self: Arc<Self>, phase: Phase) {
        let mut phases = self.phase.subscribe();
        // The sender is `self`, so this can't fail.
        let _ = phases.wait_for(|now| *now >= phase).await;
    }

    pub(super) async fn ended(self: Arc<Self>) -> Drained {
        self.report.wait().await.clone()
    }
}

/// What changes with the phase.
#[derive(Debug)]
pub(super) struct State {
    pub(super) round: Arc<Round>,
    /// The closing that is on its way.
    course: Option<Course>,
    /// The driver's.
    waker: Option<Waker>,
}

impl State {
    pub(super) fn new() -> Self {
        Self { round: Round::new(), course: None, waker: None }
    }
}

/// What the driver has to do outside of the lock.
enum Step {
    Wait(Moment),
    Cancel(Arc<Round>),
    End(Arc<Round>, Account, Vec<Held>),
    Over,
}

/// The time that a step goes by.
#[derive(Clone, Copy)]
enum Due {
    Now,
    /// There is no time left: whatever would have been waited for is due.
    All,
}

impl Shared {
    /// Closes, or joins a closing that is on its way.
    ///
    /// # Panics
    ///
    /// Outside of a runtime, before anything is changed.
    pub(super) fn close(self: &Arc<Self>, grace: Duration) -> Arc<Round> {
        let runtime = Handle::current();
        let (round, driver) = self.begin(grace);
        if let Some(driver) = driver {
            round.phase.send_replace(Phase::Closing);
            runtime.spawn(driver);
        }
        round
    }

    /// The round that closes, and its driver, unless somebody else has that.
    pub(super) fn begin(self: &Arc<Self>, grace: Duration) -> (Arc<Round>, Option<Driver>) {
        let now = Moment::now();
        let grace_ends = now + grace;
        let (mut driver, mut waker) = (None, None);
        let mut state = self.state.lock();
        let round = state.round.clone();
        if let Some(course) = &mut state.course {
            if course.hurry(grace_ends) {
                waker = state.waker.take();
            }
        } else if self.read().phase() == Phase::Open {
            let in_flight = self.move_locked(Phase::Open, Phase::Closing);
            state.course = Some(Course::new(now, grace_ends, in_flight));
            driver = Some(Driver::new(self.clone()));
        }
        drop(state);
        waker.into_iter().for_each(Waker::wake);
        (round, driver)
    }

    /// With the lock held, so that nobody else moves the phase: how many were in flight at that step.
    fn move_locked(&self, from: Phase, to: Phase) -> u64 {
        Word(self.word.fetch_add(Word::step(from, to), AcqRel)).in_flight()
    }

    /// Takes the closing one step on. To wait for more, it needs a waker.
    fn step(&self, due: Due, waker: Option<Waker>) -> Step {
        let now = Moment::now();
        let mut state = self.state.lock();
        let unused = std::mem::replace(&mut state.waker, waker);
        let step = self.step_locked(&mut state, due, now);
        drop(state);
        drop(unused);
        step
    }

    fn step_locked(&self, state: &mut State, due: Due, now: Moment) -> Step {
        let Some(course) = &mut state.course else { return Step::Over };
        let word = self.read();
        let due = match due {
            Due::Now => now,
            Due::All => Moment::NEVER,
        };
        match course.next(due, word.in_flight()) {
            Next::Wait(until) => Step::Wait(until),
            Next::Cancel => {
                let in_flight = self.move_locked(word.phase(), Phase::Cancelling);
                course.cancel(in_flight, now.plus_nanos(self.cancel_wait));
                Step::Cancel(state.round.clone())
            }
            Next::End => {
                // Names come and go under their lock, so those that are read here are among those counted.
                let names = self.names.lock();
                let in_flight = self.move_locked(word.phase(), Phase::Done);
                let held = names.all(now);
                drop(names);
                let account = course.end(now, in_flight);
                state.course = None;
                Step::End(state.round.clone(), account, held)
            }
        }
    }

    /// The last one is out.
    #[cold]
    pub(super) fn wake_driver(&self) {
        let waker = self.state.lock().waker.take();
        waker.into_iter().for_each(Waker::wake);
    }

    pub(super) fn reopen(&self) -> bool {
        let fresh = Round::new();
        let mut state = self.state.lock();
        if self.read().phase() != Phase::Done {
            return false;
        }
        let old = std::mem::replace(&mut state.round, fresh);
        self.move_locked(Phase::Done, Phase::Open);
        drop(state);
        drop(old);
        true
    }
}

/// Takes a closing from its beginning to its end; a task of its own.
#[pin_project(PinnedDrop)]
#[must_use = "a driver that is dropped ends the closing"]
pub(super) struct Driver {
    #[pin]
    timer: Timer,
    shared: Arc<Shared>,
    over: bool,
}

impl Driver {
    fn new(shared: Arc<Shared>) -> Self {
        Self { timer: Timer::idle(), shared, over: false }
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        while !*this.over {
            match this.shared.step(Due::Now, Some(cx.waker().clone())) {
                Step::Wait(until) => ready!(this.timer.as_mut().poll_until(until, cx)),
                step => *this.over = tell(step),
            }
        }
        Poll::Ready(())
    }
}

#[pinned_drop]
impl PinnedDrop for Driver {
    fn drop(self: Pin<&mut Self>) {
        while !self.over && !tell(self.shared.step(Due::All, None)) {}
    }
}

/// Tells those who wait for it of a step; whether it was the last.
fn tell(step: Step) -> bool {
    match step {
        Step::Wait(_) => false,
        Step::Cancel(round) => {
            round.cancel.cancel_with(CancelReason::Shutdown);
            round.phase.send_replace(Phase::Cancelling);
            false
        }
        Step::End(round, account, held) => {
            // A round ends once, so this can't fail.
            let _ = round.report.set(Drained::new(account, Held::group(held)));
            round.phase.send_replace(Phase::Done);
            true
        }
        Step::Over => true,
    }
}
