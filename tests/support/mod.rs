//! Tools for tests that cut across the parts.
//!
//! [`script`] has operations that do as they are told and note when; [`watch`] has gates whose state can be read and
//! compared with an earlier reading; [`bench`] runs an operation under a policy and asserts in one line; [`hand`] polls
//! futures by hand on a paused clock. What happened, and in which order, is in the [`journal`]. [`postgres`] starts a
//! real server, for what only a peer can show.

#![allow(dead_code, reason = "each test file uses its own part of the tools")]

pub mod bench;
pub mod hand;
pub mod journal;
#[cfg(unix)]
pub mod postgres;
pub mod script;
pub mod watch;

use std::time::Duration;

pub const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
