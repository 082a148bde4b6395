//! Puts the pages of a stack copy together and sends the stack to be named.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use aya::maps::{MapData, RingBuf};
use loopguard_common::records::{CaptureRecord, MAX_STACK_PAGES, REGISTER_SP, STACK_PAGE, StackPage};

use super::{
    Live,
    facts::{frames, walk_status},
};
use crate::{
    core::event::{Capture, Event, Frame, FrameKind, Origin, Tid},
    runtime::{cpython::incomplete, memory::ProcessMemory},
    source::decode::{Record, decode},
    symbol::{
        RawStack,
        naming::{Fate, Seen},
        unwind::StackCopy,
    },
};

/// Copies that wait for their captures; more are only there when captures were lost.
const MAX_WAITING: usize = 256;
/// Of a wait that began right after another one.
const NOT_COPIED: &str = "its native part was not copied";
/// Unwinding it takes more than what watching may cost.
const NOT_READ: &str = "its native part was not read: the budget does not allow for it";
/// A page is visible only once those before it are: another processor may be in the middle of writing one.
const LOOKS: u32 = 200;

/// The stack copies that came and whose captures did not yet.
pub(super) struct StackPages {
    ring: RingBuf<MapData>,
    waiting: HashMap<(Tid, u64), Vec<Box<StackPage>>>,
    order: VecDeque<(Tid, u64)>,
    /// Copies that did not arrive.
    pub lost: u64,
}

impl StackPages {
    pub fn new(ring: RingBuf<MapData>) -> Self {
        Self { ring, waiting: HashMap::new(), order: VecDeque::new(), lost: 0 }
    }

    /// The copy that belongs to a capture, if all of it arrived.
    pub fn take(&mut self, record: &CaptureRecord) -> Option<StackCopy> {
        let count = (record.stack_pages as usize).min(MAX_STACK_PAGES);
        if count == 0 {
            return None;
        }
        let key = (record.header.tid, record.at_ns);
        for _ in 0..LOOKS {
            if self.waiting.get(&key).is_some_and(|pages| pages.len() >= count) {
                break;
            }
            self.receive();
            std::hint::spin_loop();
        }
        let Some(pages) = self.waiting.remove(&key) else {
            self.lost += 1;
            return None;
        };
        self.order.retain(|known| *known != key);
        let start = pages.first()?.address;
        let mut bytes = Vec::with_capacity(pages.len() * STACK_PAGE);
        for (page, expected) in pages.iter().zip((start..).step_by(STACK_PAGE)) {
            if page.address != expected {
                break;
            }
            bytes.extend_from_slice(&page.bytes);
        }
        Some(StackCopy { registers: record.registers.map(Some), start, bytes })
    }

    fn receive(&mut self) {
        while let Some(entry) = self.ring.next() {
            let Ok(Record::StackPage(page)) = decode(&entry) else { continue };
            let key = (page.header.tid, page.at_ns);
            let pages = self.waiting.entry(key).or_default();
            if pages.is_empty() {
                self.order.push_back(key);
            }
            if pages.len() < MAX_STACK_PAGES {
                pages.push(page);
            }
            if self.order.len() > MAX_WAITING
                && let Some(oldest) = self.order.pop_front()
            {
                self.waiting.remove(&oldest);
            }
        }
    }
}

impl Live {
    /// Copies the stack of a thread that sleeps, from here.
    pub(super) fn copy_stack(&self, record: &CaptureRecord) -> Option<StackCopy> {
        let (pid, tid) = (record.header.tgid, record.header.tid);
        let sp = record.registers[REGISTER_SP];
        if sp == 0 {
            // Nobody saw it go to sleep, and the system tells two registers only.
            return None;
        }
        let start = sp & !(STACK_PAGE as u64 - 1);
        let mut bytes =
            ProcessMemory { pid }.bytes_up_to(start, self.options.stack_size.most().next_multiple_of(STACK_PAGE));
        bytes.truncate(bytes.len() / STACK_PAGE * STACK_PAGE);
        // Nothing of it has changed meanwhile if the thread still sleeps in the same wait.
        let after = self.kernel.clock(tid)?;
        let same = after.step_seq == record.step_seq && after.is_waiting() && after.wait_start_ns <= record.at_ns;
        (same && !bytes.is_empty()).then_some(StackCopy { registers: record.registers.map(Some), start, bytes })
    }

    pub(super) fn pass_events(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            self.naming.pass(Seen::Event(event));
        }
    }

    /// A capture, and what its native frames are to be made of if its stack was copied.
    pub(super) fn seen(&mut self, record: &CaptureRecord, mut capture: Capture, copy: Option<StackCopy>) -> Seen {
        let (copy, missing) = if self.governor.effort().reads_details { (copy, NOT_COPIED) } else { (None, NOT_READ) };
        let Some(copy) = copy else {
            let stack = Arc::make_mut(&mut capture.stack);
            stack.incomplete = stack.incomplete.or(Some(missing));
            return Seen::Event(Event::Capture(capture));
        };
        let pid = record.header.tgid;
        let python = self.targets.get_mut(&pid).and_then(|target| target.python.as_mut());
        let (python, python_incomplete) = match python {
            Some(python) => (python.inspector.runs(frames(record)), incomplete(walk_status(record))),
            None => (Vec::new(), None),
        };
        let kernel = capture.wait.as_ref().filter(|_| record.syscall >= 0).map(|wait| system_call(&wait.syscall));
        let age_ns = record.until_ns.saturating_sub(record.step_start_ns);
        // A worker's long poll may be told only when its thread does the next thing.
        let fate = match self.loops.get(&record.header.tid) {
            Some(known) if known.python.is_some() && age_ns < known.pace.threshold_ns => Fate::Open,
            _ => Fate::Told,
        };
        Seen::WithStack(capture, Box::new(RawStack { pid, copy, kernel, python, python_incomplete }), fate)
    }
}

fn system_call(name: &str) -> Arc<Frame> {
    Arc::new(Frame {
        kind: FrameKind::Native,
        origin: Origin::Kernel,
        function: name.into(),
        file: None,
        line: None,
        module: Some("[kernel]".into()),
    })
}
