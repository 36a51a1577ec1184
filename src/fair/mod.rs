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
//! assert_eq!(*order.lock().unwrap(), ["loud", "loud", "loud", "quiet", "loud"]);
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
//! While nobody waits, a call enters the limit as it would without a line. Once one does, that one waits at the limit
//! itself, and all who come after stand in line, each behind the others of its key. When the one at the limit has its
//! pass or leaves, the next is chosen by deficit round robin (Shreedhar and Varghese 1995): keys take turns, and at each
//! turn a key may spend its weight times the largest cost in line. So a key that has just come goes after at most one
//! turn of every other, however many they have waiting. In the example two of `loud` go before `quiet`: one that ran, and
//! one that already waited at the limit.
//!
//! Threads that come in the same moment may both wait at the limit; they are in no line then, and served in its order.
//!
//! # Cancellation
//!
//! Who stops waiting leaves the line at once, or hands the place at the limit on.
//!
//! # Cost
//!
//! Without waiters a lock held for a few instructions, and the limit's own. Waiting costs a wake-up more than the limit
//! alone: it is passed on from one to the next. Who is next is found in a few steps however many wait, and who leaves the
//! line looks at no more than the others of its key.
//!
//! # Not for
//!
//! A limit per key is a [`Keyed`](crate::Keyed): there, who has little to do leaves unused what others could use.

mod line;

#[cfg(all(test, resile_loom))]
mod loom;

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::task::{Context, Waker};

use crate::call::Call;
use crate::error::{ConfigError, Faults, Name, Reason, Refusal};
use crate::gate::{Entry, Gate, IntoGate, Needs, Outcome, Pass, Ticket, Underway};
use crate::internal::queue::{DEFAULT_MAX_QUEUE, LONGEST_QUEUE};
use crate::internal::slab::Slab;
use crate::internal::sync::Mutex;
use crate::keyed::{Id, KeyRef, Secret};
use crate::step;
use line::Line;

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

#[derive(Default)]
struct State {
    line: Line,
    waiters: Slab<Waiter>,
    /// How many wait at the limit, or were told to go there. While it is 0, nobody stands in line.
    at_limit: u32,
}

struct Waiter {
    key: Id,
    place: Place,
    waker: Option<Waker>,
}

#[derive(Clone, Copy)]
enum Place {
    InLine,
    /// Told to enter the limit.
    Called,
    /// At the limit, with its ticket.
    AtLimit([u64; 2]),
}

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
    /// How many may stand in line: 16,384 unless said, at most 16,777,216.
    pub const fn max_queue(mut self, waiters: u32) -> Self {
        self.max_queue = waiters;
        self
    }

    /// How many of one key may: 1,024 unless said.
    pub const fn max_queue_per_key(mut self, waiters: u32) -> Self {
        self.max_per_key = waiters;
        self
    }

    /// How much of the limit a key gets beside others that wait: 1 unless said. It is asked with no lock held, for each
    /// call that has to wait.
    pub fn weights(mut self, weights: impl Fn(KeyRef<'_>) -> NonZeroU32 + Send + Sync + 'static) -> Self {
        self.weights = Some(Box::new(weights));
        self
    }

    /// The name that refusals of the line carry: that of the limit unless said.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Some(Name::from(name.into()));
        self
    }

    /// The fair limit.
    ///
    /// # Errors
    ///
    /// A line longer than 16,777,216, no room for one of a key, and every wrong setting of the limit.
    pub fn build(self) -> Result<Fair<G>, ConfigError> {
        let mut faults = Faults::of(format!("fair by {}", self.by));
        faults.check(self.max_queue <= LONGEST_QUEUE, "max_queue", &self.max_queue, "0 to 16777216");
        faults.check(self.max_per_key >= 1, "max_queue_per_key", &self.max_per_key, "1 or more");
        if let Err(wrong) = &self.gate {
            faults.absorb(|own, part| format!("{own}: {part}"), wrong.clone());
        }
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
        self.0.state.lock().line.len()
    }

    #[cold]
    fn refuse(&self, reason: Reason) -> Entry {
        Entry::Refused(Refusal::by(self.0.name.clone(), reason))
    }

    /// Enters the limit: whoever has to wait there is counted, and what is in its hands leads back through the line.
    fn enter_limit(&self, id: Id, call: &Call) -> Entry {
        match step::enter(&self.0.gate, call, call.may_wait()) {
            Entry::Wait(ticket, at) => {
                let mut state = self.0.state.lock();
                state.at_limit += 1;
                let place = Place::AtLimit(ticket.words());
                let (place, turn) = state.waiters.insert(Waiter { key: id, place, waker: None });
                Entry::Wait(Ticket::new(place.into(), turn.into()), at)
            }
            entry => entry,
        }
    }

    #[cold]
    fn stand_in_line(&self, id: Id, key: KeyRef<'_>, call: &Call) -> Entry {
        if !call.may_wait() {
            return self.refuse(Reason::Busy);
        }
        // Who can never be let in is told now: in line, its cost would make everybody's turns longer.
        if let Err(never) = self.0.gate.look(call) {
            if matches!(never.reason(), Reason::CostAboveLimit { .. } | Reason::ZeroCost | Reason::Closed) {
                return Entry::Refused(never);
            }
        }
        let weight = self.0.weights.as_ref().map_or(NonZeroU32::MIN, |weights| weights(key));
        let mut state = self.0.state.lock();
        if state.at_limit == 0 {
            drop(state);
            return self.enter_limit(id, call);
        }
        if state.line.len() >= self.0.max_queue || state.line.len_of(id) >= self.0.max_per_key {
            drop(state);
            return self.refuse(Reason::QueueFull);
        }
        let (place, turn) = state.waiters.insert(Waiter { key: id, place: Place::InLine, waker: None });
        state.line.push(id, weight, place, call.cost());
        Entry::Wait(Ticket::new(place.into(), turn.into()), None)
    }

    /// Forgets a waiter; if it was at the limit, the next is called there.
    fn end_wait(&self, [place, turn]: [u32; 2]) {
        let mut next = None;
        let mut state = self.0.state.lock();
        let gone = match state.waiters.at(place, turn) {
            Some(_) => state.waiters.remove(place),
            None => None,
        };
        match gone.as_ref().map(|waiter| (waiter.place, waiter.key)) {
            Some((Place::InLine, key)) => state.line.remove(key, place),
            Some(_) => {
                state.at_limit -= 1;
                next = state.call_next();
            }
            None => {}
        }
        drop(state);
        drop(gone);
        next.into_iter().for_each(Waker::wake);
    }
}

impl State {
    /// Calls the next to the limit if nobody is there: its waker, to be woken with the lock released.
    fn call_next(&mut self) -> Option<Waker> {
        if self.at_limit > 0 {
            return None;
        }
        let waiter = self.line.next().and_then(|place| self.waiters.get_mut(place))?;
        self.at_limit += 1;
        waiter.place = Place::Called;
        waiter.waker.take()
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
        let free = self.0.state.lock().at_limit == 0;
        if free { self.enter_limit(id, call) } else { self.stand_in_line(id, key, call) }
    }

    fn leave(&self, pass: Pass, outcome: Outcome) {
        self.0.gate.leave(pass, outcome);
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let [place, turn] = number(&ticket);
        let waker = cx.waker().clone();
        let mut state = self.0.state.lock();
        let Some(waiter) = state.waiters.at(place, turn) else {
            drop(state);
            return self.enter(call);
        };
        let at = waiter.place;
        if let Place::InLine = at {
            let old = waiter.waker.replace(waker);
            drop(state);
            drop(old);
            return Entry::Wait(ticket, None);
        }
        drop(state);
        let entry = match at {
            Place::AtLimit([a, b]) => self.0.gate.poll_wait(Ticket::new(a, b), call, cx),
            _ => match self.0.gate.enter(call) {
                Entry::Wait(inner, _) => {
                    // Noted before it is polled, which may panic.
                    self.note([place, turn], inner.words());
                    self.0.gate.poll_wait(inner, call, cx)
                }
                entry => entry,
            },
        };
        if let Entry::Wait(inner, until) = entry {
            self.note([place, turn], inner.words());
            return Entry::Wait(ticket, until);
        }
        let Entry::Pass(pass) = entry else {
            self.end_wait([place, turn]);
            return entry;
        };
        let pass = Underway::new(pass, |pass| self.0.gate.leave(pass, Outcome::NotStarted));
        self.end_wait([place, turn]);
        pass.arrive()
    }

    fn abandon(&self, ticket: Ticket) {
        let number = number(&ticket);
        let place = self.0.state.lock().waiters.at(number[0], number[1]).map(|waiter| waiter.place);
        if let Some(Place::AtLimit([a, b])) = place {
            /// Calls the next even if the limit panics.
            struct End<'a, G: Gate>(&'a Fair<G>, [u32; 2]);

            impl<G: Gate> Drop for End<'_, G> {
                fn drop(&mut self) {
                    self.0.end_wait(self.1);
                }
            }

            let _end = End(self, number);
            self.0.gate.abandon(Ticket::new(a, b));
        } else {
            self.end_wait(number);
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
        if self.0.state.lock().at_limit > 0 { refuse(Reason::Busy) } else { self.0.gate.look(call) }
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

impl<G: Gate> Fair<G> {
    fn note(&self, [place, turn]: [u32; 2], words: [u64; 2]) {
        if let Some(waiter) = self.0.state.lock().waiters.at(place, turn) {
            waiter.place = Place::AtLimit(words);
        }
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
