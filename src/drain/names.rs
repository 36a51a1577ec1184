//! The names of what is in flight: a bounded register under a mutex, in the order of coming.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use crate::error::Name;
use crate::internal::time::Moment;

/// The number of those that found the register full.
pub(crate) const UNNAMED: u64 = 0;

#[derive(Debug)]
pub(crate) struct Names {
    entries: BTreeMap<u64, Named>,
    most: u32,
    last: u64,
}

#[derive(Debug)]
struct Named {
    name: Name,
    since: Moment,
}

impl Names {
    pub(crate) const fn new(most: u32) -> Self {
        Self { entries: BTreeMap::new(), most, last: UNNAMED }
    }

    /// Notes a passage, unless as many are noted as may be: the number under which it is to be found.
    pub(crate) fn note(&mut self, name: Name, since: Moment) -> u64 {
        if self.entries.len() >= self.most as usize {
            return UNNAMED;
        }
        self.last += 1;
        self.entries.insert(self.last, Named { name, since });
        self.last
    }

    pub(crate) fn forget(&mut self, number: u64) {
        self.entries.remove(&number);
    }

    /// A line for each, in the order of coming.
    pub(crate) fn all(&self, now: Moment) -> Vec<Held> {
        let held = |named: &Named| Held { name: named.name.clone(), count: 1, longest: now.since(named.since) };
        self.entries.values().map(held).collect()
    }
}

/// What is in flight under one name; from [`Drained::stuck`](super::Drained::stuck) and
/// [`Drain::held`](super::Drain::held).
///
/// ```
/// # use std::time::Duration;
/// # use resile::Drain;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let drain = Drain::new();
/// let first = drain.track("sse")?;
/// tokio::time::advance(Duration::from_secs(3)).await;
/// let second = drain.track("sse")?;
/// let held = &drain.held()[0];
/// assert_eq!((held.name(), held.count(), held.longest()), ("sse", 2, Duration::from_secs(3)));
/// assert_eq!(held.to_string(), "sse ×2 for 3s");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    name: Name,
    count: u64,
    longest: Duration,
}

impl Held {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// How many have this name.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How long the first of them has been in.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// One line for each name, where the first of its lines stood.
    pub(crate) fn group(lines: Vec<Self>) -> Vec<Self> {
        let mut places: HashMap<Name, usize> = HashMap::new();
        let mut grouped: Vec<Self> = Vec::new();
        for line in lines {
            match places.entry(line.name.clone()) {
                Entry::Occupied(place) => grouped[*place.get()].count += line.count,
                Entry::Vacant(place) => {
                    place.insert(grouped.len());
                    grouped.push(line);
                }
            }
        }
        grouped
    }
}

/// What is drawn: nobody reads nanoseconds.
pub(crate) const fn whole_millis(time: Duration) -> Duration {
    time.saturating_sub(Duration::from_nanos(time.subsec_nanos() as u64 % 1_000_000))
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ×{} for {:?}", self.name(), self.count, whole_millis(self.longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Name = Name::Static("a");
    const B: Name = Name::Static("b");

    #[test]
    fn names_are_grouped_in_the_order_of_the_first() {
        let mut names = Names::new(10);
        for (name, since) in [(B, 1), (A, 2), (B, 3)] {
            names.note(name, Moment::at(since));
        }
        let held = Held::group(names.all(Moment::at(10)));
        let lines: Vec<_> = held.iter().map(|held| (held.name(), held.count(), held.longest().as_nanos())).collect();
        assert_eq!(lines, [("b", 2, 9), ("a", 1, 8)]);
    }

    #[test]
    fn times_are_drawn_to_the_millisecond() {
        let held = Held { name: A, count: 2, longest: Duration::from_nanos(3_014_188_744) };
        assert_eq!(held.to_string(), "a ×2 for 3.014s");
    }

    #[test]
    fn a_full_register_notes_nobody_and_forgets_nobody() {
        let mut names = Names::new(1);
        let first = names.note(A, Moment::at(0));
        assert_eq!(names.note(B, Moment::at(0)), UNNAMED);
        names.forget(UNNAMED);
        assert_eq!(names.all(Moment::at(0)).len(), 1);
        names.forget(first);
        assert_ne!(names.note(B, Moment::at(0)), UNNAMED);
    }
}
