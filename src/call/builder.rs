//! [`CallBuilder`]: what a caller says about one call.

use std::borrow::Borrow;
use std::cell::Cell;

use futures::future::TryFuture;

use super::{Attempt, Call, Deadline, Key, Priority};
use crate::policy::Policy;
use crate::run::{Once, Plain, Run, WithCall};
use crate::said::CancelSource;
use crate::step::Steps;
use crate::verdict::Settled;

/// A call about to be made, with whatever its caller says about it; from [`Policy::call`].
///
/// ```
/// use std::time::Duration;
/// use resile::{ErrorKind, Policy, Priority};
/// use tokio_util::sync::CancellationToken;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("users").build()?;
/// let shutdown = CancellationToken::new();
/// shutdown.cancel();
///
/// let error = policy
///     .call()
///     .key("tenant", "acme")
///     .priority(Priority::High)
///     .cost(3)
///     .deadline(Duration::from_secs(1))
///     .cancel_on(&shutdown)
///     .run(|| async { Ok::<_, std::io::Error>(42) })
///     .await
///     .unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Cancelled);
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "a call does nothing until it is run"]
pub struct CallBuilder<P, C> {
    policy: P,
    judge: C,
    call: Call,
}

/// For calls that are alike: say everything once, and clone it for each.
///
/// ```
/// # use std::time::Duration;
/// # use resile::Policy;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("users").build()?;
/// let call = policy.call().key("tenant", "acme").deadline(Duration::from_secs(1));
/// for id in 0..3 {
///     assert_eq!(call.clone().run(|| async { Ok::<_, std::io::Error>(id) }).await?, id);
/// }
/// # Ok(()) }
/// ```
impl<P: Clone, C: Clone> Clone for CallBuilder<P, C> {
    fn clone(&self) -> Self {
        Self { policy: self.policy.clone(), judge: self.judge.clone(), call: self.call.duplicate() }
    }
}

impl<P: Steps, C> CallBuilder<P, C> {
    #[inline]
    pub(crate) const fn new(policy: P, judge: C) -> Self {
        Self { policy, judge, call: Call::new() }
    }

    /// Names what the call is about, for gates that work by key. A key given twice has the later value.
    ///
    /// ```
    /// # use resile::{Keyed, Policy, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let per_tenant = Keyed::by("tenant", Semaphore::permits(1).max_queue(0)).build()?;
    /// let policy = Policy::named("api").gate(per_tenant).build()?;
    /// let acme = policy.call().key("tenant", "acme").owned();
    /// let task = tokio::spawn(acme.run(|| std::future::pending::<Result<(), &str>>()));
    /// tokio::task::yield_now().await;
    ///
    /// assert!(policy.call().key("tenant", "acme").run(|| async { Ok::<_, &str>(42) }).await.is_err());
    /// assert!(policy.call().key("tenant", "other").run(|| async { Ok::<_, &str>(42) }).await.is_ok());
    /// # task.abort();
    /// # Ok(()) }
    /// ```
    pub fn key(mut self, name: &'static str, value: impl Into<Key>) -> Self {
        self.call.set_key(name, value.into());
        self
    }

    /// How many permits or tokens the call takes at each gate: 1 by default. A cost of 0 takes no permits, and is refused
    /// where tokens are counted.
    ///
    /// ```
    /// # use resile::{Policy, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let memory = Semaphore::permits(100).build()?;
    /// let policy = Policy::named("uploads").gate(memory.clone()).build()?;
    /// let in_use = policy.call().cost(30).run(|| async { Ok::<_, std::io::Error>(memory.in_use()) }).await?;
    /// assert_eq!(in_use, 30);
    /// # Ok(()) }
    /// ```
    pub const fn cost(mut self, cost: u32) -> Self {
        self.call.cost = cost;
        self
    }

    /// How important the call is. By default it has the priority of its [context](crate::context), else
    /// [`Priority::Normal`].
    ///
    /// For a gate of your own that sheds load:
    ///
    /// ```
    /// # use resile::{Call, Entry, Gate, Outcome, Pass, Policy, Priority, Reason, Refusal};
    /// struct Busy;
    /// impl Gate for Busy {
    ///     fn enter(&self, call: &Call) -> Entry {
    ///         if call.priority() < Priority::Normal {
    ///             return Entry::Refused(Refusal::new("busy", Reason::Other("not now")));
    ///         }
    ///         Entry::Pass(Pass::default())
    ///     }
    ///     fn leave(&self, _: Pass, _: Outcome) {}
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("api").gate(Busy).build()?;
    /// let answer = || async { Ok::<_, &str>(42) };
    /// assert!(policy.call().priority(Priority::Low).run(answer).await.is_err());
    /// assert!(policy.run(answer).await.is_ok());
    /// # Ok(()) }
    /// ```
    pub const fn priority(mut self, priority: Priority) -> Self {
        self.call.priority = Some(priority);
        self
    }

    /// When the call must be over, whatever the policy allows. A [`Duration`](std::time::Duration) counts from the first
    /// poll. Of several deadlines the earliest counts, as in a [context](crate::context).
    ///
    /// Of a deadline and a policy's timeout the earlier one wins. When it is the caller's that passes, gates hear that
    /// the call was abandoned, which is no failure of the peer.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, Limit, Policy, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).build()?;
    /// let policy = Policy::named("users").timeout(Duration::from_secs(5)).gate(breaker.clone()).build()?;
    ///
    /// let call = policy.call().deadline(Duration::from_millis(50));
    /// let error = call.run(|| std::future::pending::<Result<(), &str>>()).await.unwrap_err();
    /// assert_eq!(error.limit(), Some(Limit::Caller), "the earlier one");
    /// assert_eq!(breaker.state(), State::Closed, "the caller was impatient, the peer not slow");
    /// # Ok(()) }
    /// ```
    pub fn deadline(mut self, deadline: impl Into<Deadline>) -> Self {
        self.call.narrow(deadline.into());
        self
    }

    /// Cancels the call when the token is cancelled. Of several tokens the first one counts.
    ///
    /// A call whose operation is ready in the same poll succeeds all the same.
    ///
    /// ```
    /// # use resile::{Cancel, CancelReason, Policy};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let client = Cancel::new();
    /// let policy = Policy::named("users").build()?;
    /// let call = policy.call().cancel_on(&client).run(|| std::future::pending::<Result<(), &str>>());
    /// let (end, _) = tokio::join!(call, async { client.cancel_with(CancelReason::ClientGone) });
    /// assert_eq!(end.unwrap_err().cancel_reason(), Some(&CancelReason::ClientGone));
    /// # Ok(()) }
    /// ```
    pub fn cancel_on(mut self, source: &impl CancelSource) -> Self {
        self.call.watch(source);
        self
    }

    /// Has the call inherit nothing from the [context](crate::context) of the task: for what must go on although the
    /// request is over.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::Policy;
    /// use resile::context::{self, Context};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("audit").build()?;
    /// context::scope(Context::new().deadline(Duration::from_millis(10)), async {
    ///     let written = policy.call().detached().run_with(|call| async move { Ok::<_, ()>(call.remaining()) });
    ///     assert_eq!(written.await.unwrap(), Duration::MAX);
    /// })
    /// .await;
    /// # Ok(()) }
    /// ```
    pub const fn detached(mut self) -> Self {
        self.call.detached = true;
        self
    }

    /// Has the call refused at gates where it would have to wait.
    ///
    /// ```
    /// # use resile::{Policy, Reason, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let semaphore = Semaphore::permits(1).build()?;
    /// let policy = Policy::named("users").gate(semaphore.clone()).build()?;
    /// let _held = semaphore.acquire().await?;
    /// let error = policy.call().no_wait().run(|| async { Ok::<_, &str>(42) }).await.unwrap_err();
    /// assert_eq!(error.refusal().unwrap().reason(), Reason::Busy);
    /// assert_eq!(semaphore.queued(), 0);
    /// # Ok(()) }
    /// ```
    pub const fn no_wait(mut self) -> Self {
        self.call.patient = Cell::new(false);
        self
    }

    /// Judges the results; see [`Policy::classify`].
    pub fn classify<J>(self, judge: J) -> CallBuilder<P, J> {
        CallBuilder { policy: self.policy, judge, call: self.call }
    }

    /// Says what an attempt has really cost, read from its result: bytes, tokens of a model, money. To be said after
    /// [`classify`](Self::classify), which names another judge.
    ///
    /// The limiters of the policy took the [`cost`](Self::cost) that was estimated; they put the difference back, or take
    /// it although it is not there, see [`Guard::settle`](crate::Guard::settle). An attempt without a result, since it was
    /// cut or dropped, has cost what was estimated. A limiter outside of a retry is told of each attempt, and goes by the
    /// last. Those inside of a [`Keyed`](crate::Keyed), [`Layers`](crate::Layers) or [`Fair`](crate::Fair) are told too.
    ///
    /// ```
    /// use resile::{Policy, TokenBucket};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bytes = TokenBucket::per_second(1000).burst(500).build()?;
    /// let policy = Policy::named("pages").gate(bytes.clone()).build()?;
    /// policy
    ///     .call()
    ///     .cost(100)
    ///     .settle(|page: &Result<&str, std::io::Error>| page.as_ref().map_or(0, |page| page.len() as u32))
    ///     .run(|| async { Ok("a short page") })
    ///     .await?;
    /// assert_eq!(bytes.peek(), 488);
    /// # Ok(()) }
    /// ```
    pub fn settle<S>(self, cost: S) -> CallBuilder<P, Settled<C, S>> {
        CallBuilder { policy: self.policy, judge: Settled { judge: self.judge, cost }, call: self.call }
    }

    /// Runs the operation; see [`Policy::run`].
    #[inline]
    pub fn run<O, F>(self, operation: O) -> Run<P, Plain<O>, F, C>
    where
        O: FnMut() -> F,
        F: TryFuture,
    {
        self.run_as(Plain(operation), None)
    }

    /// Runs an operation that sees its call; see [`Policy::run_with`].
    #[inline]
    pub fn run_with<O, F>(self, operation: O) -> Run<P, WithCall<O>, F, C>
    where
        O: FnMut(Attempt) -> F,
        F: TryFuture,
    {
        self.run_as(WithCall(operation), None)
    }

    /// Runs a future that cannot be made twice; see [`Policy::run_once`].
    #[inline]
    pub fn run_once<F: TryFuture>(self, future: F) -> Run<P, Once, F, C> {
        self.run_as(Once, Some(future))
    }

    #[inline]
    pub(crate) fn run_as<O, F: TryFuture>(self, make: O, operation: Option<F>) -> Run<P, O, F, C> {
        Run::new(self.policy, self.judge, self.call, make, operation)
    }
}

impl<P: Borrow<Policy>, C> CallBuilder<P, C> {
    pub(crate) fn policy(&self) -> &Policy {
        self.policy.borrow()
    }

    pub(crate) fn into_parts(self) -> (P, C, Call) {
        (self.policy, self.judge, self.call)
    }
}

impl<C> CallBuilder<&Policy, C> {
    /// The same as a call that owns its policy, for `tokio::spawn` and for futures with a name.
    ///
    /// Cost: one `Arc` clone.
    ///
    /// ```
    /// # use resile::Policy;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("users").build()?;
    /// let call = policy.call().cost(2).owned();
    /// drop(policy);
    /// let task = tokio::spawn(call.run(|| async { Ok::<_, std::io::Error>(42) }));
    /// assert_eq!(task.await??, 42);
    /// # Ok(()) }
    /// ```
    pub fn owned(self) -> CallBuilder<Policy, C> {
        CallBuilder { policy: self.policy.clone(), judge: self.judge, call: self.call }
    }
}
