//! Limits on how many calls pass in a time.
//!
//! | limiter | lets through | at a boundary, or after idling | choose it |
//! | --- | --- | --- | --- |
//! | [`TokenBucket`] | a burst, then so many per second, exactly | the burst, once | unless you have a reason for another |
//! | [`LeakyBucket`] | one after the other, evenly | one | the peer minds any bunch |
//! | [`SlidingWindow`] | so many in any stretch of one length | the limit, once per window | the peer counts over the last so many seconds |
//! | [`Quota`] | so many per second, minute, hour, day, month | **twice the limit**, around the boundary | a plan or a contract, or a peer that counts so |
//!
//! All are gates with the same small surface: `try_take` now or not at all, `acquire` in order, `peek`, `refund`, a
//! change of the limit in use, and [`Snapshot`] with limit, remaining, reset and retry-after, of which [`LimitFields`]
//! makes what a server tells its clients. Whoever cannot be served before its deadline is refused at once and told the
//! time.
//!
//! Costs are whatever you count: calls, bytes, tokens of a model, cents. A cost that is known only afterwards is
//! estimated before and settled after, with [`CallBuilder::settle`](crate::CallBuilder::settle) or
//! [`Guard::settle`](crate::Guard::settle): what was too much goes back, and what was too little is owed, so that those
//! who come next wait for it. A cost of nothing is refused, since nobody passes uncharged.

mod bucket;
mod calendar;
mod front;
mod keyed;
mod leaky;
mod ledger;
mod pace;
mod periods;
mod purse;
mod quota;
mod shell;
mod sliding;
mod units;
mod window;
mod word;

#[cfg(all(test, resile_loom))]
mod loom;

pub use bucket::{TokenBucket, TokenBucketBuilder};
pub use front::{LimitFields, QuotaPolicy, RetryAfter, ServiceLimit, Snapshot};
pub use leaky::{LeakyBucket, LeakyBucketBuilder};
pub use quota::{Quota, QuotaBuilder};
pub use sliding::{SlidingWindow, SlidingWindowBuilder};
pub use units::Rate;
