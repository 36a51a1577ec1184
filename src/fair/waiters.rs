//! Who waits where: in line, called to the limit, or at it with a ticket.
//!
//! 1. All who wait are in line, the one at the limit among them.
//! 2. The first in line is the one at the limit, or called there; but while another is just asking there, it is left to
//!    that one to look when it has its answer.
//! 3. While others wait, the one at the limit is asked now and then whether it is still there, by whoever in line is
//!    polled. One that does not come in [`PATIENCE`] is absent until it is polled: others go before it.
//! 4. What a change has others do is returned as a [`Turn`], to be done with no lock held.

use std::num::NonZeroU32;
use std::task::Waker;

use super::line::Line;
use crate::gate::Ticket;
use crate::internal::slab::Slab;
use crate::internal::time::Moment;
use crate::keyed::Id;

/// How long the one at the limit may take to be polled after it was woken, in nanoseconds: long beside the time for which
/// a healthy task runs between two awaits, short beside a call.
const PATIENCE: u64 = 10_000_000;
/// How many times the patience a waiter lets go by at most between two looks.
const MOST_BETWEEN: u32 = 100;

#[derive(Default)]
pub(super) struct State {
    /// All who wait, the one at the limit among them.
    pub(super) line: Line,
    pub(super) waiters: Slab<Waiter>,
    /// Who waits at the limit, or was told to go there: the first in line, but for one that is just being polled.
    at_limit: Option<u32>,
}

pub(super) struct Waiter {
    key: Id,
    pub(super) place: Place,
    pub(super) waker: Option<Waker>,
    /// When it was polled last, or asked whether it is still there.
    heard: Moment,
    /// It was asked, and has not been polled since.
    asked: bool,
}

#[derive(Clone, Copy)]
pub(super) enum Place {
    InLine,
    /// Told to enter the limit.
    Called,
    /// At the limit, with its ticket.
    AtLimit([u64; 2]),
    /// It enters the limit, or asks there with its ticket: nobody else may touch that.
    Asking(Option<[u64; 2]>),
}

/// What a change of the line has others do, with no lock held.
#[derive(Default)]
pub(super) struct Turn {
    /// One is first now, or has to look whether the one at the limit is still there.
    pub(super) wake: Option<Waker>,
    /// One is not first any more, and has to look after the one that is.
    pub(super) look: Option<Waker>,
    /// The ticket of that one.
    pub(super) aside: Option<[u64; 2]>,
}

impl State {
    /// How many stand in line and not at the limit.
    pub(super) fn in_line(&self) -> u32 {
        self.line.len() - u32::from(self.at_limit.is_some())
    }

    /// The same of one key.
    pub(super) fn in_line_of(&mut self, key: Id) -> u32 {
        let at_limit = self.at_limit.and_then(|place| self.waiters.get_mut(place)).is_some_and(|it| it.key == key);
        self.line.len_of(key) - u32::from(at_limit)
    }

    /// One more waits, who may have a ticket of the limit.
    pub(super) fn join(&mut self, key: Id, weight: NonZeroU32, cost: u32, inner: Option<[u64; 2]>) -> (Ticket, Turn) {
        let (place, number) = self.waiters.insert(Waiter {
            key,
            place: Place::InLine,
            waker: None,
            heard: Moment::from_nanos(0),
            asked: false,
        });
        self.line.push(key, weight, place, cost);
        let mut turn = Turn::default();
        match inner {
            Some(inner) if self.at_limit.is_none() => {
                self.at_limit = Some(place);
                self.stand(place, Place::AtLimit(inner));
                turn = self.turn();
            }
            // Another thread's was faster.
            Some(inner) => turn.aside = Some(inner),
            None => turn = self.turn(),
        }
        (Ticket::new(place.into(), number.into()), turn)
    }

    pub(super) fn stand(&mut self, number: u32, place: Place) {
        if let Some(waiter) = self.waiters.get_mut(number) {
            waiter.place = place;
        }
    }

    /// Calls the first in line to the limit, in place of who is there.
    pub(super) fn turn(&mut self) -> Turn {
        let mut turn = Turn::default();
        let first = self.line.first();
        if self.at_limit == first {
            return turn;
        }
        if let Some(waiter) = self.at_limit.and_then(|place| self.waiters.get_mut(place)) {
            match waiter.place {
                // It looks for itself when it has its answer.
                Place::Asking(_) => return turn,
                Place::AtLimit(ticket) => turn.aside = Some(ticket),
                Place::Called | Place::InLine => {}
            }
            waiter.place = Place::InLine;
            turn.look = waiter.waker.take();
        }
        self.at_limit = first;
        if let Some(waiter) = first.and_then(|place| self.waiters.get_mut(place)) {
            waiter.place = Place::Called;
            // One that has none yet is about to be polled.
            turn.wake = waiter.waker.take();
        }
        turn
    }

    /// A waiter passes or leaves; if it was at the limit, the next is called. It is returned, to be dropped outside.
    pub(super) fn end(&mut self, [place, turn]: [u32; 2], passed: bool) -> Option<(Waiter, Turn)> {
        self.waiters.at(place, turn)?;
        let gone = self.waiters.remove(place)?;
        if passed {
            self.line.pass(gone.key, place);
        } else {
            self.line.leave(gone.key, place);
        }
        if self.at_limit == Some(place) {
            self.at_limit = None;
        }
        Some((gone, self.turn()))
    }

    /// A waiter is polled: it is there. What is left as its waker afterwards is to be dropped outside.
    pub(super) fn see(
        &mut self,
        [place, turn]: [u32; 2],
        waker: &mut Option<Waker>,
        now: Moment,
    ) -> Option<(Place, Turn)> {
        let waiter = self.waiters.at(place, turn)?;
        let old = waiter.waker.take();
        (waiter.heard, waiter.asked) = (now, false);
        let key = waiter.key;
        self.line.set_present(key, place);
        // Without a waker it is not woken if it is called: it is here.
        let turn = if self.line.first() == Some(place) { self.turn() } else { Turn::default() };
        let waiter = self.waiters.get_mut(place)?;
        waiter.waker = std::mem::replace(waker, old);
        Some((waiter.place, turn))
    }

    /// Looks whether the one at the limit is still there, for one in line. Returns also when to look again: soon after it
    /// was asked.
    pub(super) fn look_after(&mut self, now: Moment) -> (Moment, Turn) {
        let mut turn = Turn::default();
        let (soon, seldom) = (now.plus_nanos(PATIENCE), self.next_look(now));
        let Some(waiter) = self.at_limit.and_then(|place| self.waiters.get_mut(place)) else { return (seldom, turn) };
        if matches!(waiter.place, Place::Asking(_)) {
            return (seldom, turn);
        }
        // A clock that went back must not be waited for.
        waiter.heard = waiter.heard.min(now);
        if now < waiter.heard.plus_nanos(PATIENCE) {
            return (if waiter.asked { soon } else { seldom }, turn);
        }
        if !waiter.asked {
            (waiter.heard, waiter.asked) = (now, true);
            turn.wake = waiter.waker.take();
            return (soon, turn);
        }
        let key = waiter.key;
        if let Some(place) = self.at_limit {
            self.line.set_absent(key, place);
        }
        turn = self.turn();
        if let Some(next) = self.at_limit.and_then(|place| self.waiters.get_mut(place)) {
            (next.heard, next.asked) = (now, true);
        }
        (soon, turn)
    }

    /// When one in line is to look again: the more wait, the less often each of them does.
    pub(super) fn next_look(&self, now: Moment) -> Moment {
        now.plus_nanos(PATIENCE * u64::from(self.in_line().clamp(1, MOST_BETWEEN)))
    }

    /// Whether this one is at the limit.
    pub(super) fn is_at_limit(&self, place: u32) -> bool {
        self.at_limit == Some(place)
    }
}
