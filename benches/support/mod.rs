//! What the benches share: the policies they measure, the operations, and a way to poll a future by hand.

#![allow(dead_code, reason = "each bench uses its part")]

pub mod laps;
pub mod rounds;
pub mod together;

use std::future::Future;
use std::hint::black_box;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use resile::{CircuitBreaker, Gate, Policy, PolicyBuilder, Retry, Semaphore, TokenBucket};
use tokio::runtime::{EnterGuard, Runtime};
use tokio::time::Sleep;

/// What every operation answers. An error that owns something, as errors do.
pub type Answer = Result<u64, io::Error>;

/// Ready at its first poll.
pub async fn ready() -> Answer {
    Ok(black_box(7))
}

/// Ready at its second poll.
pub fn pending() -> Pending {
    Pending(false)
}

/// See [`pending`].
pub struct Pending(bool);

impl Future for Pending {
    type Output = Answer;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Answer> {
        if std::mem::replace(&mut self.0, true) { Poll::Ready(Ok(black_box(7))) } else { Poll::Pending }
    }
}

/// Polls a future until it is ready, without a scheduler and with a waker that does nothing. The future has to succeed.
///
/// A macro, so that the future is made where it is polled, as with `.await`.
macro_rules! succeed {
    ($future:expr) => {
        match $crate::support::poll_until_ready(std::pin::pin!($future)) {
            Ok(value) => drop(std::hint::black_box(value)),
            Err(_) => $crate::support::failed(),
        }
    };
}
pub(crate) use succeed;

#[inline]
pub fn poll_until_ready<T>(mut future: Pin<&mut impl Future<Output = T>>) -> T {
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut cx) {
            return result;
        }
    }
}

#[cold]
#[inline(never)]
pub fn failed() {
    panic!("an operation failed that should not");
}

/// A current-thread runtime whose timers nobody drives.
///
/// One timer is registered in it that is earlier than any that a bench makes, as in a busy server: without one, each
/// registration would write to an eventfd.
pub struct World {
    _earlier: Pin<Box<Sleep>>,
    runtime: Runtime,
}

impl World {
    pub fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let entered = runtime.enter();
        let mut earlier = Box::pin(tokio::time::sleep(Duration::from_millis(250)));
        assert!(earlier.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        drop(entered);
        // The driver learns of the earlier timer when it parks.
        runtime.block_on(async { tokio::time::sleep(Duration::from_millis(1)).await });
        Self { _earlier: earlier, runtime }
    }

    pub fn enter(&self) -> EnterGuard<'_> {
        self.runtime.enter()
    }
}

fn policy(steps: impl FnOnce(PolicyBuilder) -> PolicyBuilder) -> Policy {
    steps(Policy::named("bench")).build().expect("a valid policy")
}

pub fn retry() -> Retry {
    Retry::exponential(Duration::from_millis(50)).max_attempts(4)
}

pub fn breaker() -> CircuitBreaker {
    let breaker = CircuitBreaker::builder().failure_rate(0.5).over(Duration::from_secs(30));
    breaker.build().expect("a valid breaker")
}

/// A bucket that is never empty.
pub fn bucket() -> TokenBucket {
    TokenBucket::per_second(1_000_000_000).burst(1_000_000_000).build().expect("a valid bucket")
}

/// The same, of which threads take tokens ahead.
pub fn batched_bucket() -> TokenBucket {
    TokenBucket::per_second(1_000_000_000).burst(1_000_000_000).batch(1024).build().expect("a valid bucket")
}

pub fn semaphore() -> Semaphore {
    Semaphore::permits(64).build().expect("a valid semaphore")
}

/// The whole stack, in the canonical order.
pub fn stack() -> Policy {
    policy(|steps| {
        steps
            .timeout(Duration::from_secs(2))
            .retry(retry())
            .gate(breaker())
            .gate(bucket())
            .gate(semaphore())
            .timeout(Duration::from_millis(300))
    })
}

pub fn no_steps() -> Policy {
    policy(|steps| steps)
}

pub fn only_timeout() -> Policy {
    policy(|steps| steps.timeout(Duration::from_millis(300)))
}

pub fn only_retry() -> Policy {
    policy(|steps| steps.retry(retry()))
}

pub fn only_gate(gate: impl Gate) -> Policy {
    policy(|steps| steps.gate(gate))
}
