//! What a server's own probes (USDT, provider `loopguard`) tell of its requests: how a probe's arguments are read, which
//! request a thread runs, and what each request has had of its loop.

use crate::clock::{EndedStep, LoopClock};
use crate::records::{OffCpu, RecordHeader, STEP_PROBED};
use crate::walk::Memory;

/// `request__start` has the most.
pub const MAX_ARGUMENTS: usize = 7;
/// Bytes kept of a method, a path or route, and a request id.
pub const MAX_METHOD: usize = 16;
pub const MAX_PATH: usize = 256;
pub const MAX_REQUEST_ID: usize = 128;
/// Requests whose code can run inside each other's on one thread.
pub const MAX_NESTED: usize = 4;

/// Where the argument of a probe is, as its note says; see [`read_argument`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArgumentPlace {
    /// The constant, or what is added to the registers.
    pub offset: i64,
    /// Bytes from the start of the kernel's `struct pt_regs`, or [`NO_REGISTER`].
    pub base: u16,
    pub index: u16,
    /// `PLACE_*`.
    pub kind: u8,
    /// The index register is shifted left by this many bits.
    pub scale: u8,
    /// The value begins at this bit of its register.
    pub shift: u8,
    /// Bytes; negative: a signed value.
    pub size: i8,
}

pub const NO_REGISTER: u16 = u16::MAX;
pub const PLACE_CONSTANT: u8 = 0;
pub const PLACE_REGISTERS: u8 = 1;
pub const PLACE_MEMORY: u8 = 2;

/// What the probe programs are told of one site, by its index, which is the attach cookie.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeArguments {
    pub places: [ArgumentPlace; MAX_ARGUMENTS],
    pub count: u64,
}

/// Reads the registers with which a probe was hit.
pub trait Registers {
    /// The word that many bytes into `struct pt_regs`.
    fn word(&self, offset: u16) -> Option<u64>;
}

/// The value of a probe's argument.
#[inline(always)]
pub fn read_argument(place: &ArgumentPlace, registers: &impl Registers, memory: &impl Memory) -> Option<u64> {
    let mut value = place.offset as u64;
    if place.kind != PLACE_CONSTANT {
        if place.base != NO_REGISTER {
            value = value.wrapping_add(registers.word(place.base)?);
        }
        if place.index != NO_REGISTER {
            value = value.wrapping_add(registers.word(place.index)? << (place.scale & 63));
        }
        if place.kind == PLACE_MEMORY {
            let mut word = [0u8; 8];
            let read = match place.size {
                8 | -8 => memory.read(value, &mut word),
                4 | -4 => memory.read::<[u8; 4]>(value, first(&mut word)),
                2 | -2 => memory.read::<[u8; 2]>(value, first(&mut word)),
                _ => memory.read::<[u8; 1]>(value, first(&mut word)),
            };
            if !read {
                return None;
            }
            value = u64::from_le_bytes(word);
        }
        value >>= place.shift & 63;
    }
    Some(extend(value, place.size))
}

/// The first bytes of a word.
#[inline(always)]
fn first<const N: usize>(word: &mut [u8; 8]) -> &mut [u8; N] {
    const { assert!(N <= 8) };
    // SAFETY: `N` bytes of the eight, with the alignment of a byte.
    unsafe { &mut *word.as_mut_ptr().cast::<[u8; N]>() }
}

/// The low `size` bytes of a value, with the sign if it has one.
#[inline(always)]
fn extend(value: u64, size: i8) -> u64 {
    match size {
        1 => value as u8 as u64,
        2 => value as u16 as u64,
        4 => value as u32 as u64,
        -1 => value as i8 as i64 as u64,
        -2 => value as i16 as i64 as u64,
        -4 => value as i32 as i64 as u64,
        _ => value,
    }
}

/// A request as long as it is open.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestKey {
    /// The server's own id.
    pub id: u64,
    pub tgid: u32,
    pub _pad: u32,
}

/// It was open already when loopguard came: its start is unknown.
pub const REQUEST_OPEN_BEFORE: u32 = 1;
/// Some of its code ran on a thread that was not watched yet: its sums lack that.
pub const REQUEST_RAN_UNSEEN: u32 = 2;
/// One of its steps is not among those that blocked yet: if it did, that is told by the step's own record.
pub const REQUEST_HELD: u32 = 4;

/// What a request has had of its loop so far. Times are sums over its steps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestTotals {
    pub start_ns: u64,
    /// Its steps in all, and those of them that reached the threshold.
    pub held_ns: u64,
    pub blocked_ns: u64,
    pub longest_ns: u64,
    pub off_cpu: OffCpu,
    pub steps: u32,
    pub blocks: u32,
    /// `REQUEST_*`.
    pub flags: u32,
    pub _pad: u32,
}

impl RequestTotals {
    #[inline(always)]
    pub fn add(&mut self, ended: EndedStep, off_cpu: OffCpu, threshold_ns: u64) {
        let ns = ended.duration_ns();
        self.held_ns += ns;
        self.steps += 1;
        if ns >= threshold_ns {
            self.blocked_ns += ns;
            self.blocks += 1;
        }
        if ns > self.longest_ns {
            self.longest_ns = ns;
        }
        self.off_cpu.waiting_ns += off_cpu.waiting_ns;
        self.off_cpu.gil_ns += off_cpu.gil_ns;
        self.off_cpu.run_queue_ns += off_cpu.run_queue_ns;
    }
}

/// An enter was seen on the thread. Exits before that belong to enters from before loopguard came.
const HAS_ENTERED: u32 = 1 << 31;

/// The requests whose code a thread is in, the outermost first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunningRequests {
    depth: u32,
    /// `STEP_PROBED`, if the step that was running when the first one was entered had it; [`HAS_ENTERED`].
    outer_flags: u32,
    ids: [u64; MAX_NESTED],
}

impl RunningRequests {
    /// The innermost one; 0: none.
    #[inline(always)]
    pub fn current(&self) -> u64 {
        match self.depth {
            0 => 0,
            depth => self.ids[(depth as usize - 1) & (MAX_NESTED - 1)],
        }
    }
}

/// What an enter or exit probe means for the steps of its thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// A step ends here and another one begins. `left`: whose it was; 0: no request's.
    Edge { left: u64, ended: EndedStep },
    /// The same request goes on.
    Same,
    /// Enters that are nested too deep, or an exit without its enter: counted, and otherwise ignored.
    Astray,
}

impl LoopClock {
    /// The thread starts running the code of `id`. After an edge, call [`begin_crossed`](Self::begin_crossed).
    #[inline(always)]
    pub fn enter_request(&mut self, now: u64, id: u64) -> Crossing {
        self.seen_running(now);
        let depth = self.running.depth;
        if !self.in_tick() || depth >= MAX_NESTED as u32 {
            return Crossing::Astray;
        }
        let left = self.running.current();
        if depth == 0 {
            self.running.outer_flags = HAS_ENTERED | (self.step_flags & STEP_PROBED);
        }
        self.running.ids[depth as usize & (MAX_NESTED - 1)] = id;
        self.running.depth = depth + 1;
        if left == id { Crossing::Same } else { Crossing::Edge { left, ended: self.end_step(now) } }
    }

    /// It stops running it; enters inside that were never left are left with it.
    #[inline(always)]
    pub fn exit_request(&mut self, now: u64, id: u64) -> Crossing {
        let left = self.running.current();
        let mut depth = self.running.depth;
        if self.running.outer_flags & HAS_ENTERED == 0 {
            return Crossing::Same;
        }
        let mut i = 0;
        while i < MAX_NESTED {
            if depth == 0 {
                return Crossing::Astray;
            }
            depth -= 1;
            if self.running.ids[depth as usize & (MAX_NESTED - 1)] == id {
                self.running.depth = depth;
                return if self.running.current() == left {
                    Crossing::Same
                } else {
                    Crossing::Edge { left, ended: self.end_step(now) }
                };
            }
            i += 1;
        }
        Crossing::Astray
    }

    /// Begins the step after an edge of [`enter_request`](Self::enter_request) or [`exit_request`](Self::exit_request).
    #[inline(always)]
    pub fn begin_crossed(&mut self, now: u64) {
        let flags = if self.running.depth > 0 { STEP_PROBED } else { self.running.outer_flags & STEP_PROBED };
        self.begin_step(now, flags);
    }

    /// The tick is over, so nothing runs: the request that had not been left, or 0.
    #[inline(always)]
    pub fn leave_all_requests(&mut self) -> u64 {
        let left = self.running.current();
        self.running.depth = 0;
        left
    }
}

/// A request has begun. Strings without their lengths are the target's bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestStartRecord {
    pub header: RecordHeader,
    pub id: u64,
    pub at_ns: u64,
    /// Bytes of each string; 0 also for one that could not be read.
    pub method_length: u32,
    pub path_length: u32,
    pub request_id_length: u32,
    pub _pad: u32,
    pub method: [u8; MAX_METHOD],
    pub path: [u8; MAX_PATH],
    pub request_id: [u8; MAX_REQUEST_ID],
}

/// Its route is known.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestRouteRecord {
    pub header: RecordHeader,
    pub id: u64,
    pub route_length: u64,
    pub route: [u8; MAX_PATH],
}

/// It has ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestEndRecord {
    pub header: RecordHeader,
    pub id: u64,
    pub status: u64,
    pub end_ns: u64,
    /// All zero: the kernel had no place for it, or its start and its code were not seen.
    pub totals: RequestTotals,
}

const _: () = assert!(size_of::<ArgumentPlace>() == 16);
const _: () = assert!(size_of::<ProbeArguments>() == 120);
const _: () = assert!(size_of::<RequestKey>() == 16);
const _: () = assert!(size_of::<RequestTotals>() == 4 * 8 + 24 + 16);
const _: () = assert!(size_of::<RunningRequests>() == 40);
const _: () = assert!(size_of::<RequestStartRecord>() == 16 + 16 + 16 + 16 + 256 + 128);
const _: () = assert!(size_of::<RequestRouteRecord>() == 16 + 16 + 256);
const _: () = assert!(size_of::<RequestEndRecord>() == 16 + 24 + 72);
const _: () = assert!(MAX_NESTED.is_power_of_two());

#[cfg(feature = "user")]
mod user {
    use super::*;
    // SAFETY: plain integers without padding bytes.
    unsafe impl aya::Pod for ProbeArguments {}
    // SAFETY: as above.
    unsafe impl aya::Pod for RequestKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for RequestTotals {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const START: u64 = 1000 * MS;

    struct Saved([u64; 4]);

    impl Registers for Saved {
        fn word(&self, offset: u16) -> Option<u64> {
            self.0.get(usize::from(offset) / 8).copied()
        }
    }

    /// Sixteen bytes at 0x1000.
    struct Bytes([u8; 16]);

    impl Memory for Bytes {
        unsafe fn read_raw(&self, address: u64, to: *mut u8, length: usize) -> bool {
            let Some(from) = address.checked_sub(0x1000).and_then(|at| self.0.get(at as usize..)) else { return false };
            let Some(from) = from.get(..length) else { return false };
            // SAFETY: the caller's promise.
            unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), to, length) };
            true
        }
    }

    fn read(place: ArgumentPlace) -> Option<u64> {
        let memory = Bytes([0xff, 0xfe, 2, 3, 4, 5, 6, 0x87, 8, 9, 10, 11, 12, 13, 14, 15]);
        read_argument(&place, &Saved([0x1000, 2, 0xffff_8182, 0]), &memory)
    }

    #[test]
    fn arguments_are_read_from_where_they_are() {
        let none = ArgumentPlace { base: NO_REGISTER, index: NO_REGISTER, ..ArgumentPlace::default() };
        let constant = |offset, size| ArgumentPlace { offset, size, ..none };
        assert_eq!(read(constant(-5, -4)), Some(-5i64 as u64));
        assert_eq!(read(constant(-5, 4)), Some(0xffff_fffb));
        let register = |base, size, shift| ArgumentPlace { kind: PLACE_REGISTERS, base, size, shift, ..none };
        assert_eq!(read(register(0, 8, 0)), Some(0x1000));
        assert_eq!(read(register(16, 4, 0)), Some(0xffff_8182));
        assert_eq!(read(register(16, -1, 0)), Some(-126i64 as u64));
        assert_eq!(read(register(16, 1, 8)), Some(0x81));
        assert_eq!(read(register(400, 8, 0)), None);
        let memory = |offset, index, scale, size| ArgumentPlace {
            kind: PLACE_MEMORY,
            base: 0,
            offset,
            index,
            scale,
            size,
            ..none
        };
        assert_eq!(read(memory(0, NO_REGISTER, 0, 8)), Some(0x8706_0504_0302_feff));
        assert_eq!(read(memory(0, NO_REGISTER, 0, -2)), Some(-257i64 as u64));
        assert_eq!(read(memory(-4, 8, 2, 1)), Some(4));
        assert_eq!(read(memory(12, NO_REGISTER, 0, 8)), None);
    }

    /// `time_ms enter|exit id`, in a tick from 0; what comes out: whose step ended, and how long it was.
    fn check(story: &str, expected: &[&str]) {
        let mut clock = LoopClock::idle();
        clock.switch_in(START);
        let mut told = std::vec::Vec::new();
        for line in story.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words: std::vec::Vec<&str> = line.split_whitespace().collect();
            let (now, id) = (START + words[0].parse::<u64>().unwrap() * MS, words[2].parse().unwrap());
            let crossing = if words[1] == "enter" { clock.enter_request(now, id) } else { clock.exit_request(now, id) };
            told.push(match crossing {
                Crossing::Edge { left, ended } => {
                    clock.begin_crossed(now);
                    std::format!("{left} {}", ended.duration_ns() / MS)
                }
                Crossing::Same => "same".into(),
                Crossing::Astray => "astray".into(),
            });
        }
        assert_eq!(told, expected);
    }

    #[test]
    fn enter_and_exit_cut_a_tick_into_steps() {
        check("2 enter 7\n 5 exit 7\n 6 enter 8\n 16 exit 8", &["0 2", "7 3", "0 1", "8 10"]);
    }

    #[test]
    fn a_request_inside_another_ones_code_has_its_own_step() {
        check("1 enter 7\n 3 enter 8\n 7 exit 8\n 9 exit 7", &["0 1", "7 2", "8 4", "7 2"]);
    }

    #[test]
    fn the_same_request_once_more_is_no_edge() {
        check("1 enter 7\n 3 enter 7\n 7 exit 7\n 9 exit 7", &["0 1", "same", "same", "7 8"]);
    }

    #[test]
    fn what_does_not_pair_is_bounded_and_harmless() {
        // Before the first enter an exit is left over from before loopguard came.
        check("1 exit 7\n 2 enter 7\n 3 exit 8\n 4 exit 7\n 5 exit 7", &["same", "0 2", "astray", "7 2", "astray"]);
        // An exit leaves what was entered inside and never left.
        check("1 enter 7\n 2 enter 8\n 5 exit 7", &["0 1", "7 1", "8 3"]);
        check(
            "1 enter 1\n 2 enter 2\n 3 enter 3\n 4 enter 4\n 5 enter 5\n 6 exit 5\n 7 exit 4",
            &["0 1", "1 1", "2 1", "3 1", "astray", "astray", "4 3"],
        );
    }

    #[test]
    fn after_the_last_exit_the_tick_goes_on_as_before() {
        let mut clock = LoopClock::idle();
        clock.switch_in(START);
        clock.end_step(START + MS);
        clock.begin_step(START + MS, STEP_PROBED);
        for (id, flags) in [(7, STEP_PROBED), (8, STEP_PROBED)] {
            clock.enter_request(START + 2 * MS, id);
            clock.begin_crossed(START + 2 * MS);
            assert_eq!((clock.running.current(), clock.step_flags), (id, STEP_PROBED));
            clock.exit_request(START + 3 * MS, id);
            clock.begin_crossed(START + 3 * MS);
            assert_eq!((clock.running.current(), clock.step_flags), (0, flags));
        }
        clock.begin_tick(START + 9 * MS);
        clock.enter_request(START + 9 * MS, 7);
        clock.begin_crossed(START + 9 * MS);
        assert_eq!(clock.leave_all_requests(), 7);
        assert_eq!(clock.leave_all_requests(), 0);
    }

    #[test]
    fn totals_add_up() {
        let mut totals = RequestTotals::default();
        for (ns, waiting_ns) in [(3 * MS, 0), (12 * MS, 9 * MS), (10 * MS, MS)] {
            let off_cpu = OffCpu { waiting_ns, ..OffCpu::default() };
            totals.add(EndedStep { start_ns: START, end_ns: START + ns }, off_cpu, 10 * MS);
        }
        let expected = RequestTotals {
            held_ns: 25 * MS,
            blocked_ns: 22 * MS,
            longest_ns: 12 * MS,
            off_cpu: OffCpu { waiting_ns: 10 * MS, ..OffCpu::default() },
            steps: 3,
            blocks: 2,
            ..RequestTotals::default()
        };
        assert_eq!(totals, expected);
    }
}
