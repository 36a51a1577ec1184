//! Who waits where: in line, called to the limit, or at it with a ticket.
//!
//! 1. All who wait are in line, the one at the limit among them.
//! 2. The first in line is the one at the limit, or called there; but while another is just asking there, it is left to
//!    that one to look when it has its answer.
//! 3. What a change has others do is returned as a [`Turn`], to be done with no lock held.

use std::num::NonZeroU32;
use std::task::Waker;

use super::line::Line;
use crate::gate::Ticket;
use crate::internal::slab::Slab;
use crate::keyed::Id;

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
    /// It is first now.
    pub(super) wake: Option<Waker>,
    /// The ticket of one that is no longer.
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
        let (place, number) = self.waiters.insert(Waiter { key, place: Place::InLine, waker: None });
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

    /// Whether this one is at the limit.
    pub(super) fn is_at_limit(&self, place: u32) -> bool {
        self.at_limit == Some(place)
    }
}
