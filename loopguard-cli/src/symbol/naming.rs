//! Names stacks on a thread of its own and hands events on in order, each when its stack is ready.
//!
//! The first look into a large file takes long. Meanwhile records are taken from the kernel as ever; only what comes out
//! waits, and not without end.
//!
//! A capture is taken when a step may become a block, and most steps of a healthy loop that get that old end before they
//! do: nobody will see their stacks, so those are not named.

use std::{
    collections::{BTreeSet, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, SendError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use super::{NamedStack, RawStack, Stacks, footprint, object::Object, unwind::End};
use crate::core::{
    event::{Capture, Event, Stack, Tid},
    status::StackCounts,
};
use anyhow::{Context as _, Result};

/// Stacks that may wait to be named, and how many bytes their copies may have.
const MAX_QUEUED: usize = 1024;
const MAX_QUEUED_BYTES: usize = 32 << 20;
/// Events that may wait for the stack of an earlier one.
const MAX_HELD: usize = 65_536;
/// Waking the thread costs more than naming a stack: those that come sooner after others than this go to it together.
const TOGETHER: Duration = Duration::from_millis(50);
/// So many at most.
const MAX_TOGETHER: usize = 64;
/// How long an event waits at most.
const PATIENCE: Duration = Duration::from_secs(10);
/// Whether a step becomes a block is waited for so long before its stack is named anyway.
const OPEN_FOR: Duration = Duration::from_millis(100);

/// How often it is seen to whether what was read of symbol files can be let go of, while there is something.
const TRIM_EVERY: Duration = Duration::from_millis(100);
/// Between the stacks the allocator keeps what they took, page by page: how often that is given back while there are any.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(10);
const FOREVER: Duration = Duration::from_secs(3600);

const QUEUE_FULL: &str = "too many stacks waited to be named";
const TOO_SLOW: &str = "naming its functions took too long";
const FAILED: &str = "its functions could not be named";
const NOT_TOLD: &str = "its step was over before it was a block";

/// Events on their way to the core.
pub struct Naming {
    work: Sender<Work>,
    /// Stacks that are yet to go to the thread, together, and when the last ones did.
    together: Vec<Waiting>,
    sent_at: Instant,
    /// Stacks that wait, and the bytes of their copies.
    queued: usize,
    queued_bytes: usize,
    done: Receiver<Done>,
    held: VecDeque<Held>,
    /// The number of the first event that is held.
    first: u64,
    unnamed: u64,
    counts: StackCounts,
    /// Threads whose stacks are larger than what was copied of them.
    outgrown: BTreeSet<Tid>,
    notices: Vec<String>,
}

/// What comes from a source.
pub enum Seen {
    /// An event whose stack, if it has one, is as good as it gets.
    Event(Event),
    /// A capture that holds its Python frames, and what its full stack is to be made of.
    WithStack(Capture, Box<RawStack>, Fate),
}

/// What is known of the step of a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Whether it will be told shows when it ends.
    Open,
    /// It is told.
    Told,
}

/// A stack that is to be named if its step is told.
struct Waiting {
    /// The number of its event.
    event: u64,
    raw: Box<RawStack>,
    /// The step.
    tid: Tid,
    seq: u64,
    fate: Fate,
    /// The step was seen to be over; what there is to tell of it was sent before.
    is_over: bool,
    since: Instant,
}

enum Work {
    Prepare(u32),
    Forget(u32),
    Name(Vec<(u64, Box<RawStack>)>),
}

enum Done {
    /// For the event of that number, with the bytes that its copy had.
    Stack(u64, usize, Box<NamedStack>),
    Nameless(String),
}

struct Held {
    event: Event,
    /// For its stack.
    waits: bool,
    since: Instant,
}

impl Naming {
    pub fn start() -> Result<Self> {
        let (work, to_do) = mpsc::channel();
        let (report, done) = mpsc::channel();
        thread::Builder::new()
            .name("loopguard-names".to_owned())
            .spawn(move || run(&to_do, &report))
            .context("start the thread that names stacks")?;
        Ok(Self {
            work,
            together: Vec::new(),
            sent_at: Instant::now(),
            queued: 0,
            queued_bytes: 0,
            done,
            held: VecDeque::new(),
            first: 0,
            unnamed: 0,
            counts: StackCounts::default(),
            outgrown: BTreeSet::new(),
            notices: Vec::new(),
        })
    }

    /// A process is about to be watched: what it maps is better read before it is needed.
    pub fn prepare(&mut self, pid: u32) {
        self.send(Work::Prepare(pid));
    }

    pub fn forget(&mut self, pid: u32) {
        self.send(Work::Forget(pid));
    }

    fn send(&mut self, work: Work) {
        // What came before is named before.
        self.send_together(|_| true);
        // Both are only better done than not.
        let _ = self.work.send(work);
    }

    /// Takes what follows on what was taken before.
    pub fn pass(&mut self, seen: Seen) {
        let (mut capture, raw, fate) = match seen {
            Seen::Event(event) => {
                match &event {
                    Event::Step(step) => self.now_told(step.tid, step.seq),
                    Event::StillOpen(open) => self.now_told(open.tid, open.seq),
                    _ => {}
                }
                self.hold(event, false);
                return;
            }
            Seen::WithStack(capture, raw, fate) => (capture, raw, fate),
        };
        let size = raw.copy.bytes.len();
        if self.queued >= MAX_QUEUED || self.queued_bytes + size > MAX_QUEUED_BYTES {
            mark(&mut capture, QUEUE_FULL);
            self.counts.unwound += 1;
            *self.counts.incomplete.entry(QUEUE_FULL).or_default() += 1;
            self.hold(Event::Capture(capture), false);
            return;
        }
        self.queued += 1;
        self.queued_bytes += size;
        let (tid, seq) = (capture.tid, capture.step_seq);
        if fate == Fate::Told {
            self.now_told(tid, seq);
        }
        let event = self.hold(Event::Capture(capture), true);
        self.together.push(Waiting { event, raw, tid, seq, fate, is_over: false, since: Instant::now() });
        self.send_if_due();
    }

    fn now_told(&mut self, tid: Tid, seq: u64) {
        for waiting in self.together.iter_mut().filter(|waiting| (waiting.tid, waiting.seq) == (tid, seq)) {
            waiting.fate = Fate::Told;
        }
    }

    /// Leaves stacks unnamed whose steps are over and were not told. To be called when all records were passed on that
    /// were there, with what says whether a step still runs: one that is over now may have been told just after that, so
    /// it counts the next time.
    pub fn settle(&mut self, runs: impl Fn(Tid, u64) -> bool) {
        let over: Vec<_> =
            self.together.extract_if(.., |waiting| waiting.fate == Fate::Open && waiting.is_over).collect();
        for waiting in over {
            self.give_up(waiting.event, waiting.raw.copy.bytes.len(), NOT_TOLD);
        }
        for waiting in self.together.iter_mut().filter(|waiting| waiting.fate == Fate::Open) {
            waiting.is_over = !runs(waiting.tid, waiting.seq);
        }
    }

    fn send_if_due(&mut self) {
        if self.together.len() >= MAX_TOGETHER || self.sent_at.elapsed() >= TOGETHER {
            self.send_together(|waiting| waiting.fate == Fate::Told || waiting.since.elapsed() >= OPEN_FOR);
        }
    }

    fn send_together(&mut self, is_due: impl Fn(&Waiting) -> bool) {
        let due: Vec<_> = self.together.extract_if(.., |waiting| is_due(waiting)).collect();
        if due.is_empty() {
            return;
        }
        self.sent_at = Instant::now();
        let due = due.into_iter().map(|waiting| (waiting.event, waiting.raw)).collect();
        let Err(SendError(work)) = self.work.send(Work::Name(due)) else { return };
        // The thread is gone.
        let Work::Name(unnamed) = work else { return };
        for (event, raw) in unnamed {
            self.give_up(event, raw.copy.bytes.len(), FAILED);
        }
    }

    /// The event goes on as it is.
    fn give_up(&mut self, event: u64, size: usize, why: &'static str) {
        self.queued -= 1;
        self.queued_bytes -= size;
        if let Some(held) = self.held_mut(event) {
            held.waits = false;
            if let Event::Capture(capture) = &mut held.event {
                mark(capture, why);
            }
        }
    }

    /// Returns its number.
    fn hold(&mut self, event: Event, waits: bool) -> u64 {
        self.held.push_back(Held { event, waits, since: Instant::now() });
        self.first + self.held.len() as u64 - 1
    }

    /// None: it has gone on without its stack.
    fn held_mut(&mut self, event: u64) -> Option<&mut Held> {
        self.held.get_mut(usize::try_from(event.checked_sub(self.first)?).ok()?)
    }

    /// Appends the events that are ready, in the order they came.
    pub fn release(&mut self, events: &mut Vec<Event>) {
        self.send_if_due();
        while let Ok(done) = self.done.try_recv() {
            self.take(done);
        }
        while let Some(held) = self.held.front() {
            let has_waited = self.held.len() > MAX_HELD || held.since.elapsed() > PATIENCE;
            if held.waits && !has_waited {
                break;
            }
            let Some(held) = self.held.pop_front() else { break };
            self.first += 1;
            events.push(held.into_event());
        }
    }

    fn take(&mut self, done: Done) {
        match done {
            Done::Nameless(notice) => self.notices.push(notice),
            Done::Stack(event, size, named) => {
                self.queued -= 1;
                self.queued_bytes -= size;
                self.unnamed += named.unnamed;
                self.count(named.end);
                let Some(held) = self.held_mut(event) else { return };
                held.waits = false;
                let Event::Capture(capture) = &mut held.event else { return };
                let tid = capture.tid;
                capture.stack = Arc::new(named.stack);
                if named.end == Some(End::BeyondCopy) {
                    self.outgrown.insert(tid);
                }
            }
        }
    }

    fn count(&mut self, end: Option<End>) {
        self.counts.unwound += 1;
        match end.map(End::reason) {
            Some(None) => self.counts.complete += 1,
            Some(Some(why)) => *self.counts.incomplete.entry(why).or_default() += 1,
            None => *self.counts.incomplete.entry(FAILED).or_default() += 1,
        }
    }

    /// Native stacks so far. A stack that was not unwound in time is an incomplete one.
    pub fn counts(&self) -> StackCounts {
        self.counts.clone()
    }

    /// Waits for all stacks there are and releases everything.
    pub fn finish(&mut self, events: &mut Vec<Event>) {
        self.send_together(|_| true);
        let until = Instant::now() + PATIENCE;
        while self.held.iter().any(|held| held.waits) {
            match self.done.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(done) => self.take(done),
                Err(_) => break,
            }
        }
        self.first += self.held.len() as u64;
        events.extend(self.held.drain(..).map(Held::into_event));
    }

    /// Native calls that have no name.
    pub fn unnamed(&self) -> u64 {
        self.unnamed
    }

    /// The threads since the last call whose stacks were larger than what was copied of them.
    pub fn take_outgrown(&mut self) -> BTreeSet<Tid> {
        std::mem::take(&mut self.outgrown)
    }

    pub fn take_notices(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notices)
    }
}

impl Held {
    /// Without its stack if that has not come.
    fn into_event(mut self) -> Event {
        if let (Event::Capture(capture), true) = (&mut self.event, self.waits) {
            mark(capture, TOO_SLOW);
        }
        self.event
    }
}

/// Says why only the Python frames are there.
fn mark(capture: &mut Capture, why: &'static str) {
    let stack = Arc::make_mut(&mut capture.stack);
    stack.incomplete = Some(why);
}

fn run(to_do: &Receiver<Work>, report: &Sender<Done>) {
    let mut stacks = Stacks::default();
    let (mut looked, mut gave_back) = (Instant::now(), Instant::now());
    // Whether symbol files may be open, and whether memory was used since some was given back.
    let (mut reads, mut used) = (false, false);
    loop {
        let mut has_closed = false;
        if reads && looked.elapsed() >= TRIM_EVERY {
            has_closed = stacks.let_go();
            reads = stacks.is_reading();
            looked = Instant::now();
        }
        if used && !reads && (has_closed || gave_back.elapsed() >= GIVE_BACK_EVERY) {
            footprint::give_back();
            gave_back = Instant::now();
            used = false;
        }
        let wait = match (reads, used) {
            (true, _) => TRIM_EVERY,
            (false, true) => GIVE_BACK_EVERY,
            (false, false) => FOREVER,
        };
        let work = match to_do.recv_timeout(wait) {
            Ok(work) => work,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        (reads, used) = (true, true);
        match work {
            Work::Prepare(pid) => {
                let _ = guarded(&mut stacks, |stacks| stacks.prepare(pid));
            }
            Work::Forget(pid) => stacks.forget(pid),
            Work::Name(together) => {
                for (ticket, raw) in together {
                    let size = raw.copy.bytes.len();
                    let named = guarded(&mut stacks, |stacks| stacks.name(&raw)).unwrap_or_else(|| {
                        let frames = raw.python.iter().flat_map(|run| run.frames.iter().cloned()).collect();
                        NamedStack { stack: Stack { frames, incomplete: Some(FAILED) }, ..NamedStack::default() }
                    });
                    if report.send(Done::Stack(ticket, size, Box::new(named))).is_err() {
                        return;
                    }
                }
            }
        }
        for object in stacks.take_nameless() {
            for notice in advice(&object) {
                let _ = report.send(Done::Nameless(notice));
            }
        }
    }
}

/// The files of a target may hold anything. Should a library that reads them fail on one, that costs this one stack and
/// what was remembered.
fn guarded<T>(stacks: &mut Stacks, work: impl FnOnce(&mut Stacks) -> T) -> Option<T> {
    let done = catch_unwind(AssertUnwindSafe(|| work(stacks)));
    if done.is_err() {
        *stacks = Stacks::default();
    }
    done.ok()
}

/// Which debug information would help; nothing when the file does have names, only not for this place.
fn advice(object: &Object) -> Vec<String> {
    if object.image.section(".symtab").is_some() {
        return Vec::new();
    }
    let name = object.name();
    let mut advice = vec![
        format!("{} is stripped: functions without a name are shown as {name}+offset", object.path),
        format!("for names in {name}, build it with: Cargo strip = false, debug = \"line-tables-only\"; C and C++ -g"),
    ];
    if let [first, rest @ ..] = object.build_id.as_slice() {
        let rest: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
        advice.push(format!("or install its debug information as /usr/lib/debug/.build-id/{first:02x}/{rest}.debug"));
    }
    advice
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::story::{TID, sample, step};

    fn capture(seq: u64, fate: Fate) -> Seen {
        Seen::WithStack(sample(seq, 30, "A work"), Box::default(), fate)
    }

    /// The step of each capture that comes out, and why its stack is not all there; one of nothing is complete.
    fn stacks(events: &[Event]) -> Vec<(u64, Option<&'static str>)> {
        let captures = events.iter().filter_map(|event| match event {
            Event::Capture(capture) => Some((capture.step_seq, capture.stack.incomplete)),
            _ => None,
        });
        captures.collect()
    }

    #[test]
    fn the_stack_of_a_step_that_is_not_told_is_not_named() {
        let (mut naming, mut events) = (Naming::start().unwrap(), Vec::new());
        naming.pass(capture(1, Fate::Open));
        // It runs; then it is over, and all that was sent of it has come.
        for runs in [true, true, false] {
            naming.settle(|_, _| runs);
            assert_eq!(naming.queued, 1);
        }
        naming.settle(|_, _| false);
        naming.release(&mut events);
        assert_eq!(stacks(&events), [(1, Some(NOT_TOLD))]);
        assert_eq!((naming.counts().unwound, naming.queued, naming.queued_bytes), (0, 0, 0));
    }

    #[test]
    fn a_step_that_is_told_after_it_was_seen_to_be_over_has_its_stacks() {
        let (mut naming, mut events) = (Naming::start().unwrap(), Vec::new());
        naming.pass(capture(1, Fate::Open));
        naming.pass(capture(1, Fate::Open));
        naming.settle(|_, _| false);
        naming.pass(Seen::Event(Event::Step(step(1, 0..60))));
        naming.settle(|_, _| false);
        naming.finish(&mut events);
        assert_eq!(stacks(&events), [(1, None); 2]);
        assert!(matches!(events.last(), Some(Event::Step(_))));
        assert_eq!(naming.counts().unwound, 2);
    }

    #[test]
    fn events_keep_their_order_whichever_stack_is_named_first() {
        let (mut naming, mut events) = (Naming::start().unwrap(), Vec::new());
        naming.pass(capture(1, Fate::Open));
        naming.pass(Seen::Event(Event::TimePassed { now_ns: 1 }));
        naming.pass(capture(2, Fate::Told));
        naming.pass(Seen::Event(Event::LoopGone { tid: TID }));
        // The second is named; the first holds it up.
        naming.send_together(|waiting| waiting.fate == Fate::Told);
        let done = naming.done.recv_timeout(PATIENCE).expect("the thread is there");
        naming.take(done);
        naming.settle(|_, _| false);
        naming.settle(|_, _| false);
        naming.pass(capture(3, Fate::Told));
        naming.finish(&mut events);
        assert_eq!(stacks(&events).iter().map(|(seq, _)| *seq).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(stacks(&events)[1..], [(2, None), (3, None)]);
        let kinds = [1, 3].map(|at| std::mem::discriminant(&events[at]));
        assert_eq!(
            kinds,
            [Event::TimePassed { now_ns: 1 }, Event::LoopGone { tid: TID }].map(|event| std::mem::discriminant(&event))
        );
    }
}
