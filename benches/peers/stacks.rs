//! The stack of `support` by other means.

use std::future::Future;
use std::io;
use std::num::NonZeroU32;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use failsafe::futures::CircuitBreaker;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use tokio::sync::Semaphore;
use tokio::time::{Sleep, sleep, timeout};
use tower::retry::Policy;
use tower::{BoxError, Service, ServiceBuilder};

use crate::support::Answer;

const WHOLE: Duration = Duration::from_secs(2);
const ATTEMPT: Duration = Duration::from_millis(300);
const DELAY: Duration = Duration::from_millis(50);
const RETRIES: u32 = 3;
const PERMITS: usize = 64;

pub fn backoff() -> ExponentialBuilder {
    ExponentialBuilder::new().with_min_delay(DELAY).with_max_times(RETRIES as usize).with_jitter()
}

/// A quota that never runs out.
pub fn quota() -> Quota {
    Quota::per_second(NonZeroU32::new(1_000_000_000).unwrap_or(NonZeroU32::MAX))
}

/// failsafe's cheaper breaker: it counts failures in a row.
pub fn breaker() -> impl CircuitBreaker {
    let backoff = failsafe::backoff::exponential(Duration::from_secs(5), Duration::from_mins(1));
    failsafe::Config::new().failure_policy(failsafe::failure_policy::consecutive_failures(20, backoff)).build()
}

/// What can happen to a call of [`ByHand`].
#[derive(Debug)]
pub enum Problem {
    #[expect(dead_code, reason = "kept for the caller, as one would")]
    Operation(io::Error),
    Refused,
    TimedOut,
}

/// tokio's timeouts and semaphore, backon's retry, failsafe's breaker, governor's bucket.
pub struct ByHand<B> {
    backoff: ExponentialBuilder,
    breaker: B,
    bucket: DefaultDirectRateLimiter,
    semaphore: Semaphore,
}

pub fn by_hand() -> ByHand<impl CircuitBreaker> {
    ByHand {
        backoff: backoff(),
        breaker: breaker(),
        bucket: RateLimiter::direct(quota()),
        semaphore: Semaphore::new(PERMITS),
    }
}

impl<B: CircuitBreaker> ByHand<B> {
    pub async fn run<F: Future<Output = Answer>>(&self, operation: impl Fn() -> F) -> Result<u64, Problem> {
        let attempt = || async {
            self.breaker.call(self.attempt(&operation)).await.map_err(|error| match error {
                failsafe::Error::Inner(problem) => problem,
                failsafe::Error::Rejected => Problem::Refused,
            })
        };
        timeout(WHOLE, attempt.retry(self.backoff).sleep(sleep)).await.unwrap_or(Err(Problem::TimedOut))
    }

    async fn attempt<F: Future<Output = Answer>>(&self, operation: impl Fn() -> F) -> Result<u64, Problem> {
        self.bucket.check().map_err(|_| Problem::Refused)?;
        let _permit = self.semaphore.acquire().await.map_err(|_| Problem::Refused)?;
        timeout(ATTEMPT, operation()).await.map_err(|_| Problem::TimedOut)?.map_err(Problem::Operation)
    }
}

/// tower's timeouts, retry and concurrency limit. It has no breaker, and its rate limit can't be shared.
pub fn with_tower<F>(operation: fn() -> F) -> impl Service<(), Response = u64, Error = BoxError>
where
    F: Future<Output = Answer> + Send + 'static,
{
    ServiceBuilder::new()
        .timeout(WHOLE)
        .retry(Attempts(RETRIES))
        .concurrency_limit(PERMITS)
        .timeout(ATTEMPT)
        .service_fn(move |()| operation())
}

#[derive(Clone)]
struct Attempts(u32);

impl Policy<(), u64, BoxError> for Attempts {
    type Future = Sleep;

    fn retry(&mut self, (): &mut (), result: &mut Result<u64, BoxError>) -> Option<Sleep> {
        if result.is_ok() {
            return None;
        }
        self.0 = self.0.checked_sub(1)?;
        Some(sleep(DELAY))
    }

    fn clone_request(&mut self, (): &()) -> Option<()> {
        Some(())
    }
}
