//! [`KeyedBuilder`]: the settings of a table, and the table made of them.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::enter::{Assign, Shared};
use super::id::{KeyRef, Secret};
use super::plan::Plan;
use super::shard::Shard;
use super::{Keyed, PerKey, table};
use crate::error::{ConfigError, Faults, Name};
use crate::gate::IntoGate;
use crate::internal::sync::{AtomicU64, Mutex};

/// How many keys a table holds by default.
pub const DEFAULT_CAPACITY: u32 = 65_536;
/// The most keys that a table can hold.
pub const MOST_KEYS: u32 = 1 << 28;
/// A part of a table is no smaller, so that chance spreads keys evenly enough.
const SMALLEST_PART: u32 = 4096;
const MOST_PARTS: u32 = 64;
const _: () = assert!(MOST_KEYS / MOST_PARTS < table::MOST);

/// Settings of a [`Keyed`].
#[must_use = "a builder does nothing until it is built"]
pub struct KeyedBuilder<G> {
    by: &'static str,
    plan: Result<Plan<G>, ConfigError>,
    plans: Option<Assign<G>>,
    overflow: Option<Result<G, ConfigError>>,
    capacity: u32,
    name: Option<Name>,
}

impl<G: PerKey> KeyedBuilder<G> {
    pub(super) const fn new(by: &'static str, plan: Result<Plan<G>, ConfigError>) -> Self {
        Self { by, plan, plans: None, overflow: None, capacity: DEFAULT_CAPACITY, name: None }
    }

    /// How many keys it holds at most, 1 to 268,435,456: 65,536 by default. Choose more than can be busy at the same
    /// time: keys that have been idle for long enough make room for others.
    pub const fn capacity(mut self, keys: u32) -> Self {
        self.capacity = keys;
        self
    }

    /// Which key has which plan; `None` for the settings that were given first.
    ///
    /// It is asked when a key gets an entry, and once more after [`reassign`](Keyed::reassign), with no lock held. A
    /// table does as well: `move |key| table.get(&key.to_key()).cloned()`.
    pub fn plans(mut self, plans: impl Fn(KeyRef<'_>) -> Option<Plan<G>> + Send + Sync + 'static) -> Self {
        self.plans = Some(Box::new(plans));
        self
    }

    /// One gate that all keys share for which there is no room, instead of a refusal.
    pub fn overflow(mut self, gate: impl IntoGate<Gate = G>) -> Self {
        self.overflow = Some(gate.into_gate());
        self
    }

    /// The name that refusals carry: that of the key by default.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Some(Name::from(name.into()));
        self
    }

    /// The table, empty.
    ///
    /// # Errors
    ///
    /// A capacity outside of 1 to 268,435,456, and every wrong setting of the gates.
    pub fn build(self) -> Result<Keyed<G>, ConfigError> {
        let mut faults = Faults::of(format!("keyed {:?}", self.by));
        let range = 1..=MOST_KEYS;
        faults.check(range.contains(&self.capacity), "capacity", &self.capacity, "1 to 268435456");
        if let Err(wrong) = &self.plan {
            faults.absorb(|own, part| format!("{own}, each key: {part}"), wrong.clone());
        }
        if let Some(Err(wrong)) = &self.overflow {
            faults.absorb(|own, part| format!("{own}, overflow: {part}"), wrong.clone());
        }
        faults.into_result()?;
        let (plan, overflow) = (self.plan?, self.overflow.transpose()?);
        let parts = 1 << (self.capacity / SMALLEST_PART).clamp(1, MOST_PARTS).ilog2();
        let shards = (0..parts).map(|part| {
            let more = u32::from(part < self.capacity % parts);
            Mutex::new(Shard::new(self.capacity / parts + more))
        });
        Ok(Keyed(Arc::new(Shared {
            shards: shards.collect(),
            secret: Secret::new(),
            epoch: AtomicU64::new(0),
            plan,
            plans: self.plans,
            overflow: overflow.map(Arc::new),
            sweeper: AtomicU64::new(0),
            by: self.by,
            name: self.name.unwrap_or(Name::Static(self.by)),
            capacity: self.capacity,
        })))
    }
}

impl<G: PerKey> IntoGate for KeyedBuilder<G> {
    type Gate = Keyed<G>;

    fn into_gate(self) -> Result<Keyed<G>, ConfigError> {
        self.build()
    }
}

impl<G> fmt::Debug for KeyedBuilder<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyedBuilder").field("by", &self.by).field("capacity", &self.capacity).finish_non_exhaustive()
    }
}
