//! Passes and tickets being returned.
//!
//! A pass of an entry whose state is a word is the moment of its taking, the cost and the slot. Every other pass or
//! ticket, two words of an inner gate, is kept in the shard as a stay, and what the caller holds is the number of the
//! stay.

use std::sync::Arc;
use std::task::Context;

use super::PerKey;
use super::enter::{Shared, Who};
use super::id::Id;
use super::shard::{GATE, Stay, Waste};
use crate::call::Call;
use crate::error::Refusal;
use crate::gate::{Entry, Outcome, Pass, Ticket, Times};
use crate::internal::time::Moment;

/// An entry that is kept in place, and its gate; or the overflow's gate and no entry.
pub(super) struct Pin<'a, G: PerKey> {
    pub(super) shared: &'a Shared<G>,
    pub(super) shard: u32,
    pub(super) slot: Option<u32>,
    pub(super) gate: Arc<G>,
}

impl<G: PerKey> Pin<'_, G> {
    /// Hands it to the pass or ticket whose words these are; the result are those that lead back here.
    pub(super) fn keep(mut self, words: [u64; 2], who: Who<'_>, took: u32) -> [u64; 2] {
        let stay = Stay { gate: self.gate.clone(), words, slot: self.slot.take() };
        let mut shard = self.shared.shards[self.shard as usize].lock();
        shard.heavy.add(who.id, who.key, took);
        let (place, turn) = shard.stays.insert(stay);
        drop(shard);
        [GATE | u64::from(self.shard) << 32 | u64::from(place), turn.into()]
    }
}

impl<G: PerKey> Drop for Pin<'_, G> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            let mut waste = Waste::new();
            self.shared.shards[self.shard as usize].lock().unpin(slot, &mut waste);
        }
    }
}

/// Where the words of a stay lead.
fn stay([place, turn]: [u64; 2]) -> (u32, u32, u32) {
    ((place >> 32) as u32 & !(1 << 31), place as u32, turn as u32)
}

const SLOT_BITS: u32 = 24;

pub(super) fn word_pass(taken: Moment, cost: u32, shard: u32, slot: u32) -> Pass {
    // A moment so late that it has the bit of gates is 146 years away.
    Pass::new(taken.nanos() & !GATE, u64::from(cost) << 32 | u64::from(shard << SLOT_BITS | slot))
}

impl<G: PerKey> Shared<G> {
    /// The entry of a key, kept in place, with a gate in it.
    pub(super) fn pin(&self, id: Id) -> Option<Pin<'_, G>> {
        let number = self.number(id);
        let mut shard = self.shards[number as usize].lock();
        let slot = shard.table.find(id)?;
        shard.give_gate(slot, |settings, word| Arc::new(settings.word_into(word)));
        let gate = shard.pin(slot)?;
        drop(shard);
        Some(Pin { shared: self, shard: number, slot: Some(slot), gate })
    }

    pub(super) fn leave(&self, pass: &Pass, outcome: Outcome) {
        let words = pass.words();
        if words[0] & GATE != 0 {
            let (pin, inner) = self.take_stay(words);
            if let Some(pin) = pin {
                pin.gate.leave(Pass::new(inner[0], inner[1]), outcome);
            }
        } else if outcome == Outcome::NotStarted {
            self.put_back(words);
        }
    }

    /// The end of a stay: its pin, to be dropped last, and the inner words.
    fn take_stay(&self, words: [u64; 2]) -> (Option<Pin<'_, G>>, [u64; 2]) {
        let (number, place, turn) = stay(words);
        let taken = self.shards.get(number as usize).and_then(|shard| {
            let mut shard = shard.lock();
            shard.stays.at(place, turn)?;
            shard.stays.remove(place)
        });
        match taken {
            Some(Stay { gate, words, slot }) => (Some(Pin { shared: self, shard: number, slot, gate }), words),
            None => (None, [0; 2]),
        }
    }

    /// Puts back what a call took that came to nothing, less what has accrued since.
    ///
    /// The entry may be another key's by now. But then the bucket was full when it was given up, so what was taken has
    /// accrued since and nothing comes back.
    #[cold]
    fn put_back(&self, [word, rest]: [u64; 2]) {
        let (number, slot, cost) =
            ((rest as u32) >> SLOT_BITS, rest as u32 & ((1 << SLOT_BITS) - 1), (rest >> 32) as u32);
        let Some(shard) = self.shards.get(number as usize) else { return };
        let mut shard = shard.lock();
        let Some(cell) = shard.table.get_mut(slot) else { return };
        if cell.word & GATE == 0 {
            let taken = Moment::from_nanos(word);
            if cell.version.since <= taken {
                cell.word = cell.version.settings.word_undo(cell.word, taken, cost);
            }
            return;
        }
        if let Some(gate) = shard.pin(slot) {
            drop(shard);
            let pin = Pin { shared: self, shard: number, slot: Some(slot), gate };
            pin.gate.leave(Pass::new(word, cost.into()), Outcome::NotStarted);
        }
    }

    /// Sets what a pass has cost.
    ///
    /// The entry of a pass that is a word is looked up again: that in its slot may be another key's by now.
    #[cold]
    pub(super) fn settle(&self, who: Option<Who<'_>>, pass: &mut Pass, call: &Call, actual: u32) {
        let [word, rest] = pass.words();
        if word & GATE != 0 {
            if let Some((gate, inner)) = self.stay_of([word, rest]) {
                let mut settled = Pass::new(inner[0], inner[1]);
                gate.settle(&mut settled, call, actual);
                self.change_stay([word, rest], inner, settled.words());
            }
            return;
        }
        let Some(who) = who else { return };
        let cost = (rest >> 32) as u32;
        *pass = Pass::new(word, u64::from(actual) << 32 | u64::from(rest as u32));
        if let Some(pin) = self.pin(who.id) {
            pin.gate.settle(&mut Pass::new(word, cost.into()), call, actual);
        } else if actual > cost {
            // It was full again and has been given up: what is owed needs an entry, which one token makes.
            let Entry::Pass(one) = self.enter(who, &Call::alone(1, false)) else { return };
            if let Some(pin) = self.pin(who.id) {
                pin.gate.settle(&mut Pass::new(0, 1), call, actual - cost);
            }
            self.leave(&one, Outcome::Abandoned(Times { started: call.now(), ended: call.now() }));
        }
    }

    pub(super) fn poll_wait(&self, who: Who<'_>, ticket: &Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let [a, b] = ticket.words();
        let Some((gate, inner)) = self.stay_of([a, b]) else { return self.enter(who, call) };
        match gate.poll_wait(Ticket::new(inner[0], inner[1]), call, cx) {
            Entry::Pass(pass) => {
                let (number, ..) = stay([a, b]);
                self.shards[number as usize].lock().heavy.add(who.id, who.key, call.cost());
                self.change_stay([a, b], inner, pass.words());
                Entry::Pass(Pass::new(a, b))
            }
            Entry::Wait(ticket, at) => {
                self.change_stay([a, b], inner, ticket.words());
                Entry::Wait(Ticket::new(a, b), at)
            }
            Entry::Refused(refusal) => {
                drop(self.take_stay([a, b]));
                self.note_refused(who);
                Entry::Refused(refusal.in_name_of(&self.name))
            }
        }
    }

    fn stay_of(&self, words: [u64; 2]) -> Option<(Arc<G>, [u64; 2])> {
        let (number, place, turn) = stay(words);
        let mut shard = self.shards.get(number as usize)?.lock();
        shard.stays.at(place, turn).map(|stay| (stay.gate.clone(), stay.words))
    }

    fn change_stay(&self, words: [u64; 2], old: [u64; 2], new: [u64; 2]) {
        let (number, place, turn) = stay(words);
        if old != new {
            if let Some(stay) = self.shards[number as usize].lock().stays.at(place, turn) {
                stay.words = new;
            }
        }
    }

    pub(super) fn abandon(&self, ticket: &Ticket) {
        let (pin, inner) = self.take_stay(ticket.words());
        if let Some(pin) = pin {
            pin.gate.abandon(Ticket::new(inner[0], inner[1]));
        }
    }

    pub(super) fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
        let words = pass.words();
        if words[0] & GATE == 0 {
            return Ok(());
        }
        match self.stay_of(words) {
            Some((gate, [a, b])) => {
                gate.still(&Pass::new(a, b), call).map_err(|refusal| refusal.in_name_of(&self.name))
            }
            None => Ok(()),
        }
    }
}
