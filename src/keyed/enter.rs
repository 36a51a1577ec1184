//! The way of a call into the table: to its key's entry, and into that entry's gate.

use std::sync::Arc;

use super::id::{Id, KeyRef, Secret};
use super::plan::{Plan, Version};
use super::room::STEPS;
use super::shard::{GATE, Shard, Waste};
use super::stay::{Pin, word_pass};
use super::{PerKey, WordEntry};
use crate::call::Call;
use crate::error::{Name, Reason, Refusal};
use crate::gate::{Entry, Pass, Ticket};
use crate::internal::sync::{AtomicU64, Mutex, MutexGuard, Relaxed};
use crate::internal::time::Moment;

/// Maximum retries after losing a race.
const ROUNDS: u32 = 8;

pub(super) type Assign<G> = Box<dyn Fn(KeyRef<'_>) -> Option<Plan<G>> + Send + Sync>;

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

/// The plan of a key has to be asked for, with the lock released.
struct Unasked;

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
        let refusal = match reason {
            Reason::KeySpaceFull => refusal.with_capacity(self.capacity),
            _ if G::IN_A_WORD => refusal.of_rate(),
            _ => refusal,
        };
        if due > now && due < Moment::NEVER { refusal.after(due.since(now)) } else { refusal }
    }

    /// What a gate whose state is a word says to a call that does not wait.
    #[cold]
    fn refusal_of(&self, no: WordEntry, now: Moment) -> Refusal {
        match no {
            WordEntry::Never(reason) => self.refusal(reason, Moment::NEVER, now),
            WordEntry::Later(due) => self.refusal(Reason::Busy, due, now),
            WordEntry::In(_) => unreachable!("it is let in"),
        }
    }

    #[inline]
    pub(super) fn enter(&self, who: Who<'_>, call: &Call) -> Entry {
        if G::IN_A_WORD {
            let number = self.number(who.id);
            let (cost, now, epoch) = (call.cost(), call.now(), self.epoch());
            let took = self.shards[number as usize].lock().take(who.id, who.key, cost, now, epoch);
            if let Some(slot) = took {
                return Entry::Pass(word_pass(now, cost, number, slot));
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
                let word = match G::IN_A_WORD.then(|| version.settings.word_enter(0, cost, now)) {
                    None => None,
                    Some(WordEntry::In(word)) => Some(word),
                    Some(no) => {
                        shard.refused.add(id, key, 1);
                        drop(shard);
                        return Entry::Refused(self.refusal_of(no, now));
                    }
                };
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
                if word.is_some() {
                    shard.heavy.add(id, key, cost);
                    return Entry::Pass(word_pass(now, cost, number, slot));
                }
                return self.enter_pinned(who, call, number, slot, shard, None);
            };
            let Ok(new) = self.follow(&mut shard, slot, asked.as_ref(), now, &mut waste) else {
                drop(shard);
                asked = Some(self.ask_plan(key));
                continue;
            };
            if G::IN_A_WORD && !shard.has_gate(slot) {
                let Some(entry) = shard.table.get_mut(slot) else { continue };
                let no = match entry.version.settings.word_enter(entry.word, cost, now) {
                    WordEntry::In(word) => {
                        entry.word = word;
                        shard.heavy.add(id, key, cost);
                        return Entry::Pass(word_pass(now, cost, number, slot));
                    }
                    WordEntry::Later(due) if call.may_wait() => {
                        entry.version.settings.word_wait(call, due).map(|reason| self.refusal(reason, due, now))
                    }
                    no => Some(self.refusal_of(no, now)),
                };
                if let Some(refusal) = no {
                    shard.refused.add(id, key, 1);
                    drop(shard);
                    return Entry::Refused(refusal);
                }
                shard.give_gate(slot, |settings, word| Arc::new(settings.word_into(word)));
            }
            return self.enter_pinned(who, call, number, slot, shard, new);
        }
        self.enter_overflow(who, call, number)
    }

    /// Has an entry go by the settings of now: what its gate is to adopt, unless the plan of its key has to be asked for
    /// first. Whoever has asked goes by what it was told; if that does not hold any more, the next one asks again.
    fn follow(
        &self,
        shard: &mut Shard<G>,
        slot: u32,
        asked: Option<&(Arc<Version<G>>, u32)>,
        now: Moment,
        waste: &mut Waste<G>,
    ) -> Result<Option<Arc<Version<G>>>, Unasked> {
        let mut new = None;
        if shard.table.mark(slot) != Some(self.epoch()) {
            let (version, since) = asked.ok_or(Unasked)?;
            shard.table.set_mark(slot, *since);
            new = Some(version.clone());
        }
        let Some(entry) = shard.table.get(slot) else { return Ok(None) };
        if let Some(plan) = entry.version.changed().filter(|_| new.is_none()) {
            new = Some(plan.version());
            waste.keep_plan(plan);
        }
        let new = new.filter(|new| !Arc::ptr_eq(new, &entry.version));
        let has_gate = entry.word & GATE != 0;
        if let Some(new) = &new {
            shard.follow(slot, new.clone(), now, waste);
        }
        Ok(new.filter(|_| has_gate))
    }

    /// Enters an entry's gate with the lock released.
    fn enter_pinned(
        &self,
        who: Who<'_>,
        call: &Call,
        number: u32,
        slot: u32,
        shard: MutexGuard<'_, Shard<G>>,
        new: Option<Arc<Version<G>>>,
    ) -> Entry {
        match self.pin_and_adopt(number, slot, shard, new) {
            Some(pin) => self.enter_gate(who, call, pin),
            None => self.enter_overflow(who, call, number),
        }
    }

    /// Keeps an entry in place, and releases the lock to have its gate adopt new settings.
    fn pin_and_adopt(
        &self,
        number: u32,
        slot: u32,
        mut shard: MutexGuard<'_, Shard<G>>,
        mut new: Option<Arc<Version<G>>>,
    ) -> Option<Pin<'_, G>> {
        let gate = shard.pin(slot)?;
        drop(shard);
        let pin = Pin { shared: self, shard: number, slot: Some(slot), gate };
        while let Some(version) = new {
            pin.gate.adopt(&version.settings);
            // Who followed later may have been faster: the newest is to be the last.
            let shard = self.shards[number as usize].lock();
            let entry = shard.table.get(slot);
            new = entry.map(|entry| entry.version.clone()).filter(|newest| !Arc::ptr_eq(newest, &version));
        }
        Some(pin)
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

    pub(super) fn note_refused(&self, who: Who<'_>) {
        self.shards[self.number(who.id) as usize].lock().refused.add(who.id, who.key, 1);
    }

    /// What [`enter`](Self::enter) would say to a call that doesn't want to wait. Changes nothing but what is counted, that
    /// an entry goes by the settings of now, and that a new key may find the room that was made for it.
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
        let now = if G::IN_A_WORD { call.now() } else { Moment::NEVER };
        let looked = self.look_at_entry(who, call, now).unwrap_or_else(|| {
            let (version, _) = self.ask_plan(who.key);
            version.settings.look(call).and_then(|()| self.look_for_room(who, call))
        });
        looked.map_err(|refusal| {
            self.note_refused(who);
            refusal.in_name_of(&self.name)
        })
    }

    /// What the gate of a key says, if the key has an entry.
    fn look_at_entry(&self, who: Who<'_>, call: &Call, now: Moment) -> Option<Result<(), Refusal>> {
        let number = self.number(who.id);
        let mut asked = None;
        loop {
            let mut waste = Waste::new();
            let mut shard = self.shards[number as usize].lock();
            let slot = shard.table.find(who.id)?;
            let Ok(new) = self.follow(&mut shard, slot, asked.as_ref(), now, &mut waste) else {
                drop(shard);
                asked = Some(self.ask_plan(who.key));
                continue;
            };
            if new.is_some() {
                let pin = self.pin_and_adopt(number, slot, shard, new)?;
                return Some(pin.gate.look(call));
            }
            if let Some(gate) = shard.gate_of(slot) {
                drop(shard);
                return Some(gate.look(call));
            }
            let entry = shard.table.get(slot)?;
            let said = entry.version.settings.word_enter(entry.word, call.cost(), now);
            drop(shard);
            return Some(match said {
                WordEntry::In(_) => Ok(()),
                no => Err(self.refusal_of(no, now)),
            });
        }
    }

    /// Whether there is room for a new key; if not, what the gate says that such keys share.
    fn look_for_room(&self, who: Who<'_>, call: &Call) -> Result<(), Refusal> {
        let number = self.number(who.id);
        let mut waste = Waste::new();
        let mut shard = self.shards[number as usize].lock();
        if !shard.table.has_room_for(who.id) {
            (shard, _) = self.give_up(number, shard, (STEPS, 1), call.now(), &mut waste);
        }
        if shard.table.has_room_for(who.id) || shard.table.find(who.id).is_some() {
            return Ok(());
        }
        if let Some(gate) = &self.overflow {
            drop(shard);
            return gate.look(call);
        }
        shard.overflowed += 1;
        drop(shard);
        Err(self.refusal(Reason::KeySpaceFull, Moment::NEVER, Moment::NEVER))
    }
}
