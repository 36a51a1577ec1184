//! Gates under watch: a spy that notes all it is told, and readings of every part that can be held.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use resile::{
    Call, CircuitBreaker, Drain, Entry, Fair, Gate, Keyed, Layers, LeakyBucket, Moment, Outcome, Pass, Phase, Quota,
    Reason, Refusal, RetryBudget, Semaphore, SlidingWindow, State, Ticket, TokenBucket,
};

use super::journal::{Event, Journal};

/// A gate of our own that checks that each pass and each ticket comes back exactly once.
#[derive(Clone, Debug)]
pub struct Spy(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: &'static str,
    journal: Journal,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    manner: Manner,
    next: u64,
    passes: Vec<u64>,
    tickets: Vec<(u64, Moment)>,
    waker: Option<Waker>,
    /// How often it was asked, by `enter` or `poll_wait`.
    asked: u32,
    /// What was wrong. A panic would come in somebody's drop, where it could end the process.
    faults: Vec<String>,
}

/// How a spy receives calls.
#[derive(Clone, Debug, Default)]
pub enum Manner {
    #[default]
    LetsIn,
    /// Has each call wait so long, by naming the moment.
    Delays(Duration),
    /// Has calls wait until it is told otherwise, by keeping the waker.
    Queues,
    /// Refuses, so many times.
    Refuses(Refusal, u32),
}

impl Spy {
    pub fn new(name: &'static str, journal: &Journal) -> Self {
        Self(Arc::new(Inner { name, journal: journal.clone(), book: Mutex::default() }))
    }

    /// Sets how it receives calls, and wakes who waits.
    pub fn set(&self, manner: Manner) {
        let mut book = self.book();
        book.manner = manner;
        let waker = book.waker.take();
        drop(book);
        waker.into_iter().for_each(Waker::wake);
    }

    pub fn that(self, manner: Manner) -> Self {
        self.set(manner);
        self
    }

    pub fn asked(&self) -> u32 {
        self.book().asked
    }

    /// How many passes and tickets are out.
    pub fn out(&self) -> (usize, usize) {
        let book = self.book();
        assert!(book.faults.is_empty(), "{}: {:?}", self.0.name, book.faults);
        (book.passes.len(), book.tickets.len())
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, event: Event) {
        self.0.journal.note(event);
    }
}

impl Book {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn check(&mut self, fine: bool, fault: &str, number: u64) {
        if !fine {
            self.faults.push(format!("{fault} {number}"));
        }
    }

    fn pass(&mut self) -> Entry {
        let number = self.number();
        self.passes.push(number);
        Entry::Pass(Pass::new(number, !number))
    }

    fn take_ticket(&mut self, ticket: &Ticket) -> Option<Moment> {
        let [number, check] = ticket.words();
        let place = self.tickets.iter().position(|(other, _)| *other == number);
        self.check(place.is_some() && check == !number, "an unknown ticket came back:", number);
        place.map(|place| self.tickets.swap_remove(place).1)
    }
}

impl Gate for Spy {
    fn enter(&self, call: &Call) -> Entry {
        let mut book = self.book();
        book.asked += 1;
        let until = match &mut book.manner {
            Manner::LetsIn | Manner::Refuses(_, 0) => None,
            Manner::Refuses(refusal, times) => {
                *times -= 1;
                return Entry::Refused(refusal.clone());
            }
            Manner::Delays(time) => Some(call.now() + *time),
            Manner::Queues => Some(Moment::NEVER),
        };
        if let Some(until) = until {
            let number = book.number();
            book.tickets.push((number, until));
            drop(book);
            self.note(Event::Queued(self.0.name));
            return Entry::Wait(Ticket::new(number, !number), (until != Moment::NEVER).then_some(until));
        }
        let pass = book.pass();
        drop(book);
        self.note(Event::Entered(self.0.name));
        pass
    }

    fn leave(&self, pass: Pass, outcome: Outcome) {
        let [number, check] = pass.words();
        let mut book = self.book();
        let place = book.passes.iter().position(|other| *other == number);
        book.check(place.is_some() && check == !number, "an unknown pass came back:", number);
        if let Some(place) = place {
            book.passes.swap_remove(place);
        }
        drop(book);
        self.note(Event::Left(self.0.name, outcome));
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let mut book = self.book();
        book.asked += 1;
        let number = ticket.words()[0];
        let Some(until) = book.take_ticket(&ticket) else {
            return Entry::Refused(Refusal::new(self.0.name, Reason::Other("an unknown ticket")));
        };
        let waits = match book.manner {
            Manner::Queues => true,
            _ => until != Moment::NEVER && call.now() < until,
        };
        if waits {
            book.tickets.push((number, until));
            book.waker = Some(cx.waker().clone());
            return Entry::Wait(ticket, (until != Moment::NEVER).then_some(until));
        }
        let pass = book.pass();
        drop(book);
        self.note(Event::Entered(self.0.name));
        pass
    }

    fn abandon(&self, ticket: Ticket) {
        self.book().take_ticket(&ticket);
        self.note(Event::Abandoned(self.0.name));
    }

    fn still(&self, pass: &Pass, _: &Call) -> Result<(), Refusal> {
        let number = pass.words()[0];
        let mut book = self.book();
        let known = book.passes.contains(&number);
        book.check(known, "was asked about an unknown pass:", number);
        Ok(())
    }

    fn name(&self) -> &str {
        self.0.name
    }
}

/// Something whose state can be read.
#[derive(Clone, Debug)]
pub enum Watched {
    Semaphore(Semaphore),
    Bucket(TokenBucket),
    Leaky(LeakyBucket),
    Window(SlidingWindow),
    Quota(Quota),
    Breaker(CircuitBreaker),
    Budget(RetryBudget),
    Drain(Drain),
    /// With an entry for [`TENANT`].
    Keyed(Keyed<TokenBucket>),
    /// The two gates are its layers.
    Layers(Layers, TokenBucket, Semaphore),
    FairPermits(Fair<Semaphore>),
    FairTokens(Fair<TokenBucket>),
    Spy(Spy),
}

/// The key of the call under watch, for gates that work by the key "tenant".
pub const TENANT: u64 = 7;

/// The state of one part.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading {
    Semaphore {
        in_use: u32,
        available: u32,
        queued: u32,
    },
    Bucket {
        tokens: u32,
        queued: u32,
    },
    /// The places are those that a half-open breaker has free.
    Breaker {
        state: State,
        places: u32,
        calls: u64,
    },
    Budget {
        available: u64,
    },
    Drain {
        in_flight: u64,
        named: usize,
        phase: Phase,
    },
    Spy {
        passes: usize,
        tickets: usize,
    },
}

impl Watched {
    pub fn read(&self) -> Reading {
        match self {
            Self::Semaphore(semaphore) => Reading::Semaphore {
                in_use: semaphore.in_use(),
                available: semaphore.available(),
                queued: semaphore.queued(),
            },
            Self::Bucket(bucket) => Reading::Bucket { tokens: bucket.peek(), queued: bucket.queued() },
            Self::Leaky(bucket) => Reading::Bucket { tokens: bucket.peek(), queued: bucket.queued() },
            Self::Window(window) => Reading::Bucket { tokens: window.peek() as u32, queued: window.queued() },
            Self::Quota(quota) => Reading::Bucket { tokens: quota.peek() as u32, queued: quota.queued() },
            Self::Breaker(breaker) => {
                let state = breaker.state();
                let places = if state == State::HalfOpen { free_places(breaker) } else { 0 };
                Reading::Breaker { state, places, calls: breaker.counts().calls }
            }
            Self::Budget(budget) => Reading::Budget { available: budget.available() },
            Self::Drain(drain) => {
                Reading::Drain { in_flight: drain.in_flight(), named: drain.held().len(), phase: drain.phase() }
            }
            Self::Keyed(keyed) => Reading::Bucket {
                tokens: keyed.with(TENANT, TokenBucket::peek).expect("an entry that is in use"),
                queued: keyed.stats().pinned,
            },
            Self::Layers(_, bucket, semaphore) => Reading::Bucket { tokens: bucket.peek(), queued: semaphore.in_use() },
            Self::FairPermits(fair) => Reading::Semaphore {
                in_use: fair.limit().in_use(),
                available: fair.limit().available(),
                queued: fair.limit().queued() + fair.queued(),
            },
            Self::FairTokens(fair) => {
                Reading::Bucket { tokens: fair.limit().peek(), queued: fair.limit().queued() + fair.queued() }
            }
            Self::Spy(spy) => {
                let (passes, tickets) = spy.out();
                Reading::Spy { passes, tickets }
            }
        }
    }
}

/// Takes all probe places and gives them back, which is no verdict.
fn free_places(breaker: &CircuitBreaker) -> u32 {
    let mut probes = Vec::new();
    while let Ok(probe) = breaker.try_acquire() {
        probes.push(probe);
    }
    probes.len() as u32
}

/// Several parts under watch.
#[derive(Clone, Debug, Default)]
pub struct Watch(pub Vec<Watched>);

impl Watch {
    pub fn snapshot(&self) -> Vec<Reading> {
        self.0.iter().map(Watched::read).collect()
    }

    #[track_caller]
    pub fn assert_back_to(&self, start: &[Reading]) {
        assert_eq!(self.snapshot(), start, "something was not given back");
    }
}
