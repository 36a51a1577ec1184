//! The way of a call through the table: to its key's entry, into that entry's gate, and back.
//!
//! A pass of an entry whose state is a word is that word, the cost and the slot. Every other pass or ticket, two words of
//! an inner gate, is kept in the shard as a stay, and what the caller holds is the number of the stay.

use std::sync::Arc;
use std::task::Context;

use smallvec::SmallVec;

use super::PerKey;
use super::id::{Id, KeyRef, Secret};
use super::plan::{Plan, Version};
use super::shard::{GATE, Rest, Shard, Stay, Waste};
use crate::call::Call;
use crate::error::{Name, Reason, Refusal};
use crate::gate::{Entry, Outcome, Pass, Ticket, Times};
use crate::internal::sync::{AtomicU64, Mutex, MutexGuard, Relaxed};
use crate::internal::time::Moment;

/// How many entries are looked at for one that can be given up, when a new key finds the table full.
pub(super) const STEPS: u32 = 64;
/// How many of them, if their gates have to be asked.
pub(super) const ASKED: usize = 8;
/// How often a call starts anew because others changed the table while it had let go of the lock.
const ROUNDS: u32 = 8;

/// A no without a time to come back.
const BUSY: (Reason, Moment) = (Reason::Busy, Moment::NEVER);

type Assign<G> = Box<dyn Fn(KeyRef<'_>) -> Option<Plan<G>> + Send + Sync>;

pub(super) struct Shared<G> {
    pub(super) shards: Box<[Mutex<Shard<G>>]>,
    pub(super) secret: Secret,
    /// Goes up when the plans of keys are to be asked for again.
    pub(super) epoch: AtomicU64,
    pub(super) plan: Plan<G>,
    pub(super) plans: Option<Assign<G>>,
    pub(super) overflow: Option<Arc<G>>,
    /// Where the next sweep goes on.
    pub(super) sweeper: AtomicU64,
    pub(super) by: &'static str,
    pub(super) name: Name,
    pub(super) capacity: u32,
}

/// Who asks, by which number of the table.
#[derive(Clone, Copy)]
pub(super) struct Who<'a> {
    pub(super) id: Id,
    pub(super) key: KeyRef<'a>,
}

/// An entry that is kept in place, and its gate; or the overflow's gate and no entry.
pub(super) struct Pin<'a, G: PerKey> {
    shared: &'a Shared<G>,
    shard: u32,
    slot: Option<u32>,
    pub(super) gate: Arc<G>,
}

impl<G: PerKey> Pin<'_, G> {
    /// Hands it to the pass or ticket whose words these are; the result are those that lead back here.
    fn keep(mut self, words: [u64; 2], who: Who<'_>, took: u32) -> [u64; 2] {
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

fn word_pass(word: u64, cost: u32, shard: u32, slot: u32) -> Pass {
    Pass::new(word, u64::from(cost) << 32 | u64::from(shard << SLOT_BITS | slot))
}

impl<G: PerKey> Shared<G> {
    #[inline]
    pub(super) fn number(&self, id: Id) -> u32 {
        // A power of two of them.
        id.place as u32 & (self.shards.len() as u32 - 1)
    }

    fn epoch(&self) -> u32 {
        self.epoch.load(Relaxed) as u32
    }

    /// The settings of a key, and as of when. Calls the user's function.
    fn ask_plan(&self, key: KeyRef<'_>) -> (Arc<Version<G>>, u32) {
        let epoch = self.epoch();
        let plan = self.plans.as_ref().and_then(|plans| plans(key));
        (plan.as_ref().unwrap_or(&self.plan).version(), epoch)
    }

    #[cold]
    fn refusal(&self, reason: Reason, due: Moment, now: Moment) -> Refusal {
        let refusal = Refusal::by(self.name.clone(), reason);
        if due > now && due < Moment::NEVER { refusal.after(due.since(now)) } else { refusal }
    }

    #[inline]
    pub(super) fn enter(&self, who: Who<'_>, call: &Call) -> Entry {
        if G::IN_A_WORD {
            let number = self.number(who.id);
            let (cost, now, epoch) = (call.cost(), call.now(), self.epoch());
            let took = self.shards[number as usize].lock().take(who.id, who.key, cost, now, epoch);
            if let Some((slot, word)) = took {
                return Entry::Pass(word_pass(word, cost, number, slot));
            }
        }
        self.enter_slowly(who, call)
    }

    #[inline(never)]
    fn enter_slowly(&self, who: Who<'_>, call: &Call) -> Entry {
        let Who { id, key } = who;
        let (number, cost) = (self.number(id), call.cost());
        // Who needs no clock is not made to read it.
        let now = if G::IN_A_WORD { call.now() } else { Moment::NEVER };
        let mut asked: Option<(Arc<Version<G>>, u32)> = None;
        let mut made: Option<Arc<G>> = None;
        for _ in 0..ROUNDS {
            let mut waste = Waste::new();
            let mut shard = self.shards[number as usize].lock();
            let Some(slot) = shard.table.find(id) else {
                let Some((version, epoch)) = asked.clone() else {
                    drop(shard);
                    asked = Some(self.ask_plan(key));
                    continue;
                };
                // What refuses a new key adds none.
                let word = if G::IN_A_WORD { version.settings.word_take(0, cost, now) } else { None };
                if G::IN_A_WORD && word.is_none() {
                    shard.refused.add(id, key, 1);
                    drop(shard);
                    let (reason, due) = version.settings.word_refuse(0, call, false).unwrap_or(BUSY);
                    return Entry::Refused(self.refusal(reason, due, now));
                }
                if !G::IN_A_WORD && made.is_none() {
                    drop(shard);
                    made = Some(Arc::new(version.settings.another()));
                    continue;
                }
                if !shard.table.has_room_for(id) {
                    let (after, evicted) = self.give_up(number, shard, (STEPS, 1), call.now(), &mut waste);
                    shard = after;
                    // It may have let go of the lock: others may have taken the place, made one, or added the key.
                    let no_room = !shard.table.has_room_for(id);
                    if shard.table.find(id).is_some() || no_room && evicted > 0 {
                        continue;
                    }
                    if no_room {
                        break;
                    }
                }
                let Some(slot) = shard.insert(id, version, epoch, word.unwrap_or(0)) else { break };
                if let Some(gate) = made.take() {
                    shard.give_gate(slot, |_, _| gate);
                }
                if let Some(word) = word {
                    shard.heavy.add(id, key, cost);
                    return Entry::Pass(word_pass(word, cost, number, slot));
                }
                return self.enter_pinned(who, call, number, slot, shard, None);
            };
            // Its settings may have changed.
            let epoch = self.epoch();
            let mut new = None;
            if shard.table.mark(slot) != Some(epoch) {
                match &asked {
                    Some((version, since)) if *since == epoch => {
                        shard.table.set_mark(slot, epoch);
                        new = Some(version.clone());
                    }
                    _ => {
                        drop(shard);
                        asked = Some(self.ask_plan(key));
                        continue;
                    }
                }
            }
            let Some(entry) = shard.table.get_mut(slot) else { continue };
            if let Some(plan) = entry.version.changed().filter(|_| new.is_none()) {
                new = Some(plan.version());
                waste.keep_plan(plan);
            }
            let new = new.filter(|new| !Arc::ptr_eq(new, &entry.version));
            let inflated = entry.word & GATE != 0;
            if let Some(new) = &new {
                shard.follow(slot, new.clone(), now, &mut waste);
            }
            if G::IN_A_WORD && !inflated {
                if let Some(word) = shard.take_at(slot, id, key, cost, now) {
                    return Entry::Pass(word_pass(word, cost, number, slot));
                }
                let Some(entry) = shard.table.get(slot) else { continue };
                let no = entry.version.settings.word_refuse(entry.word, call, call.may_wait());
                if let Some((reason, due)) = no {
                    shard.refused.add(id, key, 1);
                    drop(shard);
                    return Entry::Refused(self.refusal(reason, due, now));
                }
                shard.give_gate(slot, |settings, word| Arc::new(settings.word_into(word)));
            }
            return self.enter_pinned(who, call, number, slot, shard, new.filter(|_| inflated));
        }
        self.enter_overflow(who, call, number)
    }

    /// Enters an entry's gate with the lock released.
    fn enter_pinned(
        &self,
        who: Who<'_>,
        call: &Call,
        number: u32,
        slot: u32,
        mut shard: MutexGuard<'_, Shard<G>>,
        new: Option<Arc<Version<G>>>,
    ) -> Entry {
        let gate = shard.pin(slot);
        drop(shard);
        let Some(gate) = gate else { return self.enter_overflow(who, call, number) };
        let pin = Pin { shared: self, shard: number, slot: Some(slot), gate };
        let mut new = new;
        while let Some(version) = new {
            pin.gate.adopt(&version.settings);
            // Who followed later may have been faster: the newest is to be the last.
            let shard = self.shards[number as usize].lock();
            let entry = shard.table.get(slot);
            new = entry.map(|entry| entry.version.clone()).filter(|newest| !Arc::ptr_eq(newest, &version));
        }
        self.enter_gate(who, call, pin)
    }

    #[cold]
    fn enter_overflow(&self, who: Who<'_>, call: &Call, number: u32) -> Entry {
        self.shards[number as usize].lock().overflowed += 1;
        if let Some(gate) = self.overflow.clone() {
            return self.enter_gate(who, call, Pin { shared: self, shard: number, slot: None, gate });
        }
        self.note_refused(who);
        Entry::Refused(self.refusal(Reason::KeySpaceFull, Moment::NEVER, Moment::NEVER))
    }

    fn enter_gate(&self, who: Who<'_>, call: &Call, pin: Pin<'_, G>) -> Entry {
        match pin.gate.enter(call) {
            Entry::Pass(pass) => {
                let [a, b] = pin.keep(pass.words(), who, call.cost());
                Entry::Pass(Pass::new(a, b))
            }
            Entry::Wait(ticket, at) => {
                let [a, b] = pin.keep(ticket.words(), who, 0);
                Entry::Wait(Ticket::new(a, b), at)
            }
            Entry::Refused(refusal) => {
                drop(pin);
                self.note_refused(who);
                Entry::Refused(refusal.in_name_of(&self.name))
            }
        }
    }

    fn note_refused(&self, who: Who<'_>) {
        self.shards[self.number(who.id) as usize].lock().refused.add(who.id, who.key, 1);
    }

    /// Looks at up to so many entries and gives up so many of those that are as good as new. It may let go of the lock
    /// in between.
    pub(super) fn give_up<'a>(
        &'a self,
        number: u32,
        mut shard: MutexGuard<'a, Shard<G>>,
        (steps, want): (u32, u32),
        now: Moment,
        waste: &mut Waste<G>,
    ) -> (MutexGuard<'a, Shard<G>>, u32) {
        let mut evicted = 0;
        let mut asked: SmallVec<[(u32, u64, Arc<G>); ASKED]> = SmallVec::new();
        for _ in 0..steps {
            if evicted == want || asked.len() == ASKED {
                break;
            }
            let slot = shard.table.advance();
            match shard.rest(slot, now) {
                Rest::Busy => {}
                Rest::Fresh => {
                    shard.evict(slot, waste);
                    evicted += 1;
                }
                Rest::Ask(touched, gate) => asked.push((slot, touched, gate)),
            }
        }
        if evicted == want || asked.is_empty() {
            return (shard, evicted);
        }
        drop(shard);
        // The handles go before the lock is taken again: another may have given the gates up meanwhile.
        let fresh = asked.into_iter().filter(|(_, _, gate)| gate.is_fresh(now));
        let fresh: SmallVec<[(u32, u64); ASKED]> = fresh.map(|(slot, touched, _)| (slot, touched)).collect();
        let mut shard = self.shards[number as usize].lock();
        for (slot, touched) in fresh {
            if evicted < want && shard.is_untouched(slot, touched) {
                shard.evict(slot, waste);
                evicted += 1;
            }
        }
        (shard, evicted)
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

    /// Puts back what a call took that came to nothing, if nobody has taken since.
    ///
    /// The entry may be another key's by now. But then the bucket was full when it was given up, and every state since
    /// is of a later time than the one that is compared.
    #[cold]
    fn put_back(&self, [word, rest]: [u64; 2]) {
        let (number, slot, cost) =
            ((rest as u32) >> SLOT_BITS, rest as u32 & ((1 << SLOT_BITS) - 1), (rest >> 32) as u32);
        let Some(shard) = self.shards.get(number as usize) else { return };
        let mut shard = shard.lock();
        let Some(cell) = shard.table.get_mut(slot) else { return };
        if cell.word & GATE == 0 {
            if cell.word == word {
                cell.word = cell.version.settings.word_untake(word, cost);
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

    /// What [`enter`](Self::enter) would say to a call that doesn't want to wait. Changes nothing but the count of refusals.
    /// Settings that have changed are for the one who enters.
    #[inline]
    pub(super) fn look(&self, who: Who<'_>, call: &Call) -> Result<(), Refusal> {
        let shard = &self.shards[self.number(who.id) as usize];
        if G::IN_A_WORD {
            let (cost, now) = (call.cost(), call.now());
            if shard.lock().would_take(who.id, cost, now) {
                return Ok(());
            }
        }
        self.look_closely(who, call)
    }

    #[inline(never)]
    fn look_closely(&self, who: Who<'_>, call: &Call) -> Result<(), Refusal> {
        let mut shard = self.shards[self.number(who.id) as usize].lock();
        let (mut no, mut gate) = (None, None);
        if let Some(slot) = shard.table.find(who.id) {
            gate = shard.gate_of(slot);
            no = match shard.table.get(slot) {
                Some(entry) if gate.is_none() => Some(entry.version.settings.word_refuse(entry.word, call, false)),
                _ => None,
            };
        }
        drop(shard);
        let looked = match (no, gate) {
            // It would be let in by now.
            (Some(None), _) => Ok(()),
            (Some(Some((reason, due))), _) => Err(self.refusal(reason, due, call.now())),
            (None, Some(gate)) => gate.look(call),
            (None, None) => self.ask_plan(who.key).0.settings.look(call),
        };
        looked.map_err(|refusal| {
            self.note_refused(who);
            refusal.in_name_of(&self.name)
        })
    }

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
}
