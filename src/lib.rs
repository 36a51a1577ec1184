//! Retry, deadlines, circuit breakers, limits, cancellation and an orderly shutdown for any future, in one flat machine
//! that gives everything back when a call ends early.
//!
//! ```
//! use std::time::Duration;
//! use resile::{CircuitBreaker, Policy, Retry, RetryBudget, Semaphore, TokenBucket};
//! # #[derive(Debug, thiserror::Error)] #[error("reset")] struct Reset;
//! # struct Client;
//! # impl Client { async fn get_user(&self, id: u32) -> Result<u32, Reset> { Ok(id) } }
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let client = Client;
//! let policy = Policy::named("users")
//!     .timeout(Duration::from_secs(2))                                   // the whole call
//!     .retry(Retry::exponential(Duration::from_millis(50))
//!         .max_attempts(4)
//!         .budget(RetryBudget::ratio(0.1).build()?))
//!     .gate(CircuitBreaker::builder().failure_rate(0.5).min_calls(20))   // each attempt, from here on
//!     .gate(TokenBucket::per_second(500).burst(50))
//!     .gate(Semaphore::permits(64).max_queue(128))
//!     .timeout(Duration::from_millis(300))                               // one attempt
//!     .build()?;                                                         // every wrong setting is told here
//!
//! let user = policy.run(|| client.get_user(42)).await?;
//! # assert_eq!(user, 42);
//! # Ok(()) }
//! ```
//!
//! # The parts
//!
//! **A call and what became of it**
//!
//! | part | use it when |
//! | --- | --- |
//! | [`Policy`] | you call something over a network: it holds the steps below, in your order |
//! | timeout ([step](PolicyBuilder::timeout), [`FutureExt::within`]) | always: once around the whole call, once around an attempt |
//! | [`Retry`], [`Backoff`], [`Jitter`] | failures pass by themselves and trying again does no harm |
//! | [`RetryBudget`] | an outage must not be multiplied by the retries of everybody |
//! | [`CircuitBreaker`] | the peer can be down, and waiting for it costs more than a quick no |
//! | [`Verdict`], [`Classify`] | `Err` is not always a failure of the peer, or `Ok` not always a success |
//! | [`Error`], [`Refusal`], [`ConfigError`] | you want to know what happened |
//! | [`CallBuilder`], [`Attempt`] | there is more to say about one call (cost, keys, deadline), or the operation wants to know |
//! | [`Guard`], [`FutureExt`] | a gate or a limit for a piece of code that is no call under a policy |
//!
//! **Limits**
//!
//! | part | use it when |
//! | --- | --- |
//! | [`TokenBucket`] | the peer allows so many calls per second |
//! | [`LeakyBucket`], [`SlidingWindow`], [`Quota`] | it counts otherwise: evenly, over the last so long, or by the calendar ([which?](rate)) |
//! | [`Semaphore`] | the peer can do so many things at once |
//! | [`Keyed`] | each tenant, user or peer is to have a gate of its own, in bounded memory |
//! | [`Fair`] | many share one limit, and the backlog of one must not hold up the others |
//! | [`Layers`] | several limits hold for one call, and a refusal by one must not be charged by the others |
//! | [`Snapshot`], [`LimitFields`] | you tell your own callers what is left to them |
//! | [`Gate`] | you have a rule of admission of your own |
//!
//! **Ends**
//!
//! | part | use it when |
//! | --- | --- |
//! | [`early`]: cleanup, shield, reports | an operation must not be left half done, or somebody is to know that it was |
//! | [`Cancel`] | work has to be stopped, and those who are stopped are to know why |
//! | [`context`] | the deadline and the cancellation of a request hold for all that it calls |
//! | [`Scope`] | several things are done at once, and end together |
//! | [`Drain`] | a service has to stop within a bound without cutting its work in half |
//!
//! **The process**
//!
//! | part | use it when |
//! | --- | --- |
//! | [`Blocking`], [`Compute`] | code blocks or computes, and must neither hold up the runtime nor pile up |
//! | [`Health`] | somebody asks whether the process is alive and ready |
//!
//! # The canonical order
//!
//! ```text
//! drain → timeout → retry → breaker → rate (layers, keyed) → semaphore → timeout
//! ```
//!
//! The first timeout limits the whole call, the last one an attempt. A [`Drain`] stands around what comes in, so a policy
//! for calls that go out begins with the timeout. A [`Fair`] stands where the limit in it would, and a budget belongs to
//! the retry.
//!
//! | in another order | what goes wrong |
//! | --- | --- |
//! | drain inside of the retry | a call between two attempts is not counted, and is refused its next one |
//! | no timeout outside of the retry | a caller waits for every attempt and every delay |
//! | no timeout inside of the retry | the first attempt that hangs leaves no time for a second |
//! | breaker outside of the retry | it sees whole calls instead of attempts and opens late |
//! | breaker inside of rate or semaphore | calls queue and pay before they are refused |
//! | rate outside of the retry | further attempts are not counted |
//! | rate inside of the semaphore | a permit is held while a token is waited for |
//! | semaphore outside of the retry | a permit is held through backoff |
//! | attempt timeout outside of the semaphore | waiting in the queue counts as the peer being slow |
//!
//! [`Policy::lint`] tells which of these a policy has, those about drain and rate apart; it forbids none.
//!
//! # What is promised
//!
//! * **Nothing is left behind.** Drop a call at any await point, cancel it, let its operation panic: every permit, probe and
//!   place in a queue comes back, and each [pass](Gate) exactly once. Tokens are spent by operations that were made; of
//!   one that was not, they are [put back](TokenBucket), less what has come in since. What the operation has begun
//!   elsewhere is another matter: see [`early`].
//! * **A deadline is data.** Every wait (a queue, a backoff, your future) is raced against the one earliest deadline. No
//!   backoff is slept that no attempt could follow, and your code can [read what is left](Attempt::remaining).
//! * **The happy path is cheap.** Through timeouts, retry, breaker, token bucket, semaphore and drain: no allocation, no
//!   boxing, no lock, one reading of the clock; if the operation is pending, one more and a timer of tokio's. Other parts
//!   say on their page what they cost.
//! * **Tests need no sleeping.** Everything reads `tokio::time`, so a paused clock drives the whole crate. (A quota of the
//!   calendar reads the wall clock once, when it is built, unless it is [told](QuotaBuilder::wall_clock) the time.)
//!
//! # Three ways in which time is special
//!
//! tokio's timers have a grain of a millisecond: nothing fires early, some things up to two milliseconds late. A future
//! that never yields cannot be timed out: a limit is looked at when the operation is pending. And the clock of a call
//! starts at its first poll, not when it is made.
//!
//! # Features
//!
//! None so far: everything in one process is always there, on tokio (`time`, `sync`, `rt`), tokio-util, futures,
//! pin-project, thiserror, rand, `parking_lot` and smallvec. MSRV is 1.85. No unsafe code.
//!
//! More questions are answered in [`design`].

#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod blocking;
pub mod breaker;
mod call;
pub mod cancel;
pub mod context;
mod cut;
pub mod drain;
pub mod early;
mod error;
mod ext;
pub mod fair;
pub mod gate;
mod guard;
pub mod health;
mod internal;
pub mod keyed;
mod lane;
pub mod layers;
mod least_time;
mod lint;
#[cfg(all(test, resile_loom))]
mod loom;
mod policy;
pub mod rate;
pub mod retry;
pub mod run;
mod said;
pub mod scope;
pub mod semaphore;
mod step;
pub mod verdict;

#[doc = include_str!("../DESIGN.md")]
pub mod design {}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

pub use blocking::{Blocking, BlockingBuilder, Compute, ComputeBuilder, Job, Offload};
pub use breaker::{BreakerBuilder, BreakerCounts, CircuitBreaker, State};
pub use call::{Attempt, Call, CallBuilder, CancelSource, Deadline, Key, Priority};
pub use cancel::{Cancel, CancelReason, Cancelled};
pub use cut::{CutShort, OnCancel};
pub use drain::{Drain, DrainBuilder, DrainPart, Drained, Held, Phase};
pub use early::{EarlyEnd, Interrupted, Shield, Stage, Tasks, Why};
pub use error::{ConfigError, Erased, Error, ErrorKind, Fault, Limit, Reason, Refusal, Stop};
pub use ext::{FewSteps, FutureExt, OneShot, infallible};
pub use fair::{Fair, FairBuilder};
pub use gate::{Acquire, Entry, Gate, Guard, IntoGate, Needs, Outcome, Pass, Ticket, Times};
pub use health::{Health, HealthBuilder};
pub use internal::time::Moment;
pub use keyed::{KeyRef, Keyed, KeyedBuilder, KeyedStats, OneKey, PerKey, Plan, TopKey};
pub use layers::{Layers, LayersBuilder};
pub use lint::{Finding, Lint};
pub use policy::{Judged, Policy, PolicyBuilder};
pub use rate::{
    LeakyBucket, LeakyBucketBuilder, LimitFields, Quota, QuotaBuilder, QuotaPolicy, Rate, RetryAfter, ServiceLimit,
    SlidingWindow, SlidingWindowBuilder, Snapshot, TokenBucket, TokenBucketBuilder,
};
pub use retry::{Backoff, Jitter, OnRefusal, RatioBuilder, Retry, RetryBudget, ShareBuilder};
pub use run::Run;
pub use scope::{ChildEnd, ChildPanic, Mapped, Scope, ScopeEnd};
pub use semaphore::{Semaphore, SemaphoreBuilder};
pub use step::{Step, Steps};
pub use verdict::{ByPolicy, ByResult, Classify, Settled, Verdict};
