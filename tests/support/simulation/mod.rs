//! A whole stack under a schedule that a seed decides, and a naive model that is asked after each event.
//!
//! [`plan`] turns a seed into a policy, callers and a list of events; [`world`] builds and runs them on a paused clock,
//! polling by hand; [`model`] knows what is true: who is inside, who may no longer begin, which reason was the first.
//! A list of events that ends wrong is shrunk by leaving out what does not matter.

pub mod model;
pub mod plan;
pub mod world;

use std::collections::BTreeMap;

use plan::Event;

/// How often each rare branch was taken.
pub type Reached = BTreeMap<&'static str, u64>;

/// Runs one seed.
pub fn run(seed: u64, reached: &mut Reached) -> Result<(), String> {
    let (world, events) = plan::of_seed(seed);
    world::run(&world, &events, reached)
}

/// What is wrong with a seed, with the fewest events that show it.
pub fn explain(seed: u64) -> String {
    let (world, mut events) = plan::of_seed(seed);
    let wrong = |events: &[Event]| world::run(&world, events, &mut Reached::new()).err();
    let Some(mut fault) = wrong(&events) else { return format!("seed {seed}: it went well the second time") };
    let mut size = events.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        while at < events.len() {
            let mut fewer = events.clone();
            fewer.drain(at..(at + size).min(events.len()));
            // The same kind of fault, or it could wander off to another.
            match wrong(&fewer).filter(|other| kind(other) == kind(&fault)) {
                Some(other) => (fault, events) = (other, fewer),
                None => at += size,
            }
        }
        size /= 2;
    }
    let list: Vec<String> = events.iter().map(|event| format!("  {event:?}")).collect();
    format!("seed {seed}: {fault}\n{world:#?}\n{}", list.join("\n"))
}

/// What a fault is called, before the details.
pub fn kind(fault: &str) -> &str {
    fault.split(':').next().unwrap_or(fault)
}
