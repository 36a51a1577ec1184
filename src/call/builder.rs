//! [`CallBuilder`]: what a caller says about one call.

use std::borrow::Borrow;
use std::cell::Cell;

use futures::future::TryFuture;

use super::{Attempt, Call, Deadline, Key, Origin, Priority, When};
use crate::internal::time::{Moment, nanos};
use crate::policy::{Policy, Steps};
use crate::run::{Once, Plain, Run, WithCall};
use crate::said::CancelSource;
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

impl<P: Steps, C> CallBuilder<P, C> {
    #[inline]
    pub(crate) const fn new(policy: P, judge: C) -> Self {
        Self { policy, judge, call: Call::new() }
    }

    /// Names what the call is about, for gates that work by key. A key given twice has the later value.
    pub fn key(mut self, name: &'static str, value: impl Into<Key>) -> Self {
        self.call.set_key(name, value.into());
        self
    }

    /// How many permits or tokens the call takes at each gate: 1 unless said. A cost of 0 takes no permits, and is refused
    /// where tokens are counted.
    pub const fn cost(mut self, cost: u32) -> Self {
        self.call.cost = cost;
        self
    }

    /// How important the call is: as the [context](crate::context) says unless said, else [`Priority::Normal`].
    pub const fn priority(mut self, priority: Priority) -> Self {
        self.call.priority = Some(priority);
        self
    }

    /// When the call must be over, whatever the policy allows. A [`Duration`](std::time::Duration) counts from the first poll.
    ///
    /// Of a deadline and a policy's timeout the earlier one wins. When it is the caller's that passes, gates hear that
    /// the call was abandoned, which is no failure of the peer.
    pub fn deadline(mut self, deadline: impl Into<Deadline>) -> Self {
        (self.call.deadline, self.call.origin) = match deadline.into().0 {
            When::After(after) => (Moment::from_nanos(nanos(after)), Origin::FirstPoll),
            When::At(at) => (at, Origin::Caller),
        };
        self
    }

    /// Cancels the call when the token is cancelled. Of several tokens the first one counts.
    ///
    /// A call whose operation is ready in the same poll succeeds all the same.
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
    pub fn owned(self) -> CallBuilder<Policy, C> {
        CallBuilder { policy: self.policy.clone(), judge: self.judge, call: self.call }
    }
}
