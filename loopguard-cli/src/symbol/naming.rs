//! Names stacks on a thread of its own and hands events on in order, each when its stack is ready.
//!
//! The first look into a large file takes long. Meanwhile records are taken from the kernel as ever; only what comes out
//! waits, and not without end.

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

/// How often it is seen to whether what was read of symbol files can be let go of, while there is something.
const TRIM_EVERY: Duration = Duration::from_millis(100);
/// Between the stacks the allocator keeps what they took, page by page: how often that is given back while there are any.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(10);
const FOREVER: Duration = Duration::from_secs(3600);

const QUEUE_FULL: &str = "too many stacks waited to be named";
const TOO_SLOW: &str = "naming its functions took too long";
const FAILED: &str = "its functions could not be named";

/// Events on their way to the core.
pub struct Naming {
    work: Sender<Work>,
    /// Stacks that go to the thread together, and when the last ones did.
    together: Vec<(u64, Box<RawStack>)>,
    sent_at: Instant,
    /// Stacks that wait, and the bytes of their copies.
    queued: usize,
    queued_bytes: usize,
    done: Receiver<Done>,
    held: VecDeque<Held>,
    next_ticket: u64,
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
    WithStack(Capture, Box<RawStack>),
}

enum Work {
    Prepare(u32),
    Forget(u32),
    Name(Vec<(u64, Box<RawStack>)>),
}

enum Done {
    /// With the bytes that its copy had.
    Stack(u64, usize, Box<NamedStack>),
    Nameless(String),
}

struct Held {
    event: Event,
    /// Of the stack it waits for.
    ticket: Option<u64>,
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
            next_ticket: 0,
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
        self.send_together();
        // Both are only better done than not.
        let _ = self.work.send(work);
    }

    /// Takes what follows on what was taken before.
    pub fn pass(&mut self, seen: Seen) {
        let (mut capture, raw) = match seen {
            Seen::Event(event) => return self.hold(event, None),
            Seen::WithStack(capture, raw) => (capture, raw),
        };
        let size = raw.copy.bytes.len();
        if self.queued >= MAX_QUEUED || self.queued_bytes + size > MAX_QUEUED_BYTES {
            mark(&mut capture, QUEUE_FULL);
            self.counts.unwound += 1;
            *self.counts.incomplete.entry(QUEUE_FULL).or_default() += 1;
            return self.hold(Event::Capture(capture), None);
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.queued += 1;
        self.queued_bytes += size;
        self.hold(Event::Capture(capture), Some(ticket));
        self.together.push((ticket, raw));
        self.send_if_due();
    }

    fn send_if_due(&mut self) {
        if self.together.len() >= MAX_TOGETHER || self.sent_at.elapsed() >= TOGETHER {
            self.send_together();
        }
    }

    fn send_together(&mut self) {
        if self.together.is_empty() {
            return;
        }
        self.sent_at = Instant::now();
        let Err(SendError(work)) = self.work.send(Work::Name(std::mem::take(&mut self.together))) else { return };
        // The thread is gone.
        let Work::Name(unnamed) = work else { return };
        for (ticket, raw) in unnamed {
            self.queued -= 1;
            self.queued_bytes -= raw.copy.bytes.len();
            if let Some(held) = self.held.iter_mut().find(|held| held.ticket == Some(ticket)) {
                held.ticket = None;
                if let Event::Capture(capture) = &mut held.event {
                    mark(capture, FAILED);
                }
            }
        }
    }

    fn hold(&mut self, event: Event, ticket: Option<u64>) {
        self.held.push_back(Held { event, ticket, since: Instant::now() });
    }

    /// Appends the events that are ready, in the order they came.
    pub fn release(&mut self, events: &mut Vec<Event>) {
        self.send_if_due();
        while let Ok(done) = self.done.try_recv() {
            self.take(done);
        }
        while let Some(first) = self.held.front() {
            let has_waited = self.held.len() > MAX_HELD || first.since.elapsed() > PATIENCE;
            if first.ticket.is_some() && !has_waited {
                break;
            }
            let Some(Held { mut event, ticket, .. }) = self.held.pop_front() else { break };
            if let (Event::Capture(capture), Some(_)) = (&mut event, ticket) {
                mark(capture, TOO_SLOW);
            }
            events.push(event);
        }
    }

    fn take(&mut self, done: Done) {
        match done {
            Done::Nameless(notice) => self.notices.push(notice),
            Done::Stack(ticket, size, named) => {
                self.queued -= 1;
                self.queued_bytes -= size;
                self.unnamed += named.unnamed;
                self.count(named.end);
                // Stacks come back in the order they went.
                let waiting = self.held.iter_mut().find(|held| held.ticket.is_some());
                if let Some(held) = waiting.filter(|held| held.ticket == Some(ticket)) {
                    held.ticket = None;
                    if let Event::Capture(capture) = &mut held.event {
                        if named.end == Some(End::BeyondCopy) {
                            self.outgrown.insert(capture.tid);
                        }
                        capture.stack = Arc::new(named.stack);
                    }
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
        self.send_together();
        let until = Instant::now() + PATIENCE;
        while self.held.iter().any(|held| held.ticket.is_some()) {
            match self.done.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(done) => self.take(done),
                Err(_) => break,
            }
        }
        for held in self.held.drain(..) {
            let mut event = held.event;
            if let (Event::Capture(capture), Some(_)) = (&mut event, held.ticket) {
                mark(capture, TOO_SLOW);
            }
            events.push(event);
        }
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
