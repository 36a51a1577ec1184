//! [`Keyed`]: one gate per key, such as a limit per tenant, in bounded memory.
//!
//! One limit for everybody lets the loudest caller use up what was meant for all. One limit for each needs a table, and
//! the keys in it come from outside: somebody who makes up a new key for each call must neither fill the memory nor push
//! a key that is at its limit out of the table, which would give that key a new allowance.
//!
//! ```
//! use resile::{Keyed, Policy, Reason, TokenBucket};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let per_tenant = Keyed::by("tenant", TokenBucket::per_second(10).burst(20)).capacity(100_000).build()?;
//! let policy = Policy::named("api").gate(per_tenant.clone()).build()?;
//!
//! let answer = policy.call().key("tenant", "acme").cost(20).no_wait().run(|| async { Ok::<_, ()>(42) }).await;
//! assert_eq!(answer.unwrap(), 42);
//!
//! assert!(per_tenant.try_take("acme", 1).is_err(), "used up");
//! per_tenant.try_take("other", 20)?;
//!
//! let error = policy.run(|| async { Ok::<_, ()>(42) }).await.unwrap_err();
//! assert_eq!(error.refusal().unwrap().reason(), Reason::NoKey("tenant"), "never let through uncounted");
//! # Ok(()) }
//! ```
//!
//! | setting | default | why |
//! | --- | --- | --- |
//! | [`capacity`](KeyedBuilder::capacity) | 65,536 keys | 2.5 MiB of token buckets; choose the number of keys that can be busy at once |
//! | [`plans`](KeyedBuilder::plans) | the same settings for all | tariffs are yours to know |
//! | [`overflow`](KeyedBuilder::overflow) | refuse | a shared gate is a choice: everybody new is limited together |
//!
//! # How it decides
//!
//! The call's key leads to an entry, and the gate of that entry decides as it would alone; a key without an entry gets a
//! new one. If the table is full, a hand goes round and gives up the first entry that is *as good as new*: a bucket that
//! is full again, a semaphore with nothing held, a closed breaker with nothing in its window. To forget such an entry
//! changes no decision, and no other is ever forgotten. One new key looks at 64 entries at most (8, if the gates are such
//! that each has to be asked), so a sweep has no pauses. If none of them can go, the policy for overflow holds: refuse with
//! [`Reason::KeySpaceFull`], or have all such keys share one gate.
//!
//! A table of more than 8,192 keys is cut into parts of at least 4,096, up to 64, each under a lock of its own. Keys are
//! spread over them by chance, so one part may be full of busy keys when the whole is to about 97 %.
//!
//! A breaker that counts [calls](crate::BreakerBuilder::over_calls) instead of time is never as good as new again, nor is
//! a quota that [carries over](crate::QuotaBuilder::carry_over): they keep their places for ever. Choose time windows
//! here, and quotas without.
//!
//! # Keys
//!
//! A key is a number or a text of any length. Of it the table keeps 96 bits, made with a secret of the process: the
//! number itself in other words, or two `SipHash`es of the text. So the memory of a key is the same whatever its length,
//! whoever chooses keys cannot choose where they lie, and that any two of a million texts share an entry has a chance of
//! 2^-56. An empty text is a key as any other. A call without the key is refused with [`Reason::NoKey`].
//!
//! # Settings per key, and while in use
//!
//! A [`Plan`] is settings that some keys share; [`plans`](KeyedBuilder::plans) says which key has which. [`Plan::set`]
//! changes the settings of all its keys, [`Keyed::reassign`] has the function asked again. Each key follows at its next
//! call, and keeps what it has spent.
//!
//! # Cancellation
//!
//! A pass or a place in a queue keeps its entry in the table; both come back as they do for the gate alone. The pass of
//! a bucket keeps nothing: what is [settled](crate::CallBuilder::settle) later goes to its key all the same, and is let
//! off only if that key has been forgotten meanwhile and finds no room.
//!
//! # Cost
//!
//! A decision on a known key hashes it, takes the lock of a part for a few dozen instructions, and allocates nothing. A
//! token bucket's key takes 38 bytes, all of which are reserved when the table is built and touched as keys come; while
//! somebody waits at a key it has a whole bucket in addition. Other gates take 100 bytes and what the gate itself takes,
//! and two turns of the lock in and two out. Each part has two sketches of 5 KiB together.
//!
//! The work of a decision has a bound that depends neither on how many keys there are nor on who has made them up:
//!
//! | decision | looks at most at |
//! | --- | --- |
//! | let in, its key known | 32 places of an index |
//! | refused, or the first after a change of settings | 96 places |
//! | on a new key | 256 places |
//! | on a new key in a full table, let in or refused | 288 places and entries, 64 of which might make room |
//!
//! While gates and plans are asked, the lock is let go; a decision that finds that others have changed the same part
//! meanwhile starts anew, 7 times at most. Nothing is ever moved to make a table larger. What goes with its length is
//! the hash of a text: a mebibyte takes half a millisecond, with no lock held.
//!
//! # Why a table of our own
//!
//! Caches choose what to give up by how much it is used, and grow or give up something else when everything is pinned.
//! Here the rule is a promise: nothing goes that is not as good as new, and there are never more than so many. No cache
//! that we know of can be told so. And with the state inline a key takes a quarter of what a handle in a map does.
//!
//! # Not for
//!
//! Limits that several processes share. Or few known keys: a gate each, in a struct, is simpler.

mod builder;
mod enter;
mod id;
mod one_key;
mod per_key;
mod plan;
mod room;
mod shard;
mod sketch;
mod stay;
mod table;

#[cfg(all(test, resile_loom))]
mod loom;

use std::fmt;
use std::sync::Arc;
use std::task::Context;

use crate::call::Call;
use crate::error::{Reason, Refusal};
use crate::gate::{Entry, Gate, IntoGate, Needs, Outcome, Pass, Ticket};
use crate::internal::sync::Relaxed;
use enter::{Shared, Who};
use shard::Shard;

pub use builder::{DEFAULT_CAPACITY, KeyedBuilder, MOST_KEYS};
pub use id::KeyRef;
pub(crate) use id::{Id, Secret};
pub use one_key::OneKey;
use per_key::Limiter;
pub use per_key::PerKey;
#[doc(hidden)]
pub use per_key::WordEntry;
pub use plan::Plan;
pub use sketch::TopKey;

/// One gate per key, in bounded memory; see the [module](self).
///
/// A cheap handle: clones share the table.
pub struct Keyed<G: PerKey>(Arc<Shared<G>>);

/// What a table of keys has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyedStats {
    /// How many keys it holds at most.
    pub capacity: u32,
    /// How many it holds, busy or as good as new.
    pub live: u32,
    /// How many of them are kept in place by passes and waiters.
    pub pinned: u32,
    /// How many were given up, being as good as new.
    pub evicted: u64,
    /// How many decisions found no room for their key.
    pub overflowed: u64,
    /// What the table takes with all its keys, gates that somebody waits at or that are no buckets apart.
    pub bytes: usize,
}

impl<G: PerKey> Keyed<G> {
    /// Begins a table of gates, chosen by the value that a call has for the key of this name. The settings are those of a
    /// gate or the builder of one; each key has a gate of its own that is made like it.
    pub fn by(key: &'static str, settings: impl IntoGate<Gate = G>) -> KeyedBuilder<G> {
        KeyedBuilder::new(key, Plan::new(settings))
    }

    /// The gate of one key, for use without a call: it looks its entry up each time, and keeps none in place.
    ///
    /// ```
    /// use resile::{Keyed, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let per_user = Keyed::by("user", Semaphore::permits(1)).build()?;
    /// let anna = per_user.of("anna").acquire().await?;
    /// assert!(per_user.of("anna").try_acquire().is_err());
    /// let bert = per_user.of("bert").try_acquire()?;
    /// drop((anna, bert));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn of<'a>(&self, key: impl Into<KeyRef<'a>>) -> OneKey<G> {
        OneKey::new(self.clone(), key.into())
    }

    /// Does something with the gate of a key, such as to read it, if the key has an entry. If it has none, its gate is as
    /// a new one.
    ///
    /// The entry is kept in place meanwhile, and no lock is held. What is set on one gate by hand is lost when it is as
    /// good as new and its place is needed; settings that are to last belong in a [`Plan`].
    ///
    /// ```
    /// use resile::{Keyed, TokenBucket};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let per_user = Keyed::by("user", TokenBucket::per_second(1).burst(5)).build()?;
    /// per_user.try_take(7_u64, 2)?;
    /// assert_eq!(per_user.with(7_u64, TokenBucket::peek), Some(3));
    /// per_user.with(7_u64, |bucket| bucket.refund(1));
    /// assert_eq!(per_user.with(7_u64, TokenBucket::peek), Some(4));
    /// assert_eq!(per_user.with(8_u64, TokenBucket::peek), None);
    /// # Ok(()) }
    /// ```
    pub fn with<'a, R>(&self, key: impl Into<KeyRef<'a>>, look: impl FnOnce(&G) -> R) -> Option<R> {
        let pin = self.0.pin(self.0.secret.id(key.into()))?;
        Some(look(&pin.gate))
    }

    /// The settings of keys to which [`plans`](KeyedBuilder::plans) gives no other: to change them while in use.
    #[must_use]
    pub fn plan(&self) -> &Plan<G> {
        &self.0.plan
    }

    /// Has [`plans`](KeyedBuilder::plans) asked again, for each key at its next call.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    /// use resile::{Keyed, Plan, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (gold, paid) = (Plan::new(Semaphore::permits(2))?, Arc::new(AtomicBool::new(false)));
    /// let has_paid = paid.clone();
    /// let per_user = Keyed::by("user", Semaphore::permits(1))
    ///     .plans(move |_| has_paid.load(Relaxed).then(|| gold.clone()))
    ///     .build()?;
    ///
    /// let first = per_user.of("anna").try_acquire()?;
    /// assert!(per_user.of("anna").try_acquire().is_err());
    ///
    /// paid.store(true, Relaxed);
    /// per_user.reassign();
    /// let second = per_user.of("anna").try_acquire()?;
    /// # drop((first, second));
    /// # Ok(()) }
    /// ```
    pub fn reassign(&self) {
        self.0.epoch.fetch_add(1, Relaxed);
    }

    /// Looks at about so many entries, going round once at most, and gives up those that are as good as new: how many. A
    /// table does without; it makes [`live`](KeyedStats::live) tell the keys in use.
    #[allow(clippy::must_use_candidate, reason = "what it does is the point")]
    pub fn sweep(&self, entries: u32) -> u32 {
        self.0.sweep(entries)
    }

    /// What there is in it. Cost: a turn of each part's lock.
    #[must_use]
    pub fn stats(&self) -> KeyedStats {
        let mut stats = KeyedStats { capacity: self.0.capacity, ..KeyedStats::default() };
        for shard in &self.0.shards {
            let shard = shard.lock();
            stats.live += shard.table.len();
            stats.pinned += shard.pinned;
            stats.evicted += shard.evicted;
            stats.overflowed += shard.overflowed;
            stats.bytes += shard.bytes();
        }
        stats
    }

    /// The keys that took the most permits or tokens since the table was built, the heaviest first: at most so many, and
    /// 32 per part of the table.
    ///
    /// They come from a Space-Saving sketch (Metwally, Agrawal, El Abbadi 2005) of one in 64 units: a count is off by
    /// about `8 × √count` for that, and may be too high by what [`error`](TopKey::error) says, no more than 1/32 of what
    /// all keys of its part took.
    ///
    /// ```
    /// # use resile::{Key, Keyed, TokenBucket};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let per_user = Keyed::by("user", TokenBucket::per_second(1).burst(1000)).build()?;
    /// (0..1000).for_each(|_| per_user.try_take("anna", 1).unwrap());
    /// let _ = per_user.try_take("bert", 1001);
    ///
    /// assert_eq!(per_user.heaviest(10)[0].key, Key::from("anna"));
    /// assert_eq!(per_user.most_refused(10)[0].key, Key::from("bert"));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn heaviest(&self, most: usize) -> Vec<TopKey> {
        self.top(most, |shard| shard.heavy.keys().collect())
    }

    /// The keys whose calls were refused most often, as in [`heaviest`](Self::heaviest); but each refusal is counted.
    #[must_use]
    pub fn most_refused(&self, most: usize) -> Vec<TopKey> {
        self.top(most, |shard| shard.refused.keys().collect())
    }

    fn top(&self, most: usize, of: impl Fn(&Shard<G>) -> Vec<TopKey>) -> Vec<TopKey> {
        let mut keys: Vec<TopKey> = self.0.shards.iter().flat_map(|shard| of(&shard.lock())).collect();
        keys.sort_by_key(|top| std::cmp::Reverse(top.count));
        keys.truncate(most);
        keys
    }

    /// The entry that a call is about.
    #[inline]
    fn who<'a>(&self, call: &'a Call) -> Option<Who<'a>> {
        let key = KeyRef::from(call.key(self.0.by)?);
        Some(Who { id: self.0.secret.id(key), key })
    }

    #[cold]
    fn no_key(&self) -> Refusal {
        Refusal::by(self.0.name.clone(), Reason::NoKey(self.0.by))
    }
}

impl<G: Limiter> Keyed<G> {
    /// Takes so many tokens of a key if they are there and nobody waits; else changes nothing. Of any limiter: of a
    /// window or a quota it is places that are taken.
    ///
    /// # Errors
    ///
    /// As [`TokenBucket::try_take`](crate::TokenBucket::try_take); and [`Reason::KeySpaceFull`].
    ///
    /// ```
    /// # use resile::{Keyed, Quota};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let plans = Keyed::by("client", Quota::per_day(10)).build()?;
    /// let client: std::net::IpAddr = "192.0.2.7".parse()?;
    /// plans.try_take(client, 7)?;
    /// assert!(plans.try_take(client, 7).is_err());
    /// plans.try_take(client, 3)?;
    /// # Ok(()) }
    /// ```
    pub fn try_take<'a>(&self, key: impl Into<KeyRef<'a>>, tokens: u32) -> Result<(), Refusal> {
        let key = key.into();
        self.try_take_at(Who { id: self.0.secret.id(key), key }, &Call::alone(tokens, false))
    }

    #[inline]
    fn try_take_at(&self, who: Who<'_>, call: &Call) -> Result<(), Refusal> {
        match self.0.enter(who, call) {
            Entry::Pass(pass) => {
                // Of a key that somebody waits at, it keeps the entry in place.
                self.0.leave(&pass, Outcome::Abandoned(crate::Times { started: call.now(), ended: call.now() }));
                Ok(())
            }
            Entry::Refused(refusal) => Err(refusal),
            Entry::Wait(ticket, _) => {
                self.0.abandon(&ticket);
                Err(Refusal::by(self.0.name.clone(), Reason::Busy))
            }
        }
    }
}

impl<G: PerKey> Gate for Keyed<G> {
    #[inline]
    fn enter(&self, call: &Call) -> Entry {
        match self.who(call) {
            Some(who) => self.0.enter(who, call),
            None => Entry::Refused(self.no_key()),
        }
    }

    #[inline]
    fn leave(&self, pass: Pass, outcome: Outcome) {
        self.0.leave(&pass, outcome);
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let Some(who) = self.who(call) else {
            self.0.abandon(&ticket);
            return Entry::Refused(self.no_key());
        };
        self.0.poll_wait(who, &ticket, call, cx)
    }

    fn settle(&self, pass: &mut Pass, call: &Call, actual: u32) {
        self.0.settle(self.who(call), pass, call, actual);
    }

    fn abandon(&self, ticket: Ticket) {
        self.0.abandon(&ticket);
    }

    fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
        self.0.still(pass, call)
    }

    fn look(&self, call: &Call) -> Result<(), Refusal> {
        self.who(call).ok_or_else(|| self.no_key()).and_then(|who| self.0.look(who, call))
    }

    fn needs(&self) -> Needs {
        G::NEEDS
    }

    fn name(&self) -> &str {
        self.0.name.as_str()
    }

    fn draw(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (", self.name())?;
        self.0.plan.version().settings.draw(f)?;
        f.write_str(" each)")
    }
}

impl<G: PerKey> Clone for Keyed<G> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<G: PerKey> fmt::Debug for Keyed<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyed")
            .field("name", &self.0.name)
            .field("by", &self.0.by)
            .field("capacity", &self.0.capacity)
            .finish_non_exhaustive()
    }
}
