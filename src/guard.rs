//! A gate alone: [`Acquire`] waits at it, [`Guard`] is the pass with a drop.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project::{pin_project, pinned_drop};

use crate::call::Call;
use crate::error::Refusal;
use crate::gate::{Entry, Gate, Needs, Outcome, Pass, Times};
use crate::internal::time::{Moment, Timer};
use crate::lane::{End, Lane};
use crate::step::{self, Outline, Pipeline, Step};
use crate::verdict::Verdict;

/// A pass through one gate that goes back when it is dropped.
///
/// Say how what it was for has ended with [`success`](Guard::success), [`failure`](Guard::failure),
/// [`ignore`](Guard::ignore) or [`finish`](Guard::finish); a guard that is just dropped counts as
/// [abandoned](Outcome::Abandoned), or as a failure if its thread is panicking.
///
/// It owns a handle of its gate, so it can move into tasks. Cost: one `Arc` clone.
///
/// ```
/// use resile::{CircuitBreaker, State};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let breaker = CircuitBreaker::builder().consecutive_failures(1).build()?;
/// let guard = breaker.acquire().await?;
/// guard.failure();
/// assert_eq!(breaker.state(), State::Open);
/// # Ok(()) }
/// ```
#[must_use = "a guard that is dropped gives its pass back at once"]
pub struct Guard {
    /// A step that is a gate.
    step: Step,
    /// Two words; `None` once they have gone back.
    pass: Option<Pass>,
    started: Moment,
}

impl Guard {
    /// Waits at any gate: the built-in ones have this as a method.
    ///
    /// # Errors
    ///
    /// The future resolves to the gate's refusal.
    ///
    /// ```
    /// # use resile::{Call, Entry, Gate, Guard, Outcome, Pass};
    /// struct Open;
    /// impl Gate for Open {
    ///     fn enter(&self, _: &Call) -> Entry {
    ///         Entry::Pass(Pass::default())
    ///     }
    ///     fn leave(&self, _: Pass, outcome: Outcome) {
    ///         assert!(matches!(outcome, Outcome::Judged(verdict, _) if verdict.is_healthy()));
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let guard = Guard::acquire(Open).await?;
    /// guard.success();
    /// # Ok(()) }
    /// ```
    pub fn acquire(gate: impl Gate) -> Acquire {
        Self::enter(gate, 1)
    }

    /// Enters any gate if that needs no waiting.
    ///
    /// # Errors
    ///
    /// The gate's refusal.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use resile::{Gate, Guard, Reason, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let gate: Arc<dyn Gate> = Arc::new(Semaphore::permits(1).build()?);     // whatever it is
    /// let _held = Guard::try_acquire(gate.clone())?;
    /// assert_eq!(Guard::try_acquire(gate).unwrap_err().reason(), Reason::Busy);
    /// # Ok(()) }
    /// ```
    pub fn try_acquire(gate: impl Gate) -> Result<Self, Refusal> {
        Self::try_enter(gate, 1)
    }

    pub(crate) fn enter(gate: impl Gate, cost: u32) -> Acquire {
        let lane = Lane::new(Call::alone(cost, true), true);
        Acquire { timer: Timer::idle(), lane, step: Some(Step::gate(gate)) }
    }

    pub(crate) fn try_enter(gate: impl Gate, cost: u32) -> Result<Self, Refusal> {
        let step = Step::gate(gate);
        let call = Call::alone(cost, false);
        match step.as_gate().map(|gate| step::enter(gate, &call, false)) {
            Some(Entry::Pass(pass)) => Ok(Self::new(step, pass, &call)),
            Some(Entry::Refused(refusal)) => Err(refusal),
            Some(Entry::Wait(..)) | None => unreachable!("a gate was told not to let the call wait"),
        }
    }

    fn new(step: Step, pass: Pass, call: &Call) -> Self {
        let started = if step.needs() > Needs::Nothing { call.now() } else { Moment::NEVER };
        Self { step, pass: Some(pass), started }
    }

    /// Says what it has really cost, where that is known only afterwards: bytes, tokens of a model, money.
    ///
    /// A limiter puts back what was taken too much, or takes the rest although it is not there: those who come next wait
    /// for it. May be said again as the cost grows, and says nothing about how it ended. Other gates take no notice.
    ///
    /// ```
    /// use resile::TokenBucket;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bytes = TokenBucket::per_second(1000).burst(100).build()?;
    /// let mut guard = bytes.acquire_many(60).await?;     // estimated
    /// guard.settle(25);
    /// guard.success();
    /// assert_eq!(bytes.peek(), 75);
    ///
    /// let mut guard = bytes.acquire_many(60).await?;
    /// guard.settle(175);                                  // a hundred more than there were
    /// assert_eq!(bytes.try_take(1).unwrap_err().retry_after().unwrap().as_millis(), 101);
    /// # Ok(()) }
    /// ```
    pub fn settle(&mut self, actual: u32) {
        if let (Some(gate), Some(pass)) = (self.step.as_gate(), self.pass.as_mut()) {
            gate.settle(pass, &Call::alone(actual, false), actual);
        }
    }

    /// What it was for went well.
    pub fn success(self) {
        self.finish(Verdict::Success);
    }

    /// What it was for failed.
    pub fn failure(self) {
        self.finish(Verdict::Transient(None));
    }

    /// How it ended says nothing about the peer.
    ///
    /// ```
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(2).build()?;
    /// breaker.try_acquire()?.failure();
    /// breaker.try_acquire()?.ignore();                 // neither counts nor ends the row
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::Open);
    /// # Ok(()) }
    /// ```
    pub fn ignore(self) {
        self.finish(Verdict::Ignored);
    }

    /// Ends it with any verdict.
    ///
    /// ```
    /// # use resile::{ByResult, CircuitBreaker, Classify, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).build()?;
    /// let guard = breaker.acquire().await?;
    /// let answer: Result<u32, &str> = Err("reset");
    /// guard.finish(ByResult.classify(&answer));
    /// assert_eq!(breaker.state(), State::Open);
    /// # Ok(()) }
    /// ```
    pub fn finish(mut self, verdict: Verdict) {
        self.leave(|times| Outcome::Judged(verdict, times));
    }

    fn leave(&mut self, outcome: impl FnOnce(Times) -> Outcome) {
        if let Some(pass) = self.pass.take() {
            let started = self.started;
            let ended = if started == Moment::NEVER { started } else { Moment::now() };
            self.step.0.leave(pass, &outcome(Times { started, ended }));
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.leave(|times| Outcome::Judged(Verdict::Transient(None), times));
        } else {
            self.leave(Outcome::Abandoned);
        }
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("gate", &self.step).finish_non_exhaustive()
    }
}

/// Waits at one gate for a [`Guard`].
///
/// # Cancel safety
///
/// Dropped, it loses its place in the queue, and nothing else: what it may have been granted goes to the next.
///
/// # Cooperation
///
/// A guard that is acquired uses up a unit of the task's cooperative budget. When that is spent, the future is pending
/// once, so that a loop which always finds a free permit lets other tasks run. Refusals and the `try_` methods use up
/// nothing.
#[pin_project(PinnedDrop)]
#[must_use = "futures do nothing unless polled"]
pub struct Acquire {
    #[pin]
    timer: Timer,
    lane: Lane,
    /// `None` once the guard has it.
    step: Option<Step>,
}

impl Future for Acquire {
    type Output = Result<Guard, Refusal>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        this.lane.assert_sound();
        // A loop that acquires again and again is always ready. It has to let other tasks run at times, and before it
        // enters is when it holds nothing.
        let progress = ready!(tokio::task::coop::poll_proceed(cx));
        this.lane.call().forget_time();
        let step = this.step.as_slice();
        let outline = Outline::of(step, None, None);
        let end = ready!(this.lane.poll_enter(Pipeline { steps: step, outline: &outline }, this.timer, cx));
        if end.is_ok() {
            progress.made_progress();
        }
        Poll::Ready(match end {
            Ok(()) => {
                let step = this.step.take().expect("the lane refuses to be polled once a guard has the step");
                Ok(Guard::new(step, this.lane.take_pass(), this.lane.call()))
            }
            Err(End::Refused(_, refusal)) => Err(refusal),
            Err(_) => unreachable!("a lane without deadline and token ends in no other way"),
        })
    }
}

#[pinned_drop]
impl PinnedDrop for Acquire {
    fn drop(self: Pin<&mut Self>) {
        let this = self.project();
        if this.lane.holds() {
            this.lane.give_back(Pipeline { steps: this.step.as_slice(), outline: &Outline::none() });
        }
    }
}

impl fmt::Debug for Acquire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquire").field("gate", &self.step).finish_non_exhaustive()
    }
}

/// The methods that take a gate alone, written once for all of them; the last two only for gates that count what a call
/// costs.
macro_rules! guarded {
    ($gate:ident, $one:literal) => {
        impl $gate {
            #[doc = concat!("Waits for a ", $one, ".")]
            ///
            /// # Errors
            ///
            /// The future resolves to a [`Refusal`](crate::Refusal) that says why and when to come back.
            ///
            /// # Cancel safety
            ///
            /// Dropped, it loses its place in the queue and nothing else.
            pub fn acquire(&self) -> crate::guard::Acquire {
                crate::guard::Guard::enter(self.clone(), 1)
            }

            #[doc = concat!("Takes a ", $one, " if one is free and no caller waits.")]
            ///
            /// # Errors
            ///
            /// A [`Refusal`](crate::Refusal) that says why and when to come back.
            pub fn try_acquire(&self) -> Result<crate::guard::Guard, crate::error::Refusal> {
                crate::guard::Guard::try_enter(self.clone(), 1)
            }
        }
    };
    ($gate:ident, $one:literal, $many:literal) => {
        crate::guard::guarded!($gate, $one);

        impl $gate {
            #[doc = concat!("Waits for `cost` ", $many, ", all at once.")]
            ///
            /// # Errors
            ///
            /// As [`acquire`](Self::acquire); and for more than can ever be had at once, a refusal that says so.
            ///
            /// At a semaphore, a heavy call takes as much as several light ones:
            ///
            /// ```
            /// # use resile::Semaphore;
            /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
            /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
            /// let semaphore = Semaphore::permits(4).build()?;
            /// let heavy = semaphore.acquire_many(3).await?;
            /// assert_eq!(semaphore.available(), 1);
            /// drop(heavy);
            /// assert_eq!(semaphore.available(), 4);
            /// # Ok(()) }
            /// ```
            pub fn acquire_many(&self, cost: u32) -> crate::guard::Acquire {
                crate::guard::Guard::enter(self.clone(), cost)
            }

            #[doc = concat!("Takes `cost` ", $many, ", all or none, if they are free and no caller waits.")]
            ///
            /// # Errors
            ///
            /// As [`try_acquire`](Self::try_acquire).
            ///
            /// What could never be had at once is refused as such, whatever is free now:
            ///
            /// ```
            /// # use resile::{Reason, Semaphore};
            /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
            /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
            /// let semaphore = Semaphore::permits(4).build()?;
            /// let _held = semaphore.try_acquire_many(2)?;
            /// assert_eq!(semaphore.try_acquire_many(3).unwrap_err().reason(), Reason::Busy);
            /// let refusal = semaphore.try_acquire_many(5).unwrap_err();
            /// assert_eq!(refusal.reason(), Reason::CostAboveLimit { cost: 5, limit: 4 });
            /// # Ok(()) }
            /// ```
            pub fn try_acquire_many(&self, cost: u32) -> Result<crate::guard::Guard, crate::error::Refusal> {
                crate::guard::Guard::try_enter(self.clone(), cost)
            }
        }
    };
}
pub(crate) use guarded;
