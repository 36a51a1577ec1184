//! What all limiters have in common: the queue of those who wait, around a [`Meter`] that decides.
//!
//! 1. The meter decides under the queue's lock, except at once and if nobody waits.
//! 2. A waiter is granted what it waits for as of the moment when that falls due, whether or not it is polled then:
//!    whoever comes to the lock serves all that are due. So a waiter that does not come holds up nobody, and what the
//!    others were told stays true.
//! 3. A grant that is not fetched goes back like any other taking that came to nothing. Where calls go out one at a time,
//!    one that is fetched late goes when an interval has passed since the one that really went before it.
//! 4. Each waiter has a timer for the moment that it was told. Whatever may make that moment earlier wakes the head, and
//!    from then on each that becomes the head.

use std::collections::BTreeMap;
use std::task::{Context, Waker};
use std::time::Duration;

use super::front::Snapshot;
use super::pace::Take;
use crate::call::Call;
use crate::error::{Name, Reason, Refusal};
use crate::gate::{Entry, Outcome, Pass, Ticket, Underway};
use crate::internal::queue::{Key, Queue, Status, WakeList};
use crate::internal::sync::{AtomicU64, Mutex, Relaxed};
use crate::internal::time::{Moment, nanos};

/// A machine that says when so many may go. Costs are at least 1 and at most the largest, and but for the first two
/// everything is asked with the lock held.
pub(super) trait Meter: Send + Sync + 'static {
    /// What it keeps under the lock.
    type Locked: Send + 'static;

    /// Takes without the lock if nobody waits, or says that the lock decides. Any cost may be asked for.
    #[inline]
    fn take_at_once(&self, now: Moment, cost: u32) -> Option<u64> {
        let _ = (now, cost);
        None
    }

    /// Takes what this thread has taken ahead, for which no clock is needed: a note for the pass.
    #[inline]
    fn take_ahead(&self, cost: u32) -> Option<u64> {
        let _ = cost;
        None
    }

    /// The same, for a meter that lets threads take ahead, where [`take_at_once`](Self::take_at_once) never takes.
    fn take_batch(&self, now: Moment, cost: u32) -> Option<u64> {
        let _ = (now, cost);
        None
    }

    /// Whether it would take without the lock. Changes nothing.
    fn fits_at_once(&self, now: Moment, cost: u32) -> bool {
        let _ = (now, cost);
        false
    }

    /// Whether from now on somebody waits, for a meter that takes without the lock.
    fn set_waiting(&self, waiting: bool) {
        let _ = waiting;
    }

    /// The most that one call can cost.
    fn largest(&self, locked: &Self::Locked) -> u32;

    /// Whether it gives all that a window has at once, and not as time goes.
    const IN_STEPS: bool = false;

    /// Whether calls go out one at a time: then a grant that is fetched late must keep its distance to who went before.
    const PACED: bool = false;

    /// Dates back what another runtime's clock has left far ahead.
    fn heal(&self, locked: &mut Self::Locked, now: Moment);

    /// Takes so many if they are there, with a note for the pass; or says when they would be.
    fn take(&self, locked: &mut Self::Locked, now: Moment, cost: u32) -> Take;

    /// Grants so many to a waiter whose turn it is, with a note; or says when it will be.
    fn grant(&self, locked: &mut Self::Locked, now: Moment, cost: u32) -> Take {
        self.take(locked, now, cost)
    }

    /// A waiter comes for what it was granted: a note for the pass. Where calls go out one at a time, it may have to keep
    /// its distance: then, when it may go at the earliest, and when if others go before it that cost so much.
    fn fetch(
        &self,
        locked: &mut Self::Locked,
        granted: u64,
        now: Moment,
        cost: u32,
        before: u64,
    ) -> Result<u64, [Moment; 2]> {
        let _ = (locked, now, cost, before);
        Ok(granted)
    }

    /// A waiter does not come for what it was granted; with the time, if it was not late.
    fn give_up(&self, locked: &mut Self::Locked, granted: u64, cost: u32, on_time: Option<Moment>) {
        let _ = on_time;
        self.undo(locked, granted, cost);
    }

    /// Grants that follow are due after all that has gone and so many that come late, if any grant is not fetched.
    fn schedule(&self, locked: &mut Self::Locked, now: Moment, granted: bool, late: u64) {
        let _ = (locked, now, granted, late);
    }

    /// Takes so many if they are there besides what was granted and not fetched.
    fn take_behind(&self, locked: &mut Self::Locked, now: Moment, cost: u32) -> Take {
        self.take(locked, now, cost)
    }

    /// When so many would be there behind all who wait.
    fn due(&self, locked: &mut Self::Locked, queue: &Queue, now: Moment, cost: u32) -> Moment;

    /// One more waits, whose turn comes then.
    fn queued(&self, locked: &mut Self::Locked, due: Moment, cost: u32) {
        let _ = (locked, due, cost);
    }

    /// The queue or what is there has changed in another way than by arrivals and by serving waiters when they are due.
    fn disturbed(&self, locked: &mut Self::Locked) {
        let _ = locked;
    }

    /// Undoes a taking as if it had never been, as far as that can no longer let more through than allowed.
    fn undo(&self, locked: &mut Self::Locked, taken: u64, cost: u32);

    /// Puts back what was taken and not used, with the pass's note if it is known.
    fn put_back(&self, locked: &mut Self::Locked, now: Moment, taken: Option<u64>, tokens: u32);

    /// Takes so many whether they are there or not: how many that were.
    fn charge(&self, locked: &mut Self::Locked, now: Moment, tokens: u32) -> u32;

    fn facts(&self, locked: &mut Self::Locked, now: Moment) -> Facts;
}

/// What a limiter can say about itself if nobody waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) limit: u64,
    pub(super) remaining: u64,
    /// In nanoseconds.
    pub(super) window: u64,
    /// When more than remains can have gone.
    pub(super) reset: Moment,
}

/// Settings that all limiters have.
#[derive(Clone, Debug)]
pub(super) struct Waits {
    pub(super) max_queue: u32,
    pub(super) max_wait: Option<Duration>,
    pub(super) name: Name,
}

#[derive(Debug)]
pub(super) struct Shell<M: Meter> {
    pub(super) meter: M,
    waiting: Mutex<Waiting<M::Locked>>,
    max_queue: AtomicU64,
    /// In nanoseconds; the largest number for no limit.
    max_wait: AtomicU64,
    name: Name,
}

#[derive(Debug)]
struct Waiting<L> {
    queue: Queue,
    /// What waiters were granted that have not fetched it.
    granted: BTreeMap<Key, Grant>,
    /// What those of them cost that are late.
    late: u64,
    /// Up to when the queue has been served: nothing that came later is given to an earlier moment.
    served: Moment,
    /// Those who wait may come earlier than they were told: each is woken when it becomes the head.
    sooner: bool,
    locked: L,
}

impl<L> Waiting<L> {
    fn new(locked: L) -> Mutex<Self> {
        Mutex::new(Self {
            queue: Queue::new(),
            granted: BTreeMap::new(),
            late: 0,
            served: Moment::NEVER,
            sooner: false,
            locked,
        })
    }
}

/// How many grants before its own a waiter that comes late looks at.
const MOST_BEFORE: usize = 64;

#[derive(Debug)]
struct Grant {
    /// The meter's note.
    taken: u64,
    cost: u32,
    /// Until when it would have waited.
    until: Moment,
    /// It has come late, and waits for its distance to those that went before.
    late: bool,
    /// Of one that is late.
    waker: Option<Waker>,
}

/// The waker of the first that is late, if it is not far behind others.
fn late_waker(granted: &mut BTreeMap<Key, Grant>) -> Option<Waker> {
    granted.values_mut().take(MOST_BEFORE).find_map(|grant| grant.waker.take())
}

impl<M: Meter> Shell<M> {
    pub(super) fn new(meter: M, locked: M::Locked, waits: Waits) -> Self {
        Self {
            meter,
            waiting: Waiting::new(locked),
            max_queue: AtomicU64::new(waits.max_queue.into()),
            max_wait: AtomicU64::new(waits.max_wait.map_or(u64::MAX, nanos)),
            name: waits.name,
        }
    }

    /// Another with the same settings and nobody in its queue.
    pub(super) fn another(&self, meter: M, locked: M::Locked) -> Self {
        Self {
            meter,
            waiting: Waiting::new(locked),
            max_queue: AtomicU64::new(self.max_queue.load(Relaxed)),
            max_wait: AtomicU64::new(self.max_wait.load(Relaxed)),
            name: self.name.clone(),
        }
    }

    /// Other bounds of the queue, for those who come from now on.
    pub(super) fn set_waits(&self, waits: &Waits) {
        self.max_queue.store(waits.max_queue.into(), Relaxed);
        self.max_wait.store(waits.max_wait.map_or(u64::MAX, nanos), Relaxed);
    }

    /// Whether nobody waits and what the meter keeps is as given.
    pub(super) fn is_idle(&self, fresh: impl FnOnce(&M, &mut M::Locked) -> bool) -> bool {
        let mut waiting = self.waiting.lock();
        waiting.queue.is_empty() && waiting.granted.is_empty() && fresh(&self.meter, &mut waiting.locked)
    }

    /// Whether a call would be let in that does not want to wait.
    pub(super) fn look(&self, call: &Call) -> Result<(), Refusal> {
        let (cost, now) = (call.cost(), call.now());
        if self.meter.fits_at_once(now, cost) {
            return Ok(());
        }
        let mut waiting = self.waiting.lock();
        let Waiting { queue, locked, .. } = &mut *waiting;
        self.meter.heal(locked, now);
        let limit = self.meter.largest(locked);
        let (reason, due) = if cost == 0 {
            (Reason::ZeroCost, now)
        } else if cost > limit {
            (Reason::CostAboveLimit { cost, limit }, now)
        } else {
            let due = self.meter.due(locked, queue, now, cost);
            if due <= now && queue.is_empty() {
                return Ok(());
            }
            (Reason::Busy, due)
        };
        drop(waiting);
        Err(self.refuse(reason, now, due))
    }

    /// When a call could be served at the earliest behind others that cost so much.
    pub(super) fn due_behind(&self, before: u64, call: &Call) -> Moment {
        let now = call.now();
        let Facts { limit, remaining, window, .. } = self.meter.facts(&mut self.waiting.lock().locked, now);
        let more = u128::from(before) + u128::from(call.cost());
        let Some(more) = more.checked_sub(remaining.into()).filter(|more| *more > 0) else { return now };
        let limit = u128::from(limit.max(1));
        // What comes in steps may have the first of them at once.
        let wait =
            if M::IN_STEPS { (more - 1) / limit * u128::from(window) } else { more * u128::from(window) / limit };
        now.plus_nanos(u64::try_from(wait).unwrap_or(u64::MAX))
    }

    pub(super) fn max_queue(&self) -> u32 {
        self.max_queue.load(Relaxed).try_into().unwrap_or(u32::MAX)
    }

    pub(super) fn name(&self) -> &Name {
        &self.name
    }

    pub(super) fn queued(&self) -> u32 {
        self.waiting.lock().queue.len()
    }

    #[inline]
    pub(super) fn try_take_now(&self, cost: u32) -> Result<(), Refusal> {
        if self.meter.take_ahead(cost).is_some() { Ok(()) } else { self.try_take(cost, Moment::now()) }
    }

    #[inline]
    pub(super) fn try_take(&self, cost: u32, now: Moment) -> Result<(), Refusal> {
        if self.meter.take_ahead(cost).is_some() || self.meter.take_at_once(now, cost).is_some() {
            return Ok(());
        }
        self.try_take_slowly(now, cost)
    }

    #[cold]
    pub(super) fn refuse_unread(&self) -> Refusal {
        Refusal::by(self.name.clone(), Reason::Other("that is no reading of a clock"))
    }

    #[cold]
    fn try_take_slowly(&self, now: Moment, cost: u32) -> Result<(), Refusal> {
        if self.meter.take_batch(now, cost).is_some() {
            return Ok(());
        }
        let mut waiting = self.waiting.lock();
        let (wakers, _) = self.serve(&mut waiting, now);
        let taken = self.take_in_turn(&mut waiting, now, cost);
        drop(waiting);
        wakers.wake();
        match taken {
            Ok(Take::Now(_)) => Ok(()),
            Ok(Take::At(due)) => Err(self.refuse(Reason::Busy, now, due)),
            Err(never) => Err(self.refuse(never, now, now)),
        }
    }

    #[inline]
    pub(super) fn enter(&self, call: &Call) -> Entry {
        match self.take_at_once(call.now(), call.cost()) {
            Some(pass) => Entry::Pass(pass),
            None => self.enter_slowly(call),
        }
    }

    #[inline]
    pub(super) fn take_at_once(&self, now: Moment, cost: u32) -> Option<Pass> {
        let taken = self.meter.take_at_once(now, cost).or_else(|| self.meter.take_ahead(cost));
        taken.map(|taken| Pass::new(taken, cost.into()))
    }

    #[cold]
    fn enter_slowly(&self, call: &Call) -> Entry {
        let (cost, now) = (call.cost(), call.now());
        if let Some(taken) = self.meter.take_batch(now, cost) {
            return Entry::Pass(Pass::new(taken, cost.into()));
        }
        let mut waiting = self.waiting.lock();
        let (wakers, _) = self.serve(&mut waiting, now);
        let entry = match self.take_in_turn(&mut waiting, now, cost) {
            Ok(Take::Now(taken)) => Ok(taken),
            Ok(Take::At(due)) => {
                let Some(reason) = self.why_not_wait(call, due, waiting.queue.len()) else {
                    let ticket = self.queue_up(&mut waiting, call, due);
                    drop(waiting);
                    let ticket = Underway::new(ticket, |ticket| self.abandon(&ticket));
                    wakers.wake();
                    return Entry::Wait(ticket.arrive(), Some(due));
                };
                Err((reason, due))
            }
            Err(never) => Err((never, now)),
        };
        drop(waiting);
        match entry {
            Ok(taken) => {
                let pass = Underway::new(Pass::new(taken, cost.into()), |pass| self.undo(&pass));
                wakers.wake();
                Entry::Pass(pass.arrive())
            }
            Err((reason, due)) => {
                wakers.wake();
                let (most, is_deadline) = self.longest_wait(call);
                Entry::Refused(self.refuse(reason, now, due).with_wait(most, is_deadline))
            }
        }
    }

    /// How long a call may wait here, and whether it is the call's deadline that says so.
    fn longest_wait(&self, call: &Call) -> (Duration, bool) {
        let (own, until) = (self.max_wait.load(Relaxed), call.latest_entry());
        let left = if until == Moment::NEVER { u64::MAX } else { until.nanos_since(call.now()) };
        (Duration::from_nanos(own.min(left)), left < own)
    }

    /// Appends a waiter that will be served then.
    fn queue_up(&self, waiting: &mut Waiting<M::Locked>, call: &Call, due: Moment) -> Ticket {
        let Waiting { queue, served, locked, .. } = waiting;
        if queue.is_empty() {
            self.meter.set_waiting(true);
            *served = call.now();
        }
        self.meter.queued(locked, due, call.cost());
        let until = call.now().plus_nanos(self.max_wait.load(Relaxed)).min(call.ends());
        let key = queue.push(call.cost(), until, None);
        Ticket::new(key.to_bits(), due.nanos())
    }

    /// Grants all that is due, each as of the moment when it fell due, and sends away those whose time is over then. The
    /// wakers are to be woken without the lock. Also returns when the head that is left is due.
    fn serve(&self, waiting: &mut Waiting<M::Locked>, now: Moment) -> (WakeList, Option<Moment>) {
        let mut wakers = WakeList::default();
        let Waiting { queue, granted, served, sooner, locked, .. } = waiting;
        self.meter.heal(locked, now);
        let (mut next, mut is_new) = (None, false);
        while let (Some(cost), Some(until)) = (queue.head(), queue.head_until()) {
            // A clock that went back must not be waited for.
            *served = (*served).min(now);
            let fits = cost <= self.meter.largest(locked);
            match if fits { self.meter.grant(locked, *served, cost) } else { Take::At(Moment::NEVER) } {
                Take::Now(taken) => {
                    let (key, waker) = queue.grant_head();
                    granted.insert(key, Grant { taken, cost, until, late: false, waker: None });
                    is_new = true;
                    wakers.push(waker);
                }
                // It would be too late, or for ever. It is told when it asks.
                Take::At(due) if due > until || !fits => {
                    wakers.push(queue.reject_head());
                    self.meter.disturbed(locked);
                    (is_new, *sooner) = (true, true);
                }
                Take::At(due) if due > now => {
                    next = Some(due);
                    break;
                }
                Take::At(due) => *served = due,
            }
        }
        if queue.is_empty() {
            self.meter.set_waiting(M::PACED && !granted.is_empty());
            *sooner = false;
        } else if is_new && *sooner {
            wakers.push(queue.take_head_waker());
        }
        (wakers, next)
    }

    /// Why a call that would be served when it is due, behind so many others, is not to wait for it.
    pub(super) fn why_not_wait(&self, call: &Call, due: Moment, queued: u32) -> Option<Reason> {
        if !call.may_wait() {
            Some(Reason::Busy)
        } else if due > call.now().plus_nanos(self.max_wait.load(Relaxed)).min(call.latest_entry()) {
            Some(Reason::TooLate)
        } else if u64::from(queued) >= self.max_queue.load(Relaxed) {
            Some(Reason::QueueFull)
        } else {
            None
        }
    }

    /// Takes if nobody waits, or says when it would be served, or why never.
    fn take_in_turn(&self, waiting: &mut Waiting<M::Locked>, now: Moment, cost: u32) -> Result<Take, Reason> {
        let Waiting { queue, granted, locked, .. } = waiting;
        let limit = self.meter.largest(locked);
        if cost == 0 {
            Err(Reason::ZeroCost)
        } else if cost > limit {
            Err(Reason::CostAboveLimit { cost, limit })
        } else if queue.is_empty() {
            // What was foreseen for those who waited knows nothing of this one.
            self.meter.disturbed(locked);
            let behind = !granted.is_empty();
            Ok(if behind { self.meter.take_behind(locked, now, cost) } else { self.meter.take(locked, now, cost) })
        } else {
            Ok(Take::At(self.meter.due(locked, queue, now, cost)))
        }
    }

    fn refuse(&self, reason: Reason, now: Moment, due: Moment) -> Refusal {
        let refusal = Refusal::by(self.name.clone(), reason).of_rate();
        if due > now && due < Moment::NEVER { refusal.after(due.since(now)) } else { refusal }
    }

    pub(super) fn poll_wait(&self, ticket: &Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let [bits, told] = ticket.words();
        let (key, told) = (Key::from_bits(bits), Moment::from_nanos(told));
        let waker = cx.waker().clone();
        let (cost, now) = (call.cost(), call.now());
        let mut waiting = self.waiting.lock();
        let (mut wakers, next) = self.serve(&mut waiting, now);
        let mut status = waiting.queue.status(key);
        let mut old = None;
        if status == Status::Served {
            match self.fetch(&mut waiting, key, now, &mut wakers, &mut old) {
                Ok(taken) => {
                    drop(waiting);
                    let pass = Underway::new(Pass::new(taken, cost.into()), |pass| self.undo(&pass));
                    wakers.wake();
                    drop((old, waker));
                    return Entry::Pass(pass.arrive());
                }
                // It comes late, and others do, too.
                Err(Some(due)) => {
                    let grant = waiting.granted.get_mut(&key);
                    old = grant.and_then(|grant| grant.waker.replace(waker));
                    drop(waiting);
                    wakers.wake();
                    drop(old);
                    return Entry::Wait(Ticket::new(bits, due.nanos()), Some(due));
                }
                Err(None) => status = Status::Rejected,
            }
        }
        if status == Status::Rejected {
            let limit = self.meter.largest(&waiting.locked);
            let (_, own) = waiting.queue.remove(key);
            let Waiting { queue, locked, .. } = &mut *waiting;
            let again = if cost > limit { now } else { self.meter.due(locked, queue, now, cost) };
            drop(waiting);
            wakers.wake();
            drop((own, old, waker));
            return Entry::Refused(if cost > limit {
                self.refuse(Reason::CostAboveLimit { cost, limit }, now, now)
            } else {
                self.refuse(Reason::TooLate, now, again)
            });
        }
        // Told anew if its moment has passed: the rate was lowered, or somebody's cost was settled above what it had taken.
        let due = match next {
            Some(head) if status == (Status::Waiting { head: true }) => head,
            Some(head) if told <= now => head,
            _ => told,
        };
        let unused = waiting.queue.leave_waker(key, waker);
        drop(waiting);
        wakers.wake();
        drop(unused);
        Entry::Wait(Ticket::new(bits, due.nanos()), Some(due))
    }

    /// What a waiter was granted: the note for its pass. Where calls go out one at a time, one that comes late may have to
    /// wait for its distance to the one that went before: then, the moment when it may go, or `None` if that is too late
    /// for it. The wakers are to be woken, and an unused one dropped, without the lock.
    fn fetch(
        &self,
        waiting: &mut Waiting<M::Locked>,
        key: Key,
        now: Moment,
        wakers: &mut WakeList,
        unused: &mut Option<Waker>,
    ) -> Result<u64, Option<Moment>> {
        let Waiting { queue, granted, locked, late, sooner, .. } = waiting;
        // No more are looked at: which of them come is not known anyway. Elsewhere nobody comes too late.
        let looks = if M::PACED { MOST_BEFORE } else { 0 };
        let before: u64 = granted.range(..key).take(looks).map(|(_, grant)| u64::from(grant.cost)).sum();
        let Some(grant) = granted.get_mut(&key) else { unreachable!("a grant is fetched once") };
        let (cost, until) = (grant.cost, grant.until);
        let fetched = self.meter.fetch(locked, grant.taken, now, cost, before);
        let waits = match fetched {
            Err([earliest, due]) if earliest <= until => Some(due),
            _ => None,
        };
        // One that will be refused, as it looks, is in nobody's way.
        let is_late = waits.is_some_and(|due| due <= until);
        let was_late = std::mem::replace(&mut grant.late, is_late);
        if was_late {
            *late -= u64::from(cost);
        }
        if is_late {
            *late += u64::from(cost);
        }
        if let Some(due) = waits {
            self.meter.schedule(locked, now, true, *late);
            return Err(Some(due.min(until)));
        }
        if fetched.is_err() {
            // Nobody waits behind it any more.
            self.meter.disturbed(locked);
            self.meter.give_up(locked, grant.taken, cost, (!was_late).then_some(now));
            *sooner = true;
            wakers.push(queue.take_head_waker());
        }
        *unused = grant.waker.take();
        granted.remove(&key);
        self.meter.schedule(locked, now, !granted.is_empty(), *late);
        if *late > 0 {
            wakers.push(late_waker(granted));
        }
        if queue.is_empty() && granted.is_empty() {
            self.meter.set_waiting(false);
        }
        fetched.map_err(|_| None)
    }

    pub(super) fn abandon(&self, ticket: &Ticket) {
        let key = Key::from_bits(ticket.words()[0]);
        let now = Moment::now();
        let mut waiting = self.waiting.lock();
        // What was due before it left is theirs who wait.
        let (before, _) = self.serve(&mut waiting, now);
        let (status, own) = waiting.queue.remove(key);
        let Waiting { queue, granted, locked, served, sooner, late } = &mut *waiting;
        let (mut head, mut first_late, mut unused) = (None, None, None);
        *sooner = true;
        if let (Status::Served, Some(grant)) = (status, granted.remove(&key)) {
            *served = now;
            if grant.late {
                *late -= u64::from(grant.cost);
            }
            self.meter.disturbed(locked);
            self.meter.give_up(locked, grant.taken, grant.cost, (!grant.late).then_some(now));
            self.meter.schedule(locked, now, !granted.is_empty(), *late);
            // The next may come earlier than it was told, if not at once.
            head = queue.take_head_waker();
            (first_late, unused) = (late_waker(granted), grant.waker);
        } else if matches!(status, Status::Waiting { .. }) {
            self.meter.disturbed(locked);
            if status == (Status::Waiting { head: true }) {
                // Those behind it come earlier than they were told.
                *served = now;
                head = queue.take_head_waker();
            }
        }
        let (mut after, _) = self.serve(&mut waiting, now);
        after.push(head);
        after.push(first_late);
        drop(waiting);
        before.wake();
        after.wake();
        drop((own, unused));
    }

    #[inline]
    pub(super) fn leave(&self, pass: &Pass, outcome: &Outcome) {
        if matches!(outcome, Outcome::NotStarted) {
            self.undo(pass);
        }
    }

    #[cold]
    fn undo(&self, pass: &Pass) {
        let [taken, cost] = pass.words();
        self.change(|meter, locked| meter.undo(locked, taken, cost as u32));
    }

    /// Sets what a pass has cost.
    pub(super) fn settle(&self, pass: &mut Pass, actual: u32) {
        let [taken, cost] = pass.words();
        let (cost, now) = (cost as u32, Moment::now());
        let costs = self.change(|meter, locked| {
            if actual > cost {
                // Noted is what could be charged: no more comes back.
                cost + meter.charge(locked, now, actual - cost)
            } else {
                meter.put_back(locked, now, Some(taken), cost - actual);
                actual
            }
        });
        *pass = Pass::new(taken, costs.into());
    }

    pub(super) fn refund(&self, tokens: u32) {
        let now = Moment::now();
        self.change(|meter, locked| meter.put_back(locked, now, None, tokens));
    }

    /// Changes what the meter keeps. What is due is served before by the old and after by the new.
    pub(super) fn change<R>(&self, change: impl FnOnce(&M, &mut M::Locked) -> R) -> R {
        let now = Moment::now();
        let mut waiting = self.waiting.lock();
        let (before, _) = self.serve(&mut waiting, now);
        let result = change(&self.meter, &mut waiting.locked);
        (waiting.served, waiting.sooner) = (now, true);
        let Waiting { granted, locked, late, .. } = &mut *waiting;
        self.meter.disturbed(locked);
        self.meter.schedule(locked, now, !granted.is_empty(), *late);
        let (mut after, _) = self.serve(&mut waiting, now);
        // They may be due earlier than they think.
        after.push(waiting.queue.take_head_waker());
        after.push(late_waker(&mut waiting.granted));
        drop(waiting);
        before.wake();
        after.wake();
        result
    }

    /// Looks at what the meter keeps.
    pub(super) fn read<R>(&self, read: impl FnOnce(&M, &mut M::Locked) -> R) -> R {
        read(&self.meter, &mut self.waiting.lock().locked)
    }

    pub(super) fn facts(&self) -> Facts {
        let now = Moment::now();
        let mut waiting = self.waiting.lock();
        let (wakers, _) = self.serve(&mut waiting, now);
        let facts = self.meter.facts(&mut waiting.locked, now);
        drop(waiting);
        wakers.wake();
        facts
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let now = Moment::now();
        let mut waiting = self.waiting.lock();
        let (wakers, _) = self.serve(&mut waiting, now);
        let Waiting { queue, locked, .. } = &mut *waiting;
        let facts = self.meter.facts(locked, now);
        let waited_for = !queue.is_empty();
        let next = if waited_for { self.meter.due(locked, queue, now, 1) } else { facts.reset };
        drop(waiting);
        wakers.wake();
        let remaining = if waited_for { 0 } else { facts.remaining };
        Snapshot {
            name: self.name.clone(),
            limit: facts.limit,
            remaining,
            window: Duration::from_nanos(facts.window),
            reset: next.since(now),
            retry_after: if remaining > 0 { Some(Duration::ZERO) } else { (next > now).then(|| next.since(now)) },
        }
    }
}

/// What every limiter offers, written once for all of them: the handle, the way in, and the way to look.
macro_rules! limiter {
    ($gate:ident, $builder:ident, $count:ty) => {
        crate::gate::by_reference!($gate);
        crate::guard::guarded!($gate, "token", "tokens");

        impl crate::gate::IntoGate for $builder {
            type Gate = $gate;

            fn into_gate(self) -> Result<$gate, crate::error::ConfigError> {
                self.build()
            }
        }

        impl $builder {
            /// How many may wait, at most 16,777,216. With 0 no caller waits.
            ///
            /// At a token bucket, and the same at every limiter:
            ///
            /// ```
            /// # use resile::{Reason, TokenBucket};
            /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
            /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
            /// let bucket = TokenBucket::per_second(10).burst(1).max_queue(0).build()?;
            /// bucket.acquire().await?.success();
            /// let refusal = bucket.acquire().await.unwrap_err();
            /// assert_eq!(refusal.reason(), Reason::QueueFull);
            /// # Ok(()) }
            /// ```
            pub const fn max_queue(mut self, waiters: u32) -> Self {
                self.waits.max_queue = waiters;
                self
            }

            /// How long one may wait: who would wait longer is refused at once. No limit by default.
            ///
            /// At a token bucket, and the same at every limiter:
            ///
            /// ```
            /// # use std::time::Duration;
            /// # use resile::{Reason, TokenBucket};
            /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
            /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
            /// let bucket = TokenBucket::per_second(10).burst(1).max_wait(Duration::from_millis(50)).build()?;
            /// bucket.acquire().await?.success();
            /// let start = tokio::time::Instant::now();
            /// let refusal = bucket.acquire().await.unwrap_err();
            /// assert_eq!(refusal.reason(), Reason::TooLate);
            /// assert_eq!(refusal.retry_after(), Some(Duration::from_millis(100)));
            /// assert_eq!(start.elapsed(), Duration::ZERO, "it would have waited for 100 ms");
            /// # Ok(()) }
            /// ```
            pub const fn max_wait(mut self, wait: std::time::Duration) -> Self {
                self.waits.max_wait = Some(wait);
                self
            }

            /// The name that refusals carry.
            pub fn named(mut self, name: impl Into<std::borrow::Cow<'static, str>>) -> Self {
                self.waits.name = crate::error::Name::from(name.into());
                self
            }
        }

        impl $gate {
            /// Takes `tokens` tokens if they are there and no caller waits; otherwise changes nothing.
            ///
            /// # Errors
            ///
            /// A refusal that says when they would be there: waiting that long always suffices if nobody else comes.
            /// For more tokens than can ever be there it never will be, and for none there is nothing to take: the
            /// refusal says so.
            ///
            /// At a token bucket, and the same at every limiter:
            ///
            /// ```
            /// # use resile::{Reason, TokenBucket};
            /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
            /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
            /// let bucket = TokenBucket::per_second(10).burst(5).build()?;
            /// bucket.try_take(3)?;
            /// assert_eq!(bucket.try_take(3).unwrap_err().reason(), Reason::Busy);
            /// assert_eq!(bucket.peek(), 2, "all or none");
            /// let refusal = bucket.try_take(6).unwrap_err();
            /// assert_eq!(refusal.reason(), Reason::CostAboveLimit { cost: 6, limit: 5 });
            /// assert_eq!(refusal.retry_after(), None, "waiting does not help");
            /// assert_eq!(bucket.try_take(0).unwrap_err().reason(), Reason::ZeroCost);
            /// # Ok(()) }
            /// ```
            #[inline]
            pub fn try_take(&self, tokens: u32) -> Result<(), crate::error::Refusal> {
                self.0.try_take_now(tokens)
            }

            /// The same by a reading of the clock that the caller already has: a decision then costs little more than
            /// one change of a word in memory where tokens are there, and several limiters go by the same time.
            ///
            /// # Errors
            ///
            /// As [`try_take`](Self::try_take). [`Moment::NEVER`](crate::Moment::NEVER) is no reading, and is refused.
            #[inline]
            pub fn try_take_at(
                &self,
                tokens: u32,
                now: crate::internal::time::Moment,
            ) -> Result<(), crate::error::Refusal> {
                // What never comes can't be a reading, and would leave the limiter spent until then.
                if now == crate::internal::time::Moment::NEVER {
                    return Err(self.0.refuse_unread());
                }
                self.0.try_take(tokens, now)
            }

            /// How many tokens are there now. Changes nothing.
            #[must_use]
            pub fn peek(&self) -> $count {
                self.0.facts().remaining as $count
            }

            /// How many wait.
            #[must_use]
            pub fn queued(&self) -> u32 {
                self.0.queued()
            }

            /// Puts tokens back that were taken and not used. There are never more than after a long idle time.
            pub fn refund(&self, tokens: u32) {
                self.0.refund(tokens);
            }

            /// Limit, what remains of it, and when there is more: all of one moment. Changes nothing.
            #[must_use]
            pub fn snapshot(&self) -> crate::rate::Snapshot {
                self.0.snapshot()
            }
        }

        impl crate::gate::Gate for $gate {
            #[inline]
            fn enter(&self, call: &crate::call::Call) -> crate::gate::Entry {
                self.0.enter(call)
            }

            #[inline]
            fn leave(&self, pass: crate::gate::Pass, outcome: crate::gate::Outcome) {
                self.0.leave(&pass, &outcome);
            }

            fn poll_wait(
                &self,
                ticket: crate::gate::Ticket,
                call: &crate::call::Call,
                cx: &mut std::task::Context<'_>,
            ) -> crate::gate::Entry {
                self.0.poll_wait(&ticket, call, cx)
            }

            fn abandon(&self, ticket: crate::gate::Ticket) {
                self.0.abandon(&ticket);
            }

            fn settle(&self, pass: &mut crate::gate::Pass, _: &crate::call::Call, actual: u32) {
                self.0.settle(pass, actual);
            }

            fn look(&self, call: &crate::call::Call) -> Result<(), crate::error::Refusal> {
                self.0.look(call)
            }

            fn places(&self) -> Option<u32> {
                Some(self.0.max_queue())
            }

            fn due(&self, before: u64, call: &crate::call::Call) -> Option<crate::internal::time::Moment> {
                Some(self.0.due_behind(before, call))
            }

            fn needs(&self) -> crate::gate::Needs {
                crate::gate::Needs::Now
            }

            fn name(&self) -> &str {
                self.0.name().as_str()
            }

            fn draw(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }
    };
}
pub(super) use limiter;

/// Notes a fault if more may wait than a queue can hold.
pub(super) fn check_queue(faults: &mut crate::error::Faults, max_queue: u32) {
    faults.check(max_queue <= crate::internal::queue::LONGEST_QUEUE, "max_queue", &max_queue, "0 to 16777216");
}
