//! One part of a table of keys, with what is in the hands of callers. It lies under its own lock.
//!
//! 1. No user code runs in here: gates and settings of users are asked, changed and dropped with the lock released. What
//!    is taken out comes back as [`Waste`], which the caller drops afterwards.
//! 2. An entry with pins is never taken out: somebody holds a pass of it, waits at it or is about to enter it.
//! 3. A gate's state changes only while its entry is pinned, or with time. So an entry that was seen unpinned, was asked
//!    with the lock released whether it is fresh, and has not been touched since, is fresh still.

use std::sync::Arc;

use smallvec::SmallVec;

use super::PerKey;
use super::id::{Id, KeyRef};
use super::plan::{Plan, Version};
use super::sketch::Sketch;
use super::table::Table;
use crate::internal::slab::Slab;
use crate::internal::time::Moment;

/// The bit of a cell's word that says that the rest is the place of a gate. A state is below it.
pub(super) const GATE: u64 = 1 << 63;
/// Counters of a sketch.
const COUNTERS: usize = 32;
/// One unit in so many is counted for the heaviest keys; of refusals each.
const GAP: u32 = 64;

/// What is kept of a key.
pub(super) struct Cell<G> {
    /// The state of its gate, or where that gate is.
    pub(super) word: u64,
    pub(super) version: Arc<Version<G>>,
}

/// A gate whose state does not fit in a word, at least not now.
pub(super) struct Full<G> {
    gate: Arc<G>,
    pins: u32,
    /// The shard's turn when it was last pinned.
    touched: u64,
}

/// A pass or a ticket of such a gate, in the hands of a caller.
pub(super) struct Stay<G> {
    pub(super) gate: Arc<G>,
    pub(super) words: [u64; 2],
    /// The pinned entry, if it has one.
    pub(super) slot: Option<u32>,
}

/// What is to be dropped with the lock released.
#[derive(Default)]
pub(super) struct Waste<G>(SmallVec<[Junk<G>; 2]>);

#[allow(dead_code, reason = "held to be dropped")]
enum Junk<G> {
    Cell(Cell<G>),
    Full(Full<G>),
    Version(Arc<Version<G>>),
    Plan(Plan<G>),
}

/// What there is to say about an entry with the lock held.
pub(super) enum Rest<G> {
    /// It is none, or is in use.
    Busy,
    /// It can be given up.
    Fresh,
    /// It can be given up if this gate says so and was not touched.
    Ask(u64, Arc<G>),
}

pub(super) struct Shard<G> {
    /// The mark of an entry is when it was last asked which plan its key has.
    pub(super) table: Table<Cell<G>>,
    pub(super) gates: Slab<Full<G>>,
    pub(super) stays: Slab<Stay<G>>,
    turn: u64,
    pub(super) pinned: u32,
    pub(super) evicted: u64,
    pub(super) overflowed: u64,
    pub(super) heavy: Sketch,
    pub(super) refused: Sketch,
}

impl<G: PerKey> Shard<G> {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            table: Table::new(capacity),
            gates: Slab::new(),
            stays: Slab::new(),
            turn: 0,
            pinned: 0,
            evicted: 0,
            overflowed: 0,
            heavy: Sketch::new(COUNTERS, GAP),
            refused: Sketch::new(COUNTERS, 1),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.table.bytes() + self.heavy.bytes() + self.refused.bytes()
    }

    /// Takes at once from a key whose state is a word: the slot.
    #[inline]
    pub(super) fn take(&mut self, id: Id, key: KeyRef<'_>, cost: u32, now: Moment, epoch: u32) -> Option<u32> {
        let slot = self.table.find(id)?;
        if self.table.mark(slot)? != epoch {
            return None;
        }
        let cell = self.table.get_mut(slot)?;
        if cell.word & GATE != 0 || cell.version.is_retired() {
            return None;
        }
        cell.word = cell.version.settings.word_take(cell.word, cost, now)?;
        self.heavy.add(id, key, cost);
        Some(slot)
    }

    /// Whether [`take`](Self::take) would, as far as settings have not changed.
    #[inline]
    pub(super) fn would_take(&self, id: Id, cost: u32, now: Moment) -> bool {
        let cell = self.table.find(id).and_then(|slot| self.table.get(slot));
        let word = cell.filter(|cell| cell.word & GATE == 0);
        word.is_some_and(|cell| cell.version.settings.word_take(cell.word, cost, now).is_some())
    }

    /// Adds an entry. The caller has checked that there is room.
    pub(super) fn insert(&mut self, id: Id, version: Arc<Version<G>>, epoch: u32, word: u64) -> Option<u32> {
        self.table.insert(id, epoch, Cell { word, version })
    }

    /// Has an entry work by other settings. A gate has to adopt them afterwards.
    pub(super) fn follow(&mut self, slot: u32, new: Arc<Version<G>>, now: Moment, waste: &mut Waste<G>) {
        if let Some(cell) = self.table.get_mut(slot) {
            if G::IN_A_WORD && cell.word & GATE == 0 {
                cell.word = cell.version.settings.word_for(cell.word, now, &new.settings);
            }
            waste.0.push(Junk::Version(std::mem::replace(&mut cell.version, new)));
        }
    }

    /// Gives an entry the gate that goes with its word, unless it has one.
    pub(super) fn give_gate(&mut self, slot: u32, gate: impl FnOnce(&G, u64) -> Arc<G>) {
        if let Some(cell) = self.table.get_mut(slot) {
            if cell.word & GATE == 0 {
                let gate = gate(&cell.version.settings, cell.word);
                cell.word = GATE | u64::from(self.gates.insert(Full { gate, pins: 0, touched: 0 }).0);
            }
        }
    }

    pub(super) fn has_gate(&self, slot: u32) -> bool {
        self.table.get(slot).is_some_and(|cell| cell.word & GATE != 0)
    }

    /// The gate of an entry, if it has one.
    fn gate(&mut self, slot: u32) -> Option<&mut Full<G>> {
        let word = self.table.get(slot)?.word;
        if word & GATE == 0 { None } else { self.gates.get_mut(word as u32) }
    }

    /// The same as a handle.
    pub(super) fn gate_of(&mut self, slot: u32) -> Option<Arc<G>> {
        self.gate(slot).map(|full| full.gate.clone())
    }

    /// Keeps an entry that has a gate in place.
    pub(super) fn pin(&mut self, slot: u32) -> Option<Arc<G>> {
        self.turn += 1;
        let turn = self.turn;
        let full = self.gate(slot)?;
        full.pins += 1;
        full.touched = turn;
        let (first, gate) = (full.pins == 1, full.gate.clone());
        self.pinned += u32::from(first);
        Some(gate)
    }

    /// Lets go of it. The last one leaves a word behind if that says all.
    pub(super) fn unpin(&mut self, slot: u32, waste: &mut Waste<G>) {
        let Some(full) = self.gate(slot) else { return };
        full.pins -= 1;
        if full.pins > 0 {
            return;
        }
        self.pinned -= 1;
        if !G::IN_A_WORD {
            return;
        }
        if let Some(cell) = self.table.get_mut(slot) {
            let place = cell.word as u32;
            let word = self.gates.get_mut(place).and_then(|full| cell.version.settings.word_of(&full.gate));
            if let Some(word) = word {
                cell.word = word;
                waste.0.extend(self.gates.remove(place).map(Junk::Full));
            }
        }
    }

    pub(super) fn rest(&mut self, slot: u32, now: Moment) -> Rest<G> {
        let Some(cell) = self.table.get(slot) else { return Rest::Busy };
        if cell.word & GATE == 0 {
            return if cell.version.settings.word_is_fresh(cell.word, now) { Rest::Fresh } else { Rest::Busy };
        }
        match self.gate(slot) {
            Some(full) if full.pins == 0 => Rest::Ask(full.touched, full.gate.clone()),
            _ => Rest::Busy,
        }
    }

    /// Whether nobody has pinned the entry since.
    pub(super) fn is_untouched(&mut self, slot: u32, touched: u64) -> bool {
        self.gate(slot).is_some_and(|full| full.pins == 0 && full.touched == touched)
    }

    pub(super) fn evict(&mut self, slot: u32, waste: &mut Waste<G>) {
        if let Some(cell) = self.table.remove(slot) {
            if cell.word & GATE != 0 {
                waste.0.extend(self.gates.remove(cell.word as u32).map(Junk::Full));
            }
            waste.0.push(Junk::Cell(cell));
            self.evicted += 1;
        }
    }
}

impl<G> Waste<G> {
    pub(super) fn new() -> Self {
        Self(SmallVec::new())
    }

    pub(super) fn keep_plan(&mut self, plan: Plan<G>) {
        self.0.push(Junk::Plan(plan));
    }
}
