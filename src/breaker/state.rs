//! The breaker's states as a machine: time in, decisions out, no clock, no lock.
//!
//! 1. Every change of state begins a new generation. A pass carries the generation that gave it, and a report from
//!    another one changes nothing.
//! 2. In half-open, probes on their way and verdicts together are never more than `probes`.
//! 3. What the clock alone changes (open to half-open, a half-open that lasts too long, a probe whose lease is over) is
//!    dated to when it fell due, however late it is noticed.
//! 4. No moment lies further ahead than the longest time that could have been set for it: a runtime whose clock is behind
//!    dates it back, so that it does not wait for a time that only the other runtime will see.

use smallvec::SmallVec;

use super::State;
use super::tally::Sample;
use crate::error::Reason;
use crate::internal::rng::{mix, up_to};
use crate::internal::time::Moment;

/// The least advice while probes are on their way: a quick answer of a peer. Less would invite callers to spin.
const SOONEST: u64 = 10_000_000;

/// Checked settings, times in nanoseconds.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) probes: u32,
    /// So many failed probes open the circuit again.
    pub(super) fatal_probes: u32,
    /// So many slow probes do, too; more than there are if slow calls don't count.
    pub(super) fatal_slow: u32,
    pub(super) open_for: u64,
    pub(super) growth: f64,
    pub(super) max_open: u64,
    /// Up to this share of the open period is taken off at random.
    pub(super) jitter: f64,
    pub(super) half_open_for: u64,
    pub(super) lease: u64,
    pub(super) seed: u64,
}

#[derive(Clone, Debug, PartialEq)]
enum Phase {
    Closed,
    Open { until: Moment },
    HalfOpen(HalfOpen),
    ForcedOpen,
    ForcedClosed,
}

#[derive(Clone, Debug, PartialEq)]
struct HalfOpen {
    /// The end of its life, counted from the first probe: without calls it just waits.
    expires: Moment,
    probes: SmallVec<[Probe; 4]>,
    good: u32,
    bad: u32,
    /// Those of both that were slow.
    slow: u32,
    /// A probe was not answered in its time.
    lost: bool,
}

impl HalfOpen {
    fn new() -> Self {
        Self { expires: Moment::NEVER, probes: SmallVec::new(), good: 0, bad: 0, slow: 0, lost: false }
    }

    /// When to ask again, at the latest when the clock alone frees a place.
    fn advice(&self, now: Moment, settings: &Settings) -> Moment {
        let ends = self.probes.iter().map(|probe| probe.lease);
        let out = ends.clone().max().map_or(0, |youngest| settings.lease.saturating_sub(youngest.nanos_since(now)));
        let asked = now.plus_nanos((out / 4).max(SOONEST)).min(ends.min().unwrap_or(Moment::NEVER));
        if self.is_doubtful() { asked.min(self.expires) } else { asked }
    }

    /// Whether it opens again when its life is over, instead of going on.
    fn is_doubtful(&self) -> bool {
        self.bad > 0 || self.lost
    }

    /// Gives up the probes whose leases are over.
    fn prune(&mut self, now: Moment) {
        let before = self.probes.len();
        self.probes.retain(|probe| now < probe.lease);
        self.lost |= self.probes.len() < before;
    }

    /// At the end of its life: whether it goes on, since every answer was good and none is missing. A probe that has been
    /// out for a whole life is missing, whatever its lease.
    fn goes_on(&mut self, settings: &Settings) -> bool {
        let expired = self.expires;
        self.prune(expired);
        let out_since = |probe: &Probe| Moment::from_nanos(probe.lease.nanos().saturating_sub(settings.lease));
        self.lost |= self.probes.iter().any(|probe| out_since(probe).plus_nanos(settings.half_open_for) <= expired);
        if self.is_doubtful() {
            return false;
        }
        self.expires = if self.probes.is_empty() { Moment::NEVER } else { expired.plus_nanos(settings.half_open_for) };
        true
    }

    /// Dates back what lies further ahead than it could have been set.
    fn heal(&mut self, now: Moment, settings: &Settings) {
        let (longest, lease) = (now.plus_nanos(settings.half_open_for), now.plus_nanos(settings.lease));
        if self.expires != Moment::NEVER {
            self.expires = self.expires.min(longest);
        }
        for probe in &mut self.probes {
            probe.lease = probe.lease.min(lease);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Probe {
    id: u64,
    lease: Moment,
}

/// What a pass of the breaker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Admission {
    pub(super) generation: u64,
    /// The probe's number; 0 for a call that is none.
    pub(super) probe: u64,
}

/// A pass whose report will be ignored.
pub(super) const UNCOUNTED: Admission = Admission { generation: u64::MAX, probe: 0 };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct No {
    pub(super) reason: Reason,
    /// When it makes sense to come back; `NEVER` if nobody knows.
    pub(super) at: Moment,
}

#[derive(Debug)]
pub(super) struct Machine {
    settings: Settings,
    phase: Phase,
    generation: u64,
    /// How often in a row the circuit has opened without closing in between.
    streak: u16,
    next_probe: u64,
    changes: SmallVec<[(State, State); 2]>,
}

impl Machine {
    pub(super) fn new(settings: Settings) -> Self {
        Self { settings, phase: Phase::Closed, generation: 0, streak: 0, next_probe: 1, changes: SmallVec::new() }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The state as last noted. [`Machine::tick`] brings it up to date.
    pub(super) fn state(&self) -> State {
        match self.phase {
            Phase::Closed => State::Closed,
            Phase::Open { .. } => State::Open,
            Phase::HalfOpen(_) => State::HalfOpen,
            Phase::ForcedOpen => State::ForcedOpen,
            Phase::ForcedClosed => State::ForcedClosed,
        }
    }

    pub(super) fn open_for(&self) -> u64 {
        self.settings.open_for
    }

    /// The next moment at which the clock alone changes the state.
    pub(super) fn due(&self) -> Moment {
        match &self.phase {
            Phase::Open { until } => *until,
            Phase::HalfOpen(half) => half.expires,
            _ => Moment::NEVER,
        }
    }

    /// The changes since they were last taken, in order.
    pub(super) fn take_changes(&mut self) -> SmallVec<[(State, State); 2]> {
        std::mem::take(&mut self.changes)
    }

    /// Makes the changes that fell due by now.
    pub(super) fn tick(&mut self, now: Moment) {
        if let Phase::HalfOpen(half) = &mut self.phase {
            half.heal(now, &self.settings);
            while now >= half.expires {
                let expired = half.expires;
                if !half.goes_on(&self.settings) {
                    self.open(expired);
                    break;
                }
            }
        }
        let longest = now.plus_nanos(self.settings.max_open);
        match &mut self.phase {
            Phase::HalfOpen(half) => half.prune(now),
            Phase::Open { until } if now >= *until => self.turn(Phase::HalfOpen(HalfOpen::new())),
            Phase::Open { until } => *until = longest.min(*until),
            _ => {}
        }
    }

    /// Whether changes have been made that nobody was told of.
    pub(super) fn has_changes(&self) -> bool {
        !self.changes.is_empty()
    }

    pub(super) fn admit(&mut self, now: Moment) -> Result<Admission, No> {
        self.tick(now);
        if let Some(no) = self.look(now) {
            return Err(no);
        }
        let generation = self.generation;
        match &mut self.phase {
            Phase::ForcedClosed => Ok(UNCOUNTED),
            Phase::HalfOpen(half) => {
                if half.expires == Moment::NEVER {
                    half.expires = now.plus_nanos(self.settings.half_open_for);
                }
                let probe = self.next_probe;
                self.next_probe += 1;
                half.probes.push(Probe { id: probe, lease: now.plus_nanos(self.settings.lease) });
                Ok(Admission { generation, probe })
            }
            _ => Ok(Admission { generation, probe: 0 }),
        }
    }

    /// Why a call would not be let in, as of the last tick.
    pub(super) fn look(&self, now: Moment) -> Option<No> {
        let willing = match &self.phase {
            Phase::Closed | Phase::ForcedClosed => true,
            Phase::ForcedOpen | Phase::Open { .. } => false,
            Phase::HalfOpen(half) => half.good + half.bad + (half.probes.len() as u32) < self.settings.probes,
        };
        (!willing).then(|| self.no(now))
    }

    /// What a call is told that is not let in.
    ///
    /// While probes are on their way nobody knows when they will be answered. What is told is a quarter of the time that
    /// the youngest of them has been out: whoever heeds it comes a quarter too late at worst and asks a few times only,
    /// and the longer the peer is silent the longer its callers are sent away.
    pub(super) fn no(&self, now: Moment) -> No {
        let (reason, at) = match &self.phase {
            Phase::Open { until } => (Reason::CircuitOpen, *until),
            Phase::ForcedOpen => (Reason::ForcedOpen, Moment::NEVER),
            Phase::HalfOpen(half) => (Reason::Probing, half.advice(now, &self.settings)),
            Phase::Closed | Phase::ForcedClosed => (Reason::Probing, now),
        };
        No { reason, at }
    }

    /// A probe comes back: with what it says about the peer, or with nothing.
    ///
    /// A slow answer counts for the slow rate, whether it is good or not, and a failure for the failure rate. The circuit
    /// closes as soon as the probes that are still to come could reach neither. A probe that was never sent is no lost
    /// answer, however late it comes back.
    pub(super) fn report(&mut self, admission: Admission, sample: Option<Sample>, now: Moment) {
        if sample.is_some() {
            self.tick(now);
        }
        if let (true, Phase::HalfOpen(half)) = (admission.generation == self.generation, &mut self.phase) {
            if let Some(place) = half.probes.iter().position(|probe| probe.id == admission.probe) {
                half.probes.swap_remove(place);
                if let Some(sample) = sample {
                    self.learn(sample, now);
                }
            }
        }
    }

    /// One more probe was answered.
    fn learn(&mut self, sample: Sample, now: Moment) {
        let Phase::HalfOpen(half) = &mut self.phase else { return };
        half.good += u32::from(sample.good);
        half.bad += u32::from(!sample.good);
        half.slow += u32::from(sample.slow);
        let (fatal, fatal_slow) = (self.settings.fatal_probes, self.settings.fatal_slow);
        let left = self.settings.probes - half.good - half.bad;
        if half.bad >= fatal || half.slow >= fatal_slow {
            self.open(now);
        } else if half.bad + left < fatal && half.slow + left < fatal_slow {
            self.streak = 0;
            self.turn(Phase::Closed);
        }
    }

    /// The closed state's counts have crossed a threshold. Of several callers who see it, one is right.
    pub(super) fn trip(&mut self, generation: u64, now: Moment) {
        if generation == self.generation && self.phase == Phase::Closed {
            self.open(now);
        }
    }

    pub(super) fn force(&mut self, open: bool) {
        self.turn(if open { Phase::ForcedOpen } else { Phase::ForcedClosed });
    }

    pub(super) fn reset(&mut self) {
        self.streak = 0;
        self.turn(Phase::Closed);
    }

    fn open(&mut self, at: Moment) {
        let Settings { open_for, growth, max_open, jitter, seed, .. } = self.settings;
        let grown = (open_for as f64 * growth.powi(self.streak.into())).min(max_open as f64) as u64;
        let spread = (grown as f64 * jitter) as u64;
        let period = grown - up_to(mix(seed ^ self.generation), spread);
        self.streak = self.streak.saturating_add(1).min(1000);
        self.turn(Phase::Open { until: at.plus_nanos(period) });
    }

    fn turn(&mut self, phase: Phase) {
        let from = self.state();
        self.phase = phase;
        self.generation += 1;
        let to = self.state();
        if from != to {
            self.changes.push((from, to));
        }
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: u64 = 1_000_000_000;
    const GOOD: Option<Sample> = Some(Sample { good: true, slow: false });
    const BAD: Option<Sample> = Some(Sample { good: false, slow: false });
    const SLOW: Option<Sample> = Some(Sample { good: true, slow: true });

    fn settings() -> Settings {
        Settings {
            probes: 2,
            fatal_probes: 1,
            fatal_slow: u32::MAX,
            open_for: 5 * S,
            growth: 2.0,
            max_open: 60 * S,
            jitter: 0.0,
            half_open_for: 30 * S,
            lease: 10 * S,
            seed: 0,
        }
    }

    fn half_open(settings: Settings) -> (Machine, u64) {
        let mut machine = Machine::new(settings);
        machine.trip(0, Moment::at(0));
        machine.tick(Moment::at(5 * S));
        assert_eq!(machine.state(), State::HalfOpen);
        (machine, 5 * S)
    }

    #[test]
    fn half_open_admits_no_more_than_its_probes() {
        let (mut machine, now) = half_open(settings());
        assert!(machine.admit(Moment::at(now)).is_ok());
        assert!(machine.admit(Moment::at(now)).is_ok());
        let no = machine.admit(Moment::at(now + 1)).unwrap_err();
        assert_eq!((no.reason, no.at), (Reason::Probing, Moment::at(now + 1 + SOONEST)));
    }

    #[test]
    fn the_advice_while_probing_grows_with_the_wait_and_ends_with_the_first_lease() {
        let (mut machine, now) = half_open(settings());
        let _ = machine.admit(Moment::at(now));
        let _ = machine.admit(Moment::at(now + S));
        let mut advice =
            |after: u64| machine.admit(Moment::at(now + after)).unwrap_err().at.nanos_since(Moment::at(now));
        assert_eq!(advice(2 * S), 2 * S + S / 4, "the younger probe has been out for one second");
        assert_eq!(advice(5 * S), 6 * S);
        assert_eq!(advice(9 * S), 10 * S, "then the first lease ends");
        assert_eq!(advice(10 * S - 1), 10 * S);
    }

    #[test]
    fn a_probe_without_verdict_gives_its_place_back_and_never_wedges() {
        let (mut machine, now) = half_open(settings());
        for _ in 0..10 {
            let probe = machine.admit(Moment::at(now)).unwrap();
            machine.report(probe, None, Moment::at(now));
        }
        assert_eq!(machine.state(), State::HalfOpen);
        assert!(machine.admit(Moment::at(now)).is_ok());
    }

    /// It waited in a queue further in until its caller gave up: the peer never heard of it.
    #[test]
    fn a_probe_that_was_never_sent_is_no_lost_answer_however_late_it_comes_back() {
        let (mut machine, now) = half_open(settings());
        let queued = machine.admit(Moment::at(now)).unwrap();
        machine.report(queued, None, Moment::at(now + 31 * S));
        assert_eq!(machine.state(), State::HalfOpen);
    }

    /// C3: the place of a probe that hangs comes back by its lease, and its late verdict moves nothing.
    #[test]
    fn a_probe_that_hangs_loses_its_lease_and_its_vote() {
        let (mut machine, now) = half_open(settings());
        let hung = machine.admit(Moment::at(now)).unwrap();
        let late = now + 10 * S;
        let (one, two) = (machine.admit(Moment::at(late)).unwrap(), machine.admit(Moment::at(late)).unwrap());
        machine.report(hung, BAD, Moment::at(late));
        assert_eq!(machine.state(), State::HalfOpen);
        machine.report(one, GOOD, Moment::at(late));
        machine.report(two, GOOD, Moment::at(late));
        assert_eq!(machine.state(), State::Closed);
    }

    #[test]
    fn a_half_open_state_that_lasts_too_long_opens_again_as_of_when_it_was_due() {
        let (mut machine, now) = half_open(settings());
        let _ = machine.admit(Moment::at(now));
        machine.tick(Moment::at(now + 31 * S));
        assert_eq!(machine.state(), State::Open);
        assert_eq!(machine.due(), Moment::at(now + 30 * S + 10 * S), "the second open period is twice the first");
        machine.tick(Moment::at(now + 41 * S));
        assert_eq!(machine.state(), State::HalfOpen);
    }

    #[test]
    fn good_answers_alone_do_not_make_a_half_open_state_fail() {
        let (mut machine, mut now) = half_open(Settings { probes: 3, ..settings() });
        for _ in 0..2 {
            let probe = machine.admit(Moment::at(now)).unwrap();
            machine.report(probe, GOOD, Moment::at(now));
            now += 1000 * S;
            machine.tick(Moment::at(now));
            assert_eq!(machine.state(), State::HalfOpen);
        }
        let probe = machine.admit(Moment::at(now)).unwrap();
        machine.report(probe, GOOD, Moment::at(now));
        assert_eq!(machine.state(), State::Closed);
    }

    #[test]
    fn a_failure_or_a_missing_answer_lets_the_half_open_state_fail_when_its_life_is_over() {
        for (verdict, lease) in [(BAD, 10 * S), (None, 10 * S), (None, 40 * S)] {
            let (mut machine, now) = half_open(Settings { probes: 3, fatal_probes: 2, lease, ..settings() });
            let probe = machine.admit(Moment::at(now)).unwrap();
            if verdict.is_some() {
                machine.report(probe, verdict, Moment::at(now));
            }
            machine.tick(Moment::at(now + 30 * S));
            assert_eq!(machine.state(), State::Open, "{verdict:?} {lease}");
        }
    }

    /// The probe came too late to be asked, so its lease is over before the life is.
    #[test]
    fn an_answer_that_is_missing_when_the_life_ends_is_missed_then_and_not_a_life_later() {
        let (mut machine, now) = half_open(Settings { probes: 3, ..settings() });
        let first = machine.admit(Moment::at(now)).unwrap();
        machine.report(first, GOOD, Moment::at(now));
        let _missing = machine.admit(Moment::at(now + 15 * S)).unwrap();
        machine.tick(Moment::at(now + 35 * S));
        assert_eq!((machine.state(), machine.due()), (State::Open, Moment::at(now + 40 * S)));
    }

    /// A life begins with a probe; one without probes at its end leaves no other behind.
    #[test]
    fn after_a_life_of_good_answers_the_next_begins_with_the_next_probe() {
        let (mut machine, now) = half_open(Settings { probes: 3, ..settings() });
        let first = machine.admit(Moment::at(now)).unwrap();
        machine.report(first, GOOD, Moment::at(now));
        machine.tick(Moment::at(now + 31 * S));
        assert_eq!(machine.due(), Moment::NEVER);
        let second = machine.admit(Moment::at(now + 50 * S)).unwrap();
        machine.report(second, GOOD, Moment::at(now + 50 * S));
        assert_eq!(machine.due(), Moment::at(now + 80 * S));

        let (mut machine, now) = half_open(Settings { probes: 3, lease: 60 * S, ..settings() });
        let first = machine.admit(Moment::at(now)).unwrap();
        machine.report(first, GOOD, Moment::at(now));
        let _out = machine.admit(Moment::at(now + 20 * S)).unwrap();
        machine.tick(Moment::at(now + 31 * S));
        assert_eq!((machine.state(), machine.due()), (State::HalfOpen, Moment::at(now + 60 * S)), "one is still out");
    }

    #[test]
    fn an_answer_after_the_lease_is_over_counts_for_nothing() {
        let (mut machine, now) = half_open(Settings { probes: 1, ..settings() });
        let late = machine.admit(Moment::at(now)).unwrap();
        machine.report(late, GOOD, Moment::at(now + 10 * S));
        assert_eq!(machine.state(), State::HalfOpen);
    }

    #[test]
    fn it_does_not_close_while_the_probes_to_come_could_be_too_slow() {
        let settings = Settings { probes: 4, fatal_probes: 4, fatal_slow: 2, ..settings() };
        let (mut machine, now) = half_open(settings);
        let at = Moment::at(now);
        for answered in 1..=3 {
            let probe = machine.admit(at).unwrap();
            machine.report(probe, GOOD, at);
            assert_eq!(machine.state() == State::Closed, answered == 3, "{answered} of 4");
        }
    }

    #[test]
    fn slow_probes_count_for_the_slow_rate_alone() {
        // One of two may be slow, none may fail; and the other way round.
        let (mut machine, now) = half_open(Settings { fatal_probes: 1, fatal_slow: 2, ..settings() });
        let at = Moment::at(now);
        let (one, two) = (machine.admit(at).unwrap(), machine.admit(at).unwrap());
        machine.report(one, SLOW, at);
        assert_eq!(machine.state(), State::HalfOpen);
        machine.report(two, GOOD, at);
        assert_eq!(machine.state(), State::Closed);
        let (mut machine, _) = half_open(Settings { fatal_probes: 2, fatal_slow: 1, ..settings() });
        let one = machine.admit(at).unwrap();
        machine.report(one, SLOW, at);
        assert_eq!(machine.state(), State::Open);
    }

    /// Of a runtime whose clock is an hour ahead.
    #[test]
    fn a_clock_that_is_behind_waits_no_longer_than_the_longest_period() {
        const HOUR: u64 = 3600 * S;
        let mut machine = Machine::new(settings());
        machine.trip(0, Moment::at(HOUR));
        machine.tick(Moment::at(0));
        assert_eq!(machine.due(), Moment::at(60 * S));
        let (mut machine, _) = half_open(settings());
        let _ = machine.admit(Moment::at(HOUR));
        machine.tick(Moment::at(10 * S));
        assert_eq!(machine.due(), Moment::at(40 * S));
        machine.tick(Moment::at(20 * S));
        assert!(
            machine.admit(Moment::at(20 * S)).is_ok() && machine.admit(Moment::at(20 * S)).is_ok(),
            "its lease was over"
        );
    }

    #[test]
    fn open_periods_grow_up_to_their_cap_and_start_small_after_closing() {
        let mut machine = Machine::new(settings());
        let mut now = 0;
        machine.trip(0, Moment::at(now));
        let mut periods = Vec::new();
        for _ in 0..6 {
            let until = machine.due();
            periods.push(until.since(Moment::at(now)).as_secs());
            now += periods.last().unwrap() * S;
            let probe = machine.admit(Moment::at(now)).unwrap();
            machine.report(probe, BAD, Moment::at(now));
        }
        assert_eq!(periods, [5, 10, 20, 40, 60, 60]);
        machine.reset();
        machine.trip(machine.generation(), Moment::at(now));
        assert_eq!(machine.due().since(Moment::at(now)).as_secs(), 5);
    }

    #[test]
    fn jitter_only_shortens() {
        for seed in 0..100 {
            let mut machine = Machine::new(Settings { jitter: 0.5, seed, ..settings() });
            machine.trip(0, Moment::at(0));
            let period = machine.due().nanos_since(Moment::at(0));
            assert!((5 * S / 2..=5 * S).contains(&period));
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Wait(u64),
        Admit,
        Report(usize, Option<(bool, bool)>),
        Trip,
        Force(bool),
        Reset,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (0_u64..8 * S).prop_map(Op::Wait),
            6 => Just(Op::Admit),
            6 => (0_usize..16, proptest::option::of(any::<(bool, bool)>())).prop_map(|(which, verdict)| Op::Report(which, verdict)),
            2 => Just(Op::Trip),
            1 => any::<bool>().prop_map(Op::Force),
            1 => Just(Op::Reset),
        ]
    }

    proptest! {
        /// Laws: only legal changes of state; generations only grow; in half-open never more on their way and judged
        /// than probes; a refusal changes nothing that the clock has not.
        #[test]
        fn whatever_happens_the_machine_keeps_its_laws(ops in proptest::collection::vec(op(), 0..200), probes in 1_u32..5, slow_counts: bool) {
            let fatal = probes.div_ceil(2);
            let mut machine =
                Machine::new(Settings { probes, fatal_probes: fatal, fatal_slow: if slow_counts { fatal } else { u32::MAX }, ..settings() });
            let mut now = Moment::at(0);
            let mut out: Vec<Admission> = Vec::new();
            for op in ops {
                let (generation, forced) = (machine.generation(), matches!(op, Op::Force(_) | Op::Reset));
                match op {
                    Op::Wait(time) => now = now.plus_nanos(time),
                    Op::Admit => {
                        machine.tick(now);
                        let before = (machine.phase.clone(), machine.generation);
                        match machine.admit(now) {
                            Ok(admission) => out.push(admission),
                            Err(no) => {
                                prop_assert_eq!(before, (machine.phase.clone(), machine.generation));
                                prop_assert!(no.at > now, "an advice to come back at once makes callers spin");
                            }
                        }
                    }
                    Op::Report(which, verdict) if !out.is_empty() => {
                        let admission = out.swap_remove(which % out.len());
                        machine.tick(now);
                        let before = (machine.phase.clone(), machine.generation);
                        let sample = verdict.map(|(good, slow)| Sample { good, slow });
                        machine.report(admission, sample, now);
                        if admission.generation != before.1 {
                            prop_assert_eq!(before, (machine.phase.clone(), machine.generation));
                        }
                    }
                    Op::Report(..) => {}
                    Op::Trip => machine.trip(machine.generation(), now),
                    Op::Force(open) => machine.force(open),
                    Op::Reset => machine.reset(),
                }
                prop_assert!(machine.generation() >= generation);
                if let Phase::HalfOpen(half) = &machine.phase {
                    prop_assert!(half.good + half.bad + half.probes.len() as u32 <= probes);
                    prop_assert!(half.good + half.bad < probes, "with all answers in, it has decided");
                }
                for (from, to) in machine.take_changes() {
                    use State::{Closed, HalfOpen, Open};
                    let legal = matches!((from, to), (Closed, Open) | (Open, HalfOpen) | (HalfOpen, Open | Closed));
                    prop_assert!(legal || forced, "{from:?} to {to:?}");
                }
            }
        }
    }
}
