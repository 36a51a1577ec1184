//! [`Drain`]: one object by which a whole service stops: no new work, a grace for the rest, and a report.
//!
//! A process that is told to stop and just exits cuts its requests in half. One that waits for them may wait for ever: a
//! stream that never ends, a job that hangs, a retry that begins once more. A drain is what the parts of a service share
//! so that they stop together and within a bound: it lets work in and counts it, until it is closed.
//!
//! ```
//! use std::time::Duration;
//! use resile::{CancelReason, Drain, Reason};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let drain = Drain::new();
//!
//! let request = drain.acquire().await?;                                   // counted until it is dropped
//! let job = drain.spawn("reindex", std::future::pending::<()>())?;        // a task with a name
//! tokio::spawn(async move {
//!     tokio::time::sleep(Duration::from_secs(3)).await;
//!     request.success();
//! });
//!
//! let report = drain.close(Duration::from_secs(20)).await;                // say, when SIGTERM came
//! assert_eq!((report.finished(), report.cancelled(), report.still_in()), (1, 1, 0));
//! assert_eq!(job.await?, Err(CancelReason::Shutdown));
//! assert_eq!(drain.try_acquire().unwrap_err().reason(), Reason::Draining);
//! # Ok(()) }
//! ```
//!
//! # How it decides
//!
//! ```text
//!         close(grace)             grace is over                     all out, or cancel_wait is over
//!  Open ───────────────▶ Closing ────────────────▶ Cancelling ───────────────────▶ Done
//!    ▲                      └────────────── all are out ───────────────────────────▶ │
//!    └──────────────────────────────────── reopen() ─────────────────────────────────┘
//! ```
//!
//! * **Open** lets everybody in.
//! * **Closing** lets nobody in. What is in goes on, but begins nothing new: a call whose retry stands inside of the
//!   drain makes no further attempt, and one that waits in a queue inside of it is refused when its turn comes. A retry
//!   around the drain takes its refusal as final.
//! * **Cancelling** has told the rest to stop: [`cancel_token`](Drain::cancel_token) is cancelled with
//!   [`CancelReason::Shutdown`], and tasks of [`spawn`](Drain::spawn) are dropped.
//! * **Done** has a report: how many finished, how many only after they were told, and the names of those still in.
//!
//! Phase and count are one word, so nobody is let in after the step that closes, and nobody who was let in before it is
//! forgotten. The last one out ends the wait at once, however much grace is left.
//!
//! Closing goes on by itself: it is the service that closes and not the one who asked, so the future of
//! [`close`](Drain::close) may be dropped once it was polled. Closing again joins the closing that is on its way, and all
//! get the same report; of several graces the one that ends first holds. So a second SIGTERM can close with a grace of
//! zero, which cancels at once.
//!
//! | setting | default | why |
//! | --- | --- | --- |
//! | grace, of [`close`](Drain::close) | none | only you know what stops you: Kubernetes kills after 30 s, so 20 s |
//! | [`cancel_wait`](DrainBuilder::cancel_wait) | 5 s | to roll back and say goodbye; with those 20 s it ends before the kill |
//! | [`max_names`](DrainBuilder::max_names) | 4,096 | a bound of memory; who comes above it is counted without its name |
//! | [`named`](DrainBuilder::named) | `drain` | what refusals carry |
//!
//! # Where it stands
//!
//! At the edge, around what comes in: the requests that a server takes, the messages that a consumer takes. There it is
//! the outermost gate. Around calls that go out it would refuse what the requests in flight still need. What it lets in,
//! it counts:
//!
//! | to count | use | ends when cancelled |
//! | --- | --- | --- |
//! | a call under a policy | [`gate(drain.clone())`](crate::PolicyBuilder::gate) | with [`cancel_on`](crate::PolicyBuilder::cancel_on)`(&drain)` |
//! | a future | [`through(&drain)`](crate::FutureExt::through) | with [`cancelled_by`](crate::FutureExt::cancelled_by) its token |
//! | a piece of code, a stream, a connection | [`acquire`](Drain::acquire), [`track`](Drain::track) | if it looks at the token |
//! | a task | [`spawn`](Drain::spawn) | always |
//! | any of the gates above, by name | [`part`](Drain::part) | as above |
//!
//! # With a server
//!
//! [`closing`](Drain::closing) is the future by which axum's `with_graceful_shutdown` and a hyper connection's
//! `graceful_shutdown` are told to stop. What they then wait for has no bound: one open stream (server-sent events) holds
//! the server for ever, and an upgraded connection (a WebSocket) is not waited for at all. So give the server a place,
//! which it leaves when its last connection is closed, give each request one, which its body holds, and each WebSocket's
//! task one; and let streams end by the token. Then the bound is that of the drain, and whoever keeps to its seat is in
//! the report.
//!
//! ```text
//! let serving = axum::serve(listener, app).with_graceful_shutdown(drain.closing());
//! let place = drain.track("server")?;
//! tokio::spawn(async move { let served = serving.await; drop(place); served });
//!
//! terminate.recv().await;
//! println!("{}", drain.close(Duration::from_secs(20)).await);
//! ```
//!
//! The example `graceful` in the repository does all of that, under load.
//!
//! # Cancellation
//!
//! A guard, call or task that is dropped is out. One that is in flight and waits for the drain to close waits for itself,
//! until the bound has passed and it finds itself in the report: close from a task of its own.
//!
//! # Cost
//!
//! One compare-and-swap to enter, one subtraction to leave; no clock, no lock, no allocation. With a name, one reading of
//! the clock, two short locks and an entry in a register; [`track`](Drain::track) allocates the name's gate besides.
//! Closing spawns one task, which lives as long as the closing.
//!
//! # Not for
//!
//! Killing: a task that never yields cannot be dropped, and stays in the report. Limits on how much runs at once:
//! that is a [`Semaphore`](crate::Semaphore).

mod builder;
mod closing;
mod course;
mod job;
#[cfg(all(test, resile_loom))]
mod loom;
mod names;
mod part;
mod report;
mod word;

use std::borrow::Cow;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::call::Call;
use crate::cancel::{Cancel, CancelReason};
use crate::error::{Name, Reason, Refusal};
use crate::gate::{Entry, FastGate, Gate, Guard, Needs, Outcome, Pass, Times, by_reference};
use crate::guard::guarded;
use crate::internal::sync::{AcqRel, Acquire, AtomicU64, Mutex, Relaxed, Release};
use crate::internal::time::Moment;
use crate::said::{self, CancelSource};
use crate::verdict::Verdict;
use closing::{Closer, State};
use job::Job;
use names::Names;
use word::Word;

pub use builder::DrainBuilder;
pub use names::Held;
pub use part::DrainPart;
pub use report::Drained;

/// How far a drain has come.
///
/// ```
/// use resile::Phase;
/// assert!(Phase::Open < Phase::Closing && Phase::Closing < Phase::Cancelling && Phase::Cancelling < Phase::Done);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// It lets work in.
    Open,
    /// It lets nothing in; what is in has its grace.
    Closing,
    /// The grace is over: what is in was told to stop.
    Cancelling,
    /// The report is there.
    Done,
}

/// Lets work in and counts it until it is closed; see the [module](self).
///
/// A cheap handle: clones are the same drain.
#[derive(Clone)]
pub struct Drain(Arc<Shared>);

struct Shared {
    word: AtomicU64,
    state: Mutex<State>,
    names: Mutex<Names>,
    /// In nanoseconds.
    cancel_wait: u64,
    name: Name,
}

by_reference!(Drain);
guarded!(Drain, "place");

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

impl Drain {
    /// An open drain with the defaults.
    #[must_use]
    pub fn new() -> Self {
        DrainBuilder::new().into_drain()
    }

    /// Begins a drain with settings of its own.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::Drain;
    /// let drain = Drain::builder().named("api").cancel_wait(Duration::from_secs(2)).build()?;
    /// # Ok::<(), resile::ConfigError>(())
    /// ```
    pub const fn builder() -> DrainBuilder {
        DrainBuilder::new()
    }

    /// A gate of this drain whose passes have a name in the report: for a policy, a route, a kind of stream.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::{Drain, Policy};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::new();
    /// let policy = Policy::named("users").gate(drain.part("users")).build()?;
    /// let call = tokio::spawn(policy.into_run(|| std::future::pending::<Result<(), &str>>()));
    /// tokio::task::yield_now().await;
    ///
    /// assert_eq!(drain.close(Duration::ZERO).await.stuck()[0].name(), "users");
    /// # call.abort();
    /// # Ok(()) }
    /// ```
    pub fn part(&self, name: impl Into<Cow<'static, str>>) -> DrainPart {
        DrainPart::new(self.clone(), name.into().into())
    }

    /// Takes a place with a name; [`part`](Drain::part) and `try_acquire` in one.
    ///
    /// # Errors
    ///
    /// A refusal with [`Reason::Draining`] once it is closed.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Drain, Reason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::new();
    /// let stream = drain.track("sse")?;
    /// assert_eq!(drain.held()[0].name(), "sse");
    /// drop(stream);
    /// assert!(drain.close(Duration::from_secs(20)).await.is_clean());
    /// assert_eq!(drain.track("sse").unwrap_err().reason(), Reason::Draining);
    /// # Ok(()) }
    /// ```
    pub fn track(&self, name: impl Into<Cow<'static, str>>) -> Result<Guard, Refusal> {
        self.part(name).try_acquire()
    }

    /// Spawns a task that has a place with a name until its future is gone, and is dropped when the grace is over.
    ///
    /// The task ends in `Err` with the reason if it was cancelled. It is the service's and not a request's: it does not
    /// inherit the [context](crate::context) in which it is spawned. To do something about it instead of being dropped,
    /// [`track`](Drain::track) a task of your own and look at the [`cancel_token`](Drain::cancel_token) in it.
    ///
    /// # Errors
    ///
    /// A refusal with [`Reason::Draining`] once it is closed; the future is dropped then.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    ///
    /// ```
    /// # use resile::Drain;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::new();
    /// let task = drain.spawn("sum", async { 1 + 1 })?;
    /// assert_eq!(task.await?, Ok(2));
    /// # Ok(()) }
    /// ```
    pub fn spawn<F>(
        &self,
        name: impl Into<Cow<'static, str>>,
        future: F,
    ) -> Result<JoinHandle<Result<F::Output, CancelReason>>, Refusal>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let place = self.track(name)?;
        Ok(tokio::spawn(Job::new(future, &self.cancel_token(), place)))
    }

    /// The token that is cancelled with [`CancelReason::Shutdown`] when the grace is over.
    ///
    /// After [`reopen`](Drain::reopen) there is a new one, so ask for it where it is used; or hand the drain itself to
    /// [`cancel_on`](crate::PolicyBuilder::cancel_on), which follows its rounds.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::{CancelReason, Drain, Policy};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::new();
    /// let policy = Policy::named("users").gate(drain.clone()).build()?;
    /// let call = policy.call().cancel_on(&drain.cancel_token());
    /// let call = call.run(|| std::future::pending::<Result<(), &str>>());
    ///
    /// let (result, report) = tokio::join!(call, drain.close(Duration::from_secs(20)));
    /// assert_eq!(result.unwrap_err().cancel_reason(), Some(&CancelReason::Shutdown));
    /// assert_eq!(report.cancelled(), 1);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn cancel_token(&self) -> Cancel {
        self.0.state.lock().round.cancel.clone()
    }

    /// Closes: waits for what is in flight, cancels what is left when the grace is over, waits
    /// [`cancel_wait`](DrainBuilder::cancel_wait) more, and reports.
    ///
    /// It begins at the first poll. Where somebody else has begun, it joins: the grace that ends first holds, and the
    /// report is the same. Whoever waits here takes the closing on, so it ends in time although the runtime of the first
    /// caller stands still. When it is done already, that report is there at once. A grace of zero cancels at once; one of
    /// [`Duration::MAX`] waits as long as it takes, unless somebody closes again.
    ///
    /// # Cancel safety
    ///
    /// Dropped after its first poll, it changes nothing: the closing goes on.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime, before it has changed anything. If the runtime is shut down on the way, or has no time
    /// driver for a grace that ends, the closing ends at once with what is still in.
    ///
    /// Two closings are one, and the shorter grace holds:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Drain;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::new();
    /// let job = drain.spawn("reindex", std::future::pending::<()>())?;
    /// let first = tokio::spawn(drain.close(Duration::from_secs(20)));
    /// tokio::time::sleep(Duration::from_secs(1)).await;
    ///
    /// let report = drain.close(Duration::ZERO).await;
    /// assert_eq!((report.cancelled(), report.took()), (1, Duration::from_secs(1)));
    /// assert_eq!(first.await?, report);
    /// assert!(job.await?.is_err());
    /// # Ok(()) }
    /// ```
    pub fn close(&self, grace: Duration) -> impl Future<Output = Drained> + Send + 'static + use<> {
        let drain = self.clone();
        async move {
            let round = drain.0.close(grace);
            let mut closer = pin!(Closer::new(drain.0, round.clone(), grace));
            let mut ended = pin!(round.ended());
            poll_fn(|cx| {
                closer.as_mut().poll_drive(cx);
                ended.as_mut().poll(cx)
            })
            .await
        }
    }

    /// How far it has come.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.0.read().phase()
    }

    /// Waits until it takes no more work: what a server's graceful shutdown wants to be told by.
    ///
    /// Like every wait for a phase it is about this opening: a [`reopen`](Drain::reopen) in between doesn't hide it.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost if it is dropped.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Drain;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let drain = Drain::new();
    /// let server = tokio::spawn(drain.closing());
    /// drain.close(Duration::from_secs(20)).await;
    /// server.await.unwrap();
    /// # }
    /// ```
    pub fn closing(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.wait_for(Phase::Closing)
    }

    /// Waits until it has come to a phase, or past it. It is past [`Phase::Open`] from the beginning.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost if it is dropped.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Drain, Phase};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::new();
    /// let place = drain.acquire().await?;
    /// let closing = tokio::spawn(drain.close(Duration::from_secs(20)));
    ///
    /// let start = tokio::time::Instant::now();
    /// drain.wait_for(Phase::Cancelling).await;
    /// assert_eq!((drain.phase(), start.elapsed()), (Phase::Cancelling, Duration::from_secs(20)));
    /// drop(place);                                     // it has taken notice
    /// assert_eq!(closing.await?.cancelled(), 1);
    /// # Ok(()) }
    /// ```
    pub fn wait_for(&self, phase: Phase) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.0.round().reached(phase)
    }

    /// Waits for the report, without closing.
    ///
    /// # Cancel safety
    ///
    /// Nothing is lost if it is dropped.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Drain;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let drain = Drain::new();
    /// let (here, there) = tokio::join!(drain.closed(), drain.close(Duration::from_secs(20)));
    /// assert_eq!(here, there);
    /// # }
    /// ```
    pub fn closed(&self) -> impl Future<Output = Drained> + Send + 'static + use<> {
        self.0.round().ended()
    }

    /// Opens it again after it is done; whether it did. It can't be opened on the way.
    ///
    /// Whoever is still in from before is in flight again, and part of the next report.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Drain, Phase};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::new();
    /// assert!(!drain.reopen());
    ///
    /// drain.close(Duration::from_secs(20)).await;
    /// assert!(drain.reopen());
    /// assert_eq!(drain.phase(), Phase::Open);
    /// drain.try_acquire()?.success();
    /// # Ok(()) }
    /// ```
    #[must_use = "it stays closed if it is not done"]
    pub fn reopen(&self) -> bool {
        self.0.reopen()
    }

    /// How much is in flight.
    ///
    /// ```
    /// # use resile::Drain;
    /// let drain = Drain::new();
    /// let request = drain.try_acquire()?;
    /// let _job = drain.track("reindex")?;
    /// assert_eq!(drain.in_flight(), 2, "named or not");
    /// request.success();
    /// assert_eq!(drain.in_flight(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.0.read().in_flight()
    }

    /// What is in flight by name, one line for each, the one first that came first: for a page that shows what the
    /// closing waits for.
    ///
    /// ```
    /// # use resile::Drain;
    /// let drain = Drain::new();
    /// let streams = (drain.track("sse")?, drain.track("sse")?);
    /// assert_eq!((drain.held()[0].name(), drain.held()[0].count()), ("sse", 2));
    /// # Ok::<(), resile::Refusal>(())
    /// ```
    #[must_use]
    pub fn held(&self) -> Vec<Held> {
        let now = Moment::now();
        let lines = self.0.names.lock().all(now);
        Held::group(lines)
    }

    #[inline]
    fn count_in(&self) -> Option<Pass> {
        self.0.enter().then(Pass::default)
    }

    #[inline]
    fn count_out(&self) {
        if self.0.leave().was_last() {
            self.0.wake_driver();
        }
    }

    /// Cancelled when it closes, of this round.
    pub(crate) fn closing_token(&self) -> Cancel {
        self.0.round().closing.clone()
    }

    #[cold]
    pub(crate) fn refuse(&self) -> Refusal {
        Refusal::by(self.0.name.clone(), Reason::Draining)
    }
}

impl Shared {
    fn read(&self) -> Word {
        Word(self.word.load(Acquire))
    }

    fn round(&self) -> Arc<closing::Round> {
        self.state.lock().round.clone()
    }

    /// Whether it let one in.
    #[inline]
    fn enter(&self) -> bool {
        let mut seen = self.word.load(Relaxed);
        loop {
            let Some(next) = Word(seen).enter() else { return false };
            match self.word.compare_exchange_weak(seen, next.0, AcqRel, Relaxed) {
                Ok(_) => return true,
                Err(actual) => seen = actual,
            }
        }
    }

    /// One is out: the word from before. Whoever sees that it was the last one has to wake the driver, with no lock held.
    #[inline]
    #[must_use]
    fn leave(&self) -> Word {
        // Released, so that what was done in here is done for whoever reads the report.
        Word(self.word.fetch_sub(1, Release))
    }
}

/// A drain cancels when its grace is over. Calls that begin after a [`reopen`](Drain::reopen) wait for the new round, those
/// from before stay with theirs.
impl CancelSource for Drain {}

impl said::sealed::Sealed for Drain {
    fn source(&self) -> said::Source {
        said::Source::Rounds(Arc::new(self.clone()))
    }
}

impl said::Rounds for Drain {
    fn is_cancelled(&self) -> bool {
        self.phase() >= Phase::Cancelling && self.current().is_cancelled()
    }

    fn current(&self) -> Cancel {
        let (round, stopping) = self.0.stopping();
        if stopping {
            // The phase has moved, and whoever moved it is about to say so.
            round.cancel.cancel_with(CancelReason::Shutdown);
        }
        round.cancel.clone()
    }

    fn address(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

impl FastGate for Drain {
    const REVALIDATES: bool = true;

    #[inline]
    fn enter_now(&self, _: u32, _: Moment) -> Option<Pass> {
        self.count_in()
    }

    #[inline]
    fn leave_well(&self, _: Pass, _: Verdict, _: Times) {
        self.count_out();
    }
}

impl Gate for Drain {
    #[inline]
    fn enter(&self, _: &Call) -> Entry {
        self.count_in().map_or_else(|| Entry::Refused(self.refuse()), Entry::Pass)
    }

    #[inline]
    fn leave(&self, _: Pass, _: Outcome) {
        self.count_out();
    }

    /// After a wait: who has been let in, but has not begun, does not begin any more.
    fn still(&self, _: &Pass, _: &Call) -> Result<(), Refusal> {
        if self.phase() == Phase::Open { Ok(()) } else { Err(self.refuse()) }
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn name(&self) -> &str {
        self.0.name.as_str()
    }
}

impl fmt::Debug for Drain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.0.read();
        f.debug_struct("Drain")
            .field("name", &self.0.name)
            .field("phase", &word.phase())
            .field("in_flight", &word.in_flight())
            .finish_non_exhaustive()
    }
}
