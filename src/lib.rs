//! placeholder
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod breaker;
mod call;
mod error;
mod ext;
pub mod gate;
mod guard;
mod internal;
mod lane;
mod lint;
mod policy;
pub mod rate;
pub mod retry;
pub mod run;
pub mod semaphore;
pub mod verdict;

pub use breaker::{BreakerBuilder, BreakerCounts, CircuitBreaker, State};
pub use call::{Attempt, Call, CallBuilder, CancelSource, Deadline, Key, Priority};
pub use error::{ConfigError, Erased, Error, ErrorKind, Fault, Limit, Reason, Refusal, Stop};
pub use ext::{FewSteps, FutureExt, OneShot, infallible};
pub use gate::{Acquire, Entry, Gate, Guard, IntoGate, Needs, Outcome, Pass, Ticket, Times};
pub use internal::time::Moment;
pub use lint::{Finding, Lint};
pub use policy::{Judged, Policy, PolicyBuilder, Step, Steps};
pub use rate::{Rate, TokenBucket, TokenBucketBuilder};
pub use retry::{Backoff, Jitter, OnRefusal, RatioBuilder, Retry, RetryBudget, ShareBuilder};
pub use run::Run;
pub use semaphore::{Semaphore, SemaphoreBuilder};
pub use verdict::{ByPolicy, ByResult, Classify, Verdict};
