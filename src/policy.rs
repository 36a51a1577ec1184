//! [`Policy`]: the steps that a call goes through, outermost first.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::TryFuture;

use crate::call::{Attempt, CallBuilder, CancelSource};
use crate::early::{EarlyEnd, Listeners, Tasks};
use crate::error::{ConfigError, Faults, Name};
use crate::gate::IntoGate;
use crate::lint::{self, Finding};
use crate::retry::Retry;
use crate::run::{Once, Plain, Run, WithCall};
use crate::said::{self, Said};
use crate::step::{Outline, Pipeline, Step, Steps, sealed};
use crate::verdict::ByResult;

/// How many steps a policy may have: far more than anybody can follow, and a kilobyte of frames per call.
const MOST_STEPS: usize = Outline::MOST;

/// An ordered list of steps around calls: plain data, cheap to clone, the same type whatever is in it.
///
/// The first step is the outermost. A timeout limits what stands inside of it, a retry repeats it, a gate admits each
/// passage. Steps may stand in any order and more than once; the [crate page](crate) has the order that serves most
/// services, and [`lint`](Policy::lint) says what a departure from it does. A policy never changes; clones share its
/// gates.
///
/// Up to eight steps need no allocation; a policy with more allocates once per call. More than 64 are a
/// [`ConfigError`].
///
/// ```
/// use std::time::Duration;
/// use resile::{CircuitBreaker, Policy, Retry, Semaphore, TokenBucket};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("users")
///     .timeout(Duration::from_secs(2))
///     .retry(Retry::exponential(Duration::from_millis(50)))
///     .gate(CircuitBreaker::builder().failure_rate(0.5))
///     .gate(TokenBucket::per_second(500).burst(50))
///     .gate(Semaphore::permits(64).max_queue(128))
///     .timeout(Duration::from_millis(300))
///     .build()?;
///
/// assert_eq!(
///     policy.to_string(),
///     "users: timeout 2s → retry ×3 exponential 50ms → breaker 50 % of 20 in 10s → bucket 500/s burst 50 → semaphore 64 → timeout 300ms"
/// );
/// assert_eq!(policy.run(|| async { Ok::<_, std::io::Error>(42) }).await?, 42);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Policy(Arc<Inner>);

struct Inner {
    name: Name,
    outline: Outline,
    steps: Box<[Step]>,
    tasks: OnceLock<Tasks>,
}

impl sealed::Sealed for Policy {}
impl sealed::Sealed for &Policy {}

impl Steps for Policy {
    #[inline]
    fn pipeline(&self) -> Pipeline<'_> {
        Pipeline { steps: &self.0.steps, outline: &self.0.outline }
    }
}

impl Steps for &Policy {
    #[inline]
    fn pipeline(&self) -> Pipeline<'_> {
        (**self).pipeline()
    }
}

impl Policy {
    /// Begins a policy. The name is for people: it stands in drawings and in the errors of [`build`](PolicyBuilder::build).
    pub fn named(name: impl Into<Cow<'static, str>>) -> PolicyBuilder {
        let name = Name::from(name.into());
        PolicyBuilder {
            faults: Faults::of(if name.as_str().is_empty() {
                "policy".into()
            } else {
                format!("policy {}", name.as_str())
            }),
            name,
            steps: Vec::new(),
            said: None,
            listeners: None,
            min_attempt: None,
        }
    }

    /// Begins a policy without a name. Its errors and drawings don't say which policy they are about, so a
    /// [name](Policy::named) is better wherever there are several.
    ///
    /// ```
    /// let policy = resile::Policy::builder().build()?;
    /// assert_eq!(policy.name(), "");
    /// # Ok::<(), resile::ConfigError>(())
    /// ```
    pub fn builder() -> PolicyBuilder {
        Self::named("")
    }

    /// The cleanups and shielded operations of its calls that go on although their callers have left.
    #[must_use]
    pub fn tasks(&self) -> &Tasks {
        self.0.tasks.get_or_init(Tasks::new)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.name.as_str()
    }

    /// Runs an operation: any closure that makes a future of a `Result`. It is called once per attempt.
    ///
    /// The result is judged as [`ByResult`] says; [`classify`](Policy::classify) takes another judge. The closure may
    /// borrow, and so may an `async` closure; an `async move` closure that owns what its future uses is no operation,
    /// since the future would borrow the closure: clone inside of it instead.
    ///
    /// # Errors
    ///
    /// The future resolves to an [`Error`](crate::Error) when the operation failed and was not tried again, when a
    /// limit passed, when a gate refused, or when the caller cancelled.
    ///
    /// # Cancel safety
    ///
    /// The future can be dropped at any time; see [`Run`].
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = resile::Policy::named("users").build()?;
    /// let names = vec!["ann", "bob"];
    /// let first = policy.run(async || names.first().copied().ok_or("nobody")).await;
    /// assert_eq!(first.unwrap(), "ann");
    /// # Ok(()) }
    /// ```
    #[inline]
    pub fn run<O, F>(&self, operation: O) -> Run<&Self, Plain<O>, F, ByResult>
    where
        O: FnMut() -> F,
        F: TryFuture,
    {
        self.call().run(operation)
    }

    /// Runs an operation that sees its [`Attempt`]: the number, the deadline, what is left.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use std::time::Duration;
    /// let policy = resile::Policy::named("users").timeout(Duration::from_secs(1)).build()?;
    /// let left = policy.run_with(|call| async move { Ok::<_, std::io::Error>(call.remaining()) }).await?;
    /// assert_eq!(left, Duration::from_secs(1));
    /// # Ok(()) }
    /// ```
    #[inline]
    pub fn run_with<O, F>(&self, operation: O) -> Run<&Self, WithCall<O>, F, ByResult>
    where
        O: FnMut(Attempt) -> F,
        F: TryFuture,
    {
        self.call().run_with(operation)
    }

    /// Runs a future that cannot be made twice: as [`run`](Policy::run), but retries are treated as absent.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use resile::{Policy, Retry, Stop};
    /// let policy = Policy::named("users").retry(Retry::immediate()).build()?;
    /// let error = policy.run_once(async { Err::<(), _>("down") }).await.unwrap_err();
    /// assert_eq!((error.attempts(), error.stop()), (1, Stop::NoRetry));
    /// # Ok(()) }
    /// ```
    #[inline]
    pub fn run_once<F: TryFuture>(&self, future: F) -> Run<&Self, Once, F, ByResult> {
        self.call().run_once(future)
    }

    /// As [`run_with`](Policy::run_with), with a future that owns its policy.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = resile::Policy::named("users").build()?;
    /// let call = policy.into_run_with(|call| async move { Ok::<_, std::io::Error>(call.attempt()) });
    /// assert_eq!(tokio::spawn(call).await??, 1);
    /// # Ok(()) }
    /// ```
    pub fn into_run_with<O, F>(self, operation: O) -> Run<Self, WithCall<O>, F, ByResult>
    where
        O: FnMut(Attempt) -> F,
        F: TryFuture,
    {
        CallBuilder::new(self, ByResult).run_with(operation)
    }

    /// As [`run`](Policy::run), with a future that owns its policy: for `tokio::spawn` and for futures with a name.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = resile::Policy::named("users").build()?;
    /// let task = tokio::spawn(policy.clone().into_run(|| async { Ok::<_, std::io::Error>(42) }));
    /// assert_eq!(task.await??, 42);
    /// # Ok(()) }
    /// ```
    pub fn into_run<O, F>(self, operation: O) -> Run<Self, Plain<O>, F, ByResult>
    where
        O: FnMut() -> F,
        F: TryFuture,
    {
        CallBuilder::new(self, ByResult).run(operation)
    }

    /// The same policy with a judge of its own: a closure over `&Result<T, E>` (which has to say its argument's type),
    /// or anything that implements [`Classify`](crate::Classify).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use resile::{Policy, Retry, Verdict};
    /// let policy = Policy::named("users").retry(Retry::immediate()).build()?;
    ///
    /// let tried = std::cell::Cell::new(0);
    /// let status = policy
    ///     .classify(|status: &Result<u16, std::io::Error>| match status {
    ///         Ok(503) => Verdict::Overloaded(None),
    ///         Ok(_) => Verdict::Success,
    ///         Err(_) => Verdict::Transient(None),
    ///     })
    ///     .run(|| async { tried.set(tried.get() + 1); Ok(503) })
    ///     .await?;
    /// assert_eq!((status, tried.get()), (503, 3), "the last answer comes back, bad as it is");
    /// # Ok(()) }
    /// ```
    pub const fn classify<C>(&self, judge: C) -> Judged<'_, C> {
        Judged { policy: self, judge }
    }

    /// Begins a call about which more is to be said; see [`CallBuilder`].
    #[inline]
    pub const fn call(&self) -> CallBuilder<&Self, ByResult> {
        CallBuilder::new(self, ByResult)
    }

    /// What stands in an unusual place or is missing, each with a sentence on what will happen. Nothing is forbidden.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::{Lint, Policy, Retry};
    ///
    /// let policy = Policy::named("users")
    ///     .timeout(Duration::from_secs(1))
    ///     .retry(Retry::exponential(Duration::from_millis(50)))
    ///     .timeout(Duration::from_secs(1))
    ///     .build()?;
    /// let kinds: Vec<Lint> = policy.lint().iter().map(|finding| finding.lint()).collect();
    /// assert_eq!(kinds, [Lint::RetryWithoutBudget, Lint::AttemptsOutlastCall, Lint::AttemptNotShorter]);
    /// # Ok::<(), resile::ConfigError>(())
    /// ```
    #[must_use]
    pub fn lint(&self) -> Vec<Finding> {
        lint::lint(&self.0.steps)
    }
}

/// Draws the pipeline on one line.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.name().is_empty() {
            write!(f, "{}: ", self.name())?;
        }
        for (place, step) in self.0.steps.iter().enumerate() {
            f.write_str(if place == 0 { "" } else { " → " })?;
            step.fmt(f)?;
        }
        f.write_str(if self.0.steps.is_empty() { "no steps" } else { "" })?;
        f.write_str(if self.0.outline.said.is_some() { ", can be cancelled" } else { "" })
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy").field("name", &self.0.name).field("steps", &self.0.steps).finish_non_exhaustive()
    }
}

/// Collects steps, outermost first; see [`Policy`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct PolicyBuilder {
    name: Name,
    steps: Vec<Step>,
    faults: Faults,
    said: Option<Arc<Said>>,
    listeners: Option<Listeners>,
    min_attempt: Option<Duration>,
}

impl PolicyBuilder {
    /// Limits what stands inside of it, from when the call comes by: as the first step the whole call, inside of a retry
    /// one attempt. [`Duration::MAX`] is no limit; a limit of zero is a [`ConfigError`].
    ///
    /// tokio's timers have a grain of a millisecond: a limit never fires early, and up to two milliseconds late.
    ///
    /// Around a retry it limits the whole call, within one it limits each attempt:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Limit, Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (second, tenth) = (Duration::from_secs(1), Duration::from_millis(100));
    /// let policy = Policy::named("users")
    ///     .timeout(second)
    ///     .retry(Retry::constant(tenth).max_attempts(100))
    ///     .timeout(3 * tenth)
    ///     .build()?;
    /// let error = policy.run(|| std::future::pending::<Result<(), &str>>()).await.unwrap_err();
    /// assert_eq!(error.attempts(), 2, "from 0 and 400 ms on: at 800, less is left than the first two took");
    /// assert_eq!(error.limit(), Some(Limit::Step { step: 3, limit: 3 * tenth }));
    /// # Ok(()) }
    /// ```
    pub fn timeout(mut self, limit: Duration) -> Self {
        if limit.is_zero() {
            let mut faults = Faults::of("timeout");
            faults.check(false, "limit", &limit, "above 0");
            let Err(fault) = faults.into_result() else { unreachable!("one was noted") };
            self.faulty(fault);
        } else {
            self.steps.push(Step::timeout(limit));
        }
        self
    }

    /// Repeats what stands inside of it.
    pub fn retry(mut self, retry: Retry) -> Self {
        match retry.build() {
            Ok(plan) => self.steps.push(Step::retry(plan)),
            Err(faults) => self.faulty(faults),
        }
        self
    }

    /// Admits each passage through a gate. Takes a gate, whose state it then shares with whoever else has a handle of
    /// it, or the builder of one.
    ///
    /// ```
    /// # use resile::{Policy, Reason, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let connections = Semaphore::permits(1).max_queue(0).build()?;
    /// let reads = Policy::named("reads").gate(connections.clone()).build()?;
    /// let writes = Policy::named("writes").gate(connections).build()?;
    ///
    /// let read = tokio::spawn(reads.into_run(|| std::future::pending::<Result<(), &str>>()));
    /// tokio::task::yield_now().await;
    /// let error = writes.run(|| async { Ok::<_, &str>(42) }).await.unwrap_err();
    /// assert_eq!(error.refusal().unwrap().reason(), Reason::QueueFull, "one connection for both");
    /// # read.abort();
    /// # Ok(()) }
    /// ```
    pub fn gate(mut self, gate: impl IntoGate) -> Self {
        match gate.into_gate() {
            Ok(gate) => self.steps.push(Step::gate(gate)),
            Err(faults) => self.faulty(faults),
        }
        self
    }

    /// How much time an operation needs: one that would have less before its deadline is not made. The call ends as
    /// [`Reason::TooLate`](crate::Reason::TooLate), its passes come back, and no gate takes it for a failure of the peer.
    ///
    /// By default the policy learns this time from its recent operations, and asks only where a call has waited at a gate
    /// or repeats an attempt. Without that, a peer at its capacity would work for callers who are gone before the answer
    /// comes. The learned time follows slower operations quickly and faster ones slowly, and is at most the shortest limit
    /// of the policy. A time set here is used as it is and applies to every operation; zero switches the rule off.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Reason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("reports").min_attempt(Duration::from_millis(200)).build()?;
    /// let late = policy.call().deadline(Duration::from_millis(50));
    /// let error = late.run(|| async { Ok::<_, &str>(42) }).await.unwrap_err();
    /// assert_eq!((error.refusal().unwrap().reason(), error.attempts()), (Reason::TooLate, 0));
    /// # Ok(()) }
    /// ```
    pub fn min_attempt(mut self, time: Duration) -> Self {
        self.min_attempt = Some(time);
        self
    }

    /// Cancels every call under the policy when the token is cancelled, wherever this is said: it is no step. May be said
    /// of several tokens.
    ///
    /// ```
    /// use resile::{Cancel, CancelReason, Policy};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let shutdown = Cancel::new();
    /// let policy = Policy::named("users").cancel_on(&shutdown).build()?;
    ///
    /// shutdown.cancel_with(CancelReason::Shutdown);
    /// let error = policy.run(|| async { Ok::<_, std::io::Error>(42) }).await.unwrap_err();
    /// assert_eq!(error.cancel_reason(), Some(&CancelReason::Shutdown));
    /// # Ok(()) }
    /// ```
    pub fn cancel_on(mut self, source: &impl CancelSource) -> Self {
        said::own(&mut self.said).watch(source);
        self
    }

    /// Tells of each call that ends [early](crate::early): dropped, cancelled, out of time, or with a panic. May be said
    /// several times.
    ///
    /// The listener is called when everything has gone back and no lock is held, wherever the call happens to end,
    /// perhaps in a drop outside of the runtime. It must be short and must not block. If it panics, those that were added
    /// after it are not told, and while a panic of the operation unwinds, its own aborts the process.
    pub fn on_early_end(mut self, tell: impl Fn(&EarlyEnd<'_>) + Send + Sync + 'static) -> Self {
        self.listeners.get_or_insert_with(|| Listeners::of(self.name.clone())).add(Arc::new(tell));
        self
    }

    /// Keeps the place of a step that could not be built, so that those after it are counted right.
    fn faulty(&mut self, faults: ConfigError) {
        let place = self.steps.len() + 1;
        self.faults.absorb(|own, part| format!("{own}: step {place} ({part})"), faults);
        self.steps.push(Step::timeout(Duration::MAX));
    }

    /// The policy.
    ///
    /// # Errors
    ///
    /// Every wrong setting of every step, all at once; more than 64 steps; or a `min_attempt` longer than the shortest
    /// time limit, which would refuse every call.
    pub fn build(mut self) -> Result<Policy, ConfigError> {
        let count = self.steps.len();
        self.faults.check(count <= MOST_STEPS, "steps", &count, "0 to 64");
        if let Some(time) = self.min_attempt {
            let shortest = self.steps.iter().filter_map(Step::limit).map(Duration::from_nanos).min();
            let most = shortest.unwrap_or(Duration::MAX);
            self.faults.check(time <= most, "min_attempt", &time, format!("0 to {most:?}, the shortest limit"));
        }
        self.faults.into_result()?;
        let outline =
            Outline::of(&self.steps, self.said, self.listeners).of_policy(&self.name, &self.steps, self.min_attempt);
        Ok(Policy(Arc::new(Inner { name: self.name, outline, steps: self.steps.into(), tasks: OnceLock::new() })))
    }
}

/// A policy with a judge; from [`Policy::classify`]. It is `Copy` if its judge is, so that it can be used again.
///
/// ```
/// # use resile::{Policy, Retry, Verdict};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("users").retry(Retry::immediate()).build()?;
/// let http = policy.classify(|status: &Result<u16, std::io::Error>| match status {
///     Ok(500..) => Verdict::Transient(None),
///     Ok(400..) => Verdict::Permanent,
///     _ => Verdict::Success,
/// });
/// assert_eq!(http.run(|| async { Ok(200) }).await?, 200);
/// assert_eq!(http.call().cost(2).run(|| async { Ok(404) }).await?, 404);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use = "a policy does nothing until something is run"]
pub struct Judged<'a, C> {
    policy: &'a Policy,
    judge: C,
}

impl<'a, C> Judged<'a, C> {
    /// Runs an operation; see [`Policy::run`].
    #[inline]
    pub fn run<O, F>(self, operation: O) -> Run<&'a Policy, Plain<O>, F, C>
    where
        O: FnMut() -> F,
        F: TryFuture,
    {
        self.call().run(operation)
    }

    /// Runs an operation that sees its call; see [`Policy::run_with`].
    #[inline]
    pub fn run_with<O, F>(self, operation: O) -> Run<&'a Policy, WithCall<O>, F, C>
    where
        O: FnMut(Attempt) -> F,
        F: TryFuture,
    {
        self.call().run_with(operation)
    }

    /// Runs a future that cannot be made twice; see [`Policy::run_once`].
    #[inline]
    pub fn run_once<F: TryFuture>(self, future: F) -> Run<&'a Policy, Once, F, C> {
        self.call().run_once(future)
    }

    /// Runs an operation with a future that owns its policy; see [`Policy::into_run`]. Cost: one `Arc` clone.
    pub fn into_run<O, F>(self, operation: O) -> Run<Policy, Plain<O>, F, C>
    where
        O: FnMut() -> F,
        F: TryFuture,
    {
        self.call().owned().run(operation)
    }

    /// Runs an operation that sees its call, with a future that owns its policy; see [`Policy::into_run_with`].
    pub fn into_run_with<O, F>(self, operation: O) -> Run<Policy, WithCall<O>, F, C>
    where
        O: FnMut(Attempt) -> F,
        F: TryFuture,
    {
        self.call().owned().run_with(operation)
    }

    /// Begins a call about which more is to be said; see [`CallBuilder`].
    #[inline]
    pub fn call(self) -> CallBuilder<&'a Policy, C> {
        CallBuilder::new(self.policy, self.judge)
    }
}
