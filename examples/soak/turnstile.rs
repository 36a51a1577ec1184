//! A gate that keeps a book of its passes and tickets, as any user may write one: it is how the soak knows that each of
//! them came back, and came back once.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Context;
use std::time::Duration;

use resile::{Call, Entry, Gate, Moment, Outcome, Pass, Reason, Refusal, Ticket};

/// Every so many calls wait for a moment, so that there are tickets to be lost.
const WAITS: u64 = 16;
const WAIT: Duration = Duration::from_millis(1);
/// Every so many are refused.
const REFUSES: u64 = 500;

#[derive(Debug)]
pub struct Turnstile {
    name: &'static str,
    book: Mutex<Book>,
}

/// Entries are numbered, so that a pass is known again.
#[derive(Debug, Default)]
struct Book {
    next: u64,
    inside: HashSet<u64>,
    waiting: HashMap<u64, Moment>,
    given: u64,
    returned: u64,
    most_inside: usize,
    fault: Option<String>,
}

impl Book {
    fn admit(&mut self, number: u64) -> Entry {
        self.given += 1;
        self.inside.insert(number);
        self.most_inside = self.most_inside.max(self.inside.len());
        Entry::Pass(Pass::new(number, !number))
    }

    /// The first fault is the one to look at.
    fn fault(&mut self, fault: String) {
        self.fault.get_or_insert(fault);
    }
}

impl Turnstile {
    pub fn new(name: &'static str) -> Self {
        Self { name, book: Mutex::default() }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are inside, and how many wait.
    pub fn held(&self) -> (usize, usize) {
        let book = self.book();
        (book.inside.len(), book.waiting.len())
    }

    pub fn given(&self) -> u64 {
        self.book().given
    }

    /// Whether the book is in order: every pass that was given is inside or came back, and no more were ever inside than
    /// the gate around it lets in.
    pub fn inspect(&self, most: usize) -> Result<(), String> {
        let book = self.book();
        if let Some(fault) = &book.fault {
            return Err(fault.clone());
        }
        if book.given != book.returned + book.inside.len() as u64 {
            let inside = book.inside.len();
            return Err(format!("{}: gave {}, got {} back, {inside} are inside", self.name, book.given, book.returned));
        }
        if book.most_inside > most {
            return Err(format!("{}: {} were inside of a semaphore of {most}", self.name, book.most_inside));
        }
        Ok(())
    }
}

impl Gate for Turnstile {
    fn enter(&self, call: &Call) -> Entry {
        let mut book = self.book();
        let number = book.next;
        book.next += 1;
        if number % REFUSES == 0 {
            return Entry::Refused(Refusal::new(self.name, Reason::Other("jammed")));
        }
        if number % WAITS == 0 && call.may_wait() {
            let due = call.now() + WAIT;
            book.waiting.insert(number, due);
            return Entry::Wait(Ticket::new(number, !number), Some(due));
        }
        book.admit(number)
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, _: &mut Context<'_>) -> Entry {
        let [number, _] = ticket.words();
        let mut book = self.book();
        match book.waiting.get(&number).copied() {
            Some(due) if due > call.now() => return Entry::Wait(ticket, Some(due)),
            Some(_) => {
                book.waiting.remove(&number);
            }
            None => book.fault(format!("{}: ticket {number} was used after it had gone", self.name)),
        }
        book.admit(number)
    }

    fn abandon(&self, ticket: Ticket) {
        let [number, _] = ticket.words();
        let mut book = self.book();
        if book.waiting.remove(&number).is_none() {
            book.fault(format!("{}: ticket {number} was given up after it had gone", self.name));
        }
    }

    fn leave(&self, pass: Pass, _: Outcome) {
        let [number, check] = pass.words();
        let mut book = self.book();
        book.returned += 1;
        if check != !number || !book.inside.remove(&number) {
            book.fault(format!("{}: pass {number} came back, and was not inside", self.name));
        }
    }

    fn name(&self) -> &str {
        self.name
    }
}
