//! [`Fair`]: one limit that many keys share, in turn.
//!
//! A queue that is first come, first served gives the most to who comes most: one tenant with a thousand calls waiting
//! holds up all who come after. A fair queue has a line per key and goes round, so that a tenant waits behind its own
//! calls and not behind those of others.
//!
//! ```
//! use resile::{Fair, Policy, Semaphore};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let workers = Fair::by("tenant", Semaphore::permits(1)).build()?;
//! let policy = Policy::named("reports").gate(workers).build()?;
//! let order = std::sync::Mutex::new(Vec::new());
//! let call = |tenant: &'static str| {
//!     let order = &order;
//!     policy.call().key("tenant", tenant).run(move || async move {
//!         tokio::task::yield_now().await;
//!         Ok::<_, ()>(order.lock().unwrap().push(tenant))
//!     })
//! };
//!
//! // The first goes at once and keeps the others waiting: three more of the same, and then one of another.
//! let (a, b, c, d, e) = tokio::join!(call("loud"), call("loud"), call("loud"), call("loud"), call("quiet"));
//! # (a.unwrap(), b.unwrap(), c.unwrap(), d.unwrap(), e.unwrap());
//! assert_eq!(*order.lock().unwrap(), ["loud", "loud", "quiet", "loud", "loud"]);
//! # Ok(()) }
//! ```
//!
//! | setting | default | why |
//! | --- | --- | --- |
//! | [`max_queue`](FairBuilder::max_queue) | 16,384 | a bound of memory |
//! | [`max_queue_per_key`](FairBuilder::max_queue_per_key) | 1,024 | so that one key cannot fill it alone |
//! | [`weights`](FairBuilder::weights) | 1 each | who pays for more is yours to know |
//!
//! # How it decides
//!
//! While nobody waits, a call enters the limit as it would without a line. Once one does, all who come stand in line,
//! each behind the others of its key, and the first of them waits at the limit. Who is first is decided by start-time
//! fair queueing (Goyal, Vin and Cheng 1996): what a key has had, divided by its weight, says when its next call may
//! start, and a key that has just come may at once. So keys that always wait get shares of the limit as their weights
//! are, to a call of each, whatever their calls cost and however many they have waiting; and a key that wants little goes
//! next, but for others that have had no more.
//!
//! Keys that come once each, one after the other, hold nobody up: each of them begins a little later than the one before,
//! so that all who wait have their turn. A key that comes then waits for what two of the largest calls cost, of each other
//! key at most.
//!
//! Who waits at the limit steps aside when somebody comes who goes before it. In the example one of `loud` ran and one
//! was there before `quiet`.
//!
//! A call with a deadline is told at once if what goes before it in line takes longer at the limit's rate: its own key's
//! calls, and what others get meanwhile, of which 256 keys are looked at.
//!
//! A waiter at the limit that is woken and not polled (a branch of a `select!` that has gone on to something else) is
//! passed over within 10 ms for each that waits, 1 s at most, and others that don't come after it within 10 ms each. It
//! keeps its place among the waiting, and is first again when it is polled.
//!
//! # Cancellation
//!
//! Who stops waiting leaves the line at once, or hands the place at the limit on.
//!
//! # Cost
//!
//! Without waiters a lock held for a few instructions, and the limit's own. Waiting costs a wake-up more than the limit
//! alone: it is passed on from one to the next. Who is next is found in steps that grow with the logarithm of the keys
//! that wait, and who leaves the line looks at no more than the others of its key. Besides the waiters it remembers up to
//! 16,384 keys that have just had more than others.
//!
//! # Not for
//!
//! A limit per key is a [`Keyed`](crate::Keyed): there, who has little to do leaves unused what others could use.

mod line;
mod waiters;

#[cfg(all(test, resile_loom))]
mod loom;

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::task::Context;

use crate::call::Call;
use crate::error::{ConfigError, Faults, Name, Reason, Refusal};
use crate::gate::{Entry, Gate, IntoGate, Needs, Outcome, Pass, Ticket, Underway};
use crate::internal::queue::{DEFAULT_MAX_QUEUE, LONGEST_QUEUE, WakeList};
use crate::internal::sync::Mutex;
use crate::keyed::{Id, KeyRef, Secret};
use crate::step;
use waiters::{Place, State, Turn};

const DEFAULT_PER_KEY: u32 = 1024;

/// One limit that many keys share, in turn; see the [module](self).
///
/// A cheap handle: clones share the line and the limit.
pub struct Fair<G>(Arc<Shared<G>>);

struct Shared<G> {
    gate: G,
    state: Mutex<State>,
    secret: Secret,
    weights: Option<Weights>,
    by: &'static str,
    max_queue: u32,
    max_per_key: u32,
    name: Name,
}

type Weights = Box<dyn Fn(KeyRef<'_>) -> NonZeroU32 + Send + Sync>;

/// Settings of a [`Fair`].
#[must_use = "a builder does nothing until it is built"]
pub struct FairBuilder<G> {
    gate: Result<G, ConfigError>,
    weights: Option<Weights>,
    by: &'static str,
    max_queue: u32,
    max_per_key: u32,
    name: Option<Name>,
}

impl<G: Gate> FairBuilder<G> {
    /// How many may stand in line: 16,384 by default, at most 16,777,216.
    pub const fn max_queue(mut self, waiters: u32) -> Self {
        self.max_queue = waiters;
        self
    }

    /// How many of one key may: 1,024 by default.
    pub const fn max_queue_per_key(mut self, waiters: u32) -> Self {
        self.max_per_key = waiters;
        self
    }

    /// How much of the limit a key gets beside others that wait: 1 by default. It is asked with no lock held, for each
    /// call that has to wait.
    pub fn weights(mut self, weights: impl Fn(KeyRef<'_>) -> NonZeroU32 + Send + Sync + 'static) -> Self {
        self.weights = Some(Box::new(weights));
        self
    }

    /// The name that refusals of the line carry: that of the limit by default.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Some(Name::from(name.into()));
        self
    }

    /// The fair limit.
    ///
    /// # Errors
    ///
    /// A line longer than 16,777,216, no room for one of a key, every wrong setting of the limit, and a limit in which
    /// nobody may wait: the first in line does.
    pub fn build(self) -> Result<Fair<G>, ConfigError> {
        let mut faults = Faults::of(format!("fair by {}", self.by));
        faults.check(self.max_queue <= LONGEST_QUEUE, "max_queue", &self.max_queue, "0 to 16777216");
        faults.check(self.max_per_key >= 1, "max_queue_per_key", &self.max_per_key, "1 or more");
        if let Err(wrong) = &self.gate {
            faults.absorb(|own, part| format!("{own}: {part}"), wrong.clone());
        }
        let places = self.gate.as_ref().ok().and_then(Gate::places);
        let needs = "1 or more in the limit inside, where the first in line waits";
        faults.check(places != Some(0), "max_queue", &0, needs);
        faults.into_result()?;
        let gate = self.gate?;
        Ok(Fair(Arc::new(Shared {
            state: Mutex::new(State::default()),
            secret: Secret::new(),
            weights: self.weights,
            by: self.by,
            max_queue: self.max_queue,
            max_per_key: self.max_per_key,
            name: self.name.unwrap_or_else(|| Name::from(Cow::Owned(gate.name().to_owned()))),
            gate,
        })))
    }
}

impl<G: Gate> IntoGate for FairBuilder<G> {
    type Gate = Fair<G>;

    fn into_gate(self) -> Result<Fair<G>, ConfigError> {
        self.build()
    }
}

impl<G: Gate> Fair<G> {
    /// Begins a fair line for a limit, by the value that a call has for the key of this name.
    pub fn by(key: &'static str, limit: impl IntoGate<Gate = G>) -> FairBuilder<G> {
        FairBuilder {
            gate: limit.into_gate(),
            weights: None,
            by: key,
            max_queue: DEFAULT_MAX_QUEUE,
            max_per_key: DEFAULT_PER_KEY,
            name: None,
        }
    }

    /// The limit, to read or resize it. Who enters it directly passes the line by.
    #[must_use]
    pub fn limit(&self) -> &G {
        &self.0.gate
    }

    /// How many stand in line. Who waits at the limit is in none.
    #[must_use]
    pub fn queued(&self) -> u32 {
        self.0.state.lock().in_line()
    }

    #[cold]
    fn refuse(&self, reason: Reason) -> Entry {
        Entry::Refused(Refusal::by(self.0.name.clone(), reason))
    }

    /// Enters the limit while nobody waits. Who has to wait there is the first in line.
    fn enter_limit(&self, id: Id, key: KeyRef<'_>, call: &Call) -> Entry {
        match step::enter(&self.0.gate, call, call.may_wait()) {
            Entry::Wait(inner, at) => {
                let inner = Underway::new(inner, |inner| self.0.gate.abandon(inner));
                let weight = self.weight(key);
                let words = inner.arrive().words();
                let (ticket, turn) = self.0.state.lock().join(id, weight, call.cost(), Some(words));
                let ticket = Underway::new(ticket, |ticket| self.abandon(ticket));
                self.carry_out(turn);
                Entry::Wait(ticket.arrive(), at)
            }
            entry => entry,
        }
    }

    #[cold]
    fn stand_in_line(&self, id: Id, key: KeyRef<'_>, call: &Call) -> Entry {
        if !call.may_wait() {
            return self.refuse(Reason::Busy);
        }
        // Who can never be let in is told now.
        if let Err(never) = self.0.gate.look(call) {
            if never.reason().is_permanent() {
                return Entry::Refused(never);
            }
        }
        let weight = self.weight(key);
        let before = self.0.state.lock().line.before(id, weight, call.cost());
        let due = self.0.gate.due(before, call);
        if due.is_some_and(|due| due > call.latest_entry()) {
            return self.refuse(Reason::TooLate);
        }
        let mut state = self.0.state.lock();
        if state.in_line() >= self.0.max_queue || state.in_line_of(id) >= self.0.max_per_key {
            drop(state);
            return self.refuse(Reason::QueueFull);
        }
        let (ticket, turn) = state.join(id, weight, call.cost(), None);
        drop(state);
        let ticket = Underway::new(ticket, |ticket| self.abandon(ticket));
        self.carry_out(turn);
        Entry::Wait(ticket.arrive(), None)
    }

    fn weight(&self, key: KeyRef<'_>) -> NonZeroU32 {
        self.0.weights.as_ref().map_or(NonZeroU32::MIN, |weights| weights(key))
    }

    /// Forgets a waiter, which has passed or not; if it was first, the next is called.
    fn end_wait(&self, number: [u32; 2], passed: bool) {
        let ended = self.0.state.lock().end(number, passed);
        if let Some((gone, turn)) = ended {
            self.carry_out(turn);
            drop(gone);
        }
    }

    /// Gives the place at the limit up, and then wakes the one that is to have it, whichever of these panics.
    fn carry_out(&self, turn: Turn) {
        let mut wakers = WakeList::default();
        wakers.push(turn.wake);
        wakers.push(turn.look);
        if let Some([a, b]) = turn.aside {
            self.0.gate.abandon(Ticket::new(a, b));
        }
    }
}

/// The number of a waiter, and its turn.
fn number(ticket: &Ticket) -> [u32; 2] {
    ticket.words().map(|word| word as u32)
}

impl<G: Gate> Gate for Fair<G> {
    fn enter(&self, call: &Call) -> Entry {
        let Some(key) = call.key(self.0.by) else { return self.refuse(Reason::NoKey(self.0.by)) };
        let key = KeyRef::from(key);
        let id = self.0.secret.id(key);
        let free = self.0.state.lock().line.present() == 0;
        if free { self.enter_limit(id, key, call) } else { self.stand_in_line(id, key, call) }
    }

    fn leave(&self, pass: Pass, outcome: Outcome) {
        self.0.gate.leave(pass, outcome);
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let [place, turn] = number(&ticket);
        let mut waker = Some(cx.waker().clone());
        let mut state = self.0.state.lock();
        let Some((stands, aside)) = state.see([place, turn], &mut waker, call.now()) else {
            drop(state);
            return self.enter(call);
        };
        let inner = match stands {
            Place::InLine => {
                let (again, turn) = state.look_after(call.now());
                drop(state);
                self.carry_out(turn);
                drop(waker);
                return Entry::Wait(ticket, Some(again));
            }
            Place::Called => None,
            Place::AtLimit(inner) => Some(inner),
            Place::Asking(inner) => inner,
        };
        state.stand(place, Place::Asking(inner));
        drop(state);
        self.carry_out(aside);
        drop(waker);
        let mut entry = match inner {
            Some([a, b]) => self.0.gate.poll_wait(Ticket::new(a, b), call, cx),
            None => self.0.gate.enter(call),
        };
        if let (None, Entry::Wait(inner, _)) = (inner, &entry) {
            // Noted before it is polled, which may panic.
            let [a, b] = inner.words();
            self.0.state.lock().stand(place, Place::Asking(Some([a, b])));
            entry = self.0.gate.poll_wait(Ticket::new(a, b), call, cx);
        }
        match entry {
            Entry::Wait(inner, until) => {
                let mut state = self.0.state.lock();
                state.stand(place, Place::AtLimit(inner.words()));
                let turn = state.turn();
                if state.is_at_limit(place) {
                    drop(state);
                    return Entry::Wait(ticket, until);
                }
                // Another goes before it, and has just been called.
                let again = state.next_look(call.now());
                drop(state);
                self.carry_out(turn);
                Entry::Wait(ticket, Some(again))
            }
            Entry::Pass(pass) => {
                let pass = Underway::new(pass, |pass| self.0.gate.leave(pass, Outcome::NotStarted));
                self.end_wait([place, turn], true);
                Entry::Pass(pass.arrive())
            }
            Entry::Refused(_) => {
                self.end_wait([place, turn], false);
                entry
            }
        }
    }

    fn abandon(&self, ticket: Ticket) {
        /// Calls the next even if the limit panics.
        struct End<'a, G: Gate>(&'a Fair<G>, [u32; 2]);

        impl<G: Gate> Drop for End<'_, G> {
            fn drop(&mut self) {
                self.0.end_wait(self.1, false);
            }
        }

        let [place, turn] = number(&ticket);
        let _end = End(self, [place, turn]);
        let mut state = self.0.state.lock();
        // From here on nobody else gives the limit's ticket back.
        let was = state.waiters.at(place, turn).map(|waiter| std::mem::replace(&mut waiter.place, Place::Asking(None)));
        drop(state);
        if let Some(Place::AtLimit([a, b]) | Place::Asking(Some([a, b]))) = was {
            self.0.gate.abandon(Ticket::new(a, b));
        }
    }

    fn settle(&self, pass: &mut Pass, call: &Call, actual: u32) {
        self.0.gate.settle(pass, call, actual);
    }

    fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
        self.0.gate.still(pass, call)
    }

    fn look(&self, call: &Call) -> Result<(), Refusal> {
        let refuse = |reason| Err(Refusal::by(self.0.name.clone(), reason));
        if call.key(self.0.by).is_none() {
            return refuse(Reason::NoKey(self.0.by));
        }
        if self.0.state.lock().line.present() > 0 { refuse(Reason::Busy) } else { self.0.gate.look(call) }
    }

    fn needs(&self) -> Needs {
        self.0.gate.needs()
    }

    fn name(&self) -> &str {
        self.0.name.as_str()
    }

    fn draw(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fair by {} (", self.0.by)?;
        self.0.gate.draw(f)?;
        f.write_str(")")
    }
}

impl<G> Clone for Fair<G> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<G: Gate> fmt::Debug for Fair<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fair").field("name", &self.0.name).field("by", &self.0.by).finish_non_exhaustive()
    }
}

impl<G> fmt::Debug for FairBuilder<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FairBuilder").field("by", &self.by).finish_non_exhaustive()
    }
}
