//! Limits on how many calls pass in a time.
//!
//! [`TokenBucket`] lets a burst through and then so many per second, exactly. Peers that count per window, by the
//! calendar or without any burst need other shapes; they will stand here beside it.

mod bucket;
mod pace;

#[cfg(all(test, resile_loom))]
mod loom;

pub use bucket::{TokenBucket, TokenBucketBuilder};
pub use pace::Rate;
