//! Which task a tokio worker polls, and whether it parks or waits: rules on top of the [`LoopClock`].
//!
//! A poll begins at the entry of its task's poll function and ends behind the call, both exactly. A worker that holds
//! the runtime's driver parks in epoll, which ends a tick as with any loop; the others park on a futex, and code inside
//! a poll may wait on a futex as well. While polls are marked the two are told apart by whether a poll runs; the place
//! at which the worker parks is remembered for the time when they are not.

use crate::{
    clock::{EndedStep, LoopClock, SwitchOut},
    records::STEP_PROBED,
};

/// The place behind the call is not probed yet: nobody will see this poll end.
pub const WORKER_POLL_WITHOUT_END: u32 = 1;
/// The thread is no worker now: it runs or awaits tasks of the blocking pool.
pub const WORKER_AWAY: u32 = 2;
/// A long poll has ended; whether it blocked the worker shows in what follows.
pub const WORKER_HOLDS_STEP: u32 = 4;
/// The last poll ended a moment ago and nothing else happened since.
pub const WORKER_JUST_POLLED: u32 = 8;
/// The thread has parked since its last poll.
pub const WORKER_PARKED: u32 = 16;
/// A poll has begun since polls are marked: from then on it is known whether one runs.
pub const WORKER_POLLED: u32 = 32;

/// By slot, beside the clock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Worker {
    /// Where the running poll's return address stands on the stack.
    pub poll_sp: u64,
    /// tokio's id of the task that is polled, or was last.
    pub task_id: u64,
    /// tokio's next task id when that poll began.
    pub first_spawned: u64,
    /// Of a park on a futex: the stack pointer, and the futex.
    pub park_sp: u64,
    pub park_futex: u64,
    /// The same of a wait for tasks of the blocking pool.
    pub pool_sp: u64,
    pub pool_futex: u64,
    /// How often the thread was seen to be idle in one of these two ways while polls were marked.
    pub seen_idle: u64,
    /// Its type, by the index that user space gave it.
    pub task_type: u32,
    /// `WORKER_*`.
    pub flags: u32,
    /// Threads that the running poll woke or started; the last few.
    pub woke: [u32; 4],
}

const _: () = assert!(size_of::<Worker>() == 88);

/// A poll that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poll {
    pub sp: u64,
    pub task_id: u64,
    pub task_type: u32,
    /// Its end will be seen.
    pub has_end: bool,
}

/// What a lock of Rust's standard library waits for: that it is still locked and somebody waits
/// (library/std/src/sys/sync/mutex/futex.rs). A park waits for a count.
const LOCK_CONTENDED: u32 = 2;

/// A voluntary wait in `futex`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FutexWait {
    pub sp: u64,
    pub address: u64,
    /// The value that the futex must have for the wait.
    pub expected: u32,
    pub has_timeout: bool,
    /// Polls are marked.
    pub marked: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FutexMeaning {
    /// Code that a task runs, or that runs around polls on the runtime's only thread, waits for something.
    Waits,
    /// The worker has nothing to do.
    Parks,
    /// The thread is no worker any more; a poll that ended before it gave its worker away.
    Leaves,
    /// One of these, and without marked polls it can't be told which.
    Unclear,
    /// One of these too, but no park by the looks of it: with a limit to the wait, as idle threads of the blocking pool
    /// have, or not where the thread is known to park. What ended before it may have given its worker away.
    MayLeave,
    /// Between polls it waits for a lock, by the looks of it: whether it is still a worker does not follow.
    Locks,
}

impl FutexMeaning {
    /// Of one that leaves the thread idle.
    #[inline(always)]
    pub fn switch_out(self) -> SwitchOut {
        match self {
            Self::Unclear | Self::MayLeave | Self::Locks => SwitchOut::MayPoll,
            Self::Waits | Self::Parks | Self::Leaves => SwitchOut::Polls,
        }
    }

    /// Whether a thread that waits so is, or was until now, a worker: what it held has blocked it.
    #[inline(always)]
    pub fn is_workers(self) -> bool {
        matches!(self, Self::Parks | Self::Unclear)
    }
}

/// What comes of a poll that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// A poll inside a poll is part of it.
    Nested,
    /// It ends what ran before.
    Step(EndedStep),
}

impl Worker {
    #[inline(always)]
    pub fn polls(&self, clock: &LoopClock) -> bool {
        clock.step_flags & STEP_PROBED != 0
    }

    /// Call [`LoopClock::begin_step`] with [`STEP_PROBED`] after sending what ended, if it has an end.
    #[inline(always)]
    pub fn poll_begins(&mut self, clock: &mut LoopClock, now: u64, poll: Poll) -> Begun {
        if self.polls(clock) && poll.sp < self.poll_sp {
            return Begun::Nested;
        }
        if !clock.in_tick() {
            clock.begin_tick(now);
        }
        clock.parked = 0;
        self.flags = self.flags & !(WORKER_AWAY | WORKER_POLL_WITHOUT_END) | WORKER_POLLED;
        if !poll.has_end {
            self.flags |= WORKER_POLL_WITHOUT_END;
        }
        let ended = clock.end_step(now);
        self.woke = [0; 4];
        self.poll_sp = poll.sp;
        self.task_id = poll.task_id;
        self.task_type = poll.task_type;
        Begun::Step(ended)
    }

    /// The place behind a poll's call is reached with this stack pointer: does the running poll end?
    #[inline(always)]
    pub fn is_poll_end(&self, clock: &LoopClock, sp: u64) -> bool {
        // The return address is gone from the stack.
        self.polls(clock) && sp == self.poll_sp + 8
    }

    /// A task of the blocking pool begins on this thread.
    #[inline(always)]
    pub fn leaves(&mut self, clock: &mut LoopClock) {
        self.flags = (self.flags & !(WORKER_HOLDS_STEP | WORKER_JUST_POLLED | WORKER_POLL_WITHOUT_END)) | WORKER_AWAY;
        clock.parked = 0;
        clock.leave();
    }

    /// The thread parks, in epoll or on its futex. What it held must have been released.
    #[inline(always)]
    pub fn parks(&mut self, clock: &mut LoopClock) {
        clock.parked = 1;
        self.flags = self.flags & !(WORKER_JUST_POLLED | WORKER_POLL_WITHOUT_END | WORKER_AWAY) | WORKER_PARKED;
    }

    #[inline(always)]
    pub fn futex_waits(&mut self, clock: &LoopClock, wait: FutexWait) -> FutexMeaning {
        if self.flags & WORKER_AWAY != 0 {
            return FutexMeaning::Leaves;
        }
        let is_park = wait.address == self.park_futex && wait.sp == self.park_sp;
        if wait.marked && self.flags & WORKER_POLLED != 0 {
            if self.polls(clock) {
                return FutexMeaning::Waits;
            }
            if self.flags & WORKER_POLL_WITHOUT_END != 0 {
                return self.unclear(wait);
            }
            if wait.expected == LOCK_CONTENDED && !wait.has_timeout && !is_park {
                return FutexMeaning::Locks;
            }
            if wait.address == self.park_futex && !wait.has_timeout && !is_park {
                // parking_lot waits for everything on one futex a thread. Where the thread stands tells locks from
                // parks, and which of the two places is the park's shows in that it comes again.
                self.park_sp = wait.sp;
                return FutexMeaning::Locks;
            }
            self.seen_idle += 1;
            // Only an idle thread of the blocking pool gives up after a while.
            if wait.has_timeout && !is_park {
                self.pool_sp = wait.sp;
                self.pool_futex = wait.address;
                return FutexMeaning::Leaves;
            }
            self.park_sp = wait.sp;
            self.park_futex = wait.address;
            return FutexMeaning::Parks;
        }
        if !wait.marked {
            self.flags &= !WORKER_POLLED;
        }
        if is_park {
            FutexMeaning::Parks
        } else if wait.address == self.pool_futex && wait.sp == self.pool_sp {
            FutexMeaning::Leaves
        } else if self.knows_park() && wait.address != self.park_futex && !wait.has_timeout {
            FutexMeaning::Waits
        } else {
            self.unclear(wait)
        }
    }

    #[inline(always)]
    fn unclear(&self, wait: FutexWait) -> FutexMeaning {
        if wait.has_timeout || self.knows_park() && wait.sp != self.park_sp {
            FutexMeaning::MayLeave
        } else {
            FutexMeaning::Unclear
        }
    }

    /// Whether the thread was ever seen to park on a futex.
    #[inline(always)]
    pub fn knows_park(&self) -> bool {
        self.park_futex != 0
    }
}

/// A thread of the blocking pool has begun a task; when it then polls, the task was to be a worker.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolTask {
    pub since_ns: u64,
    pub is_worker: u64,
}

/// Where polls of a process return to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReturnPlace {
    pub address: u64,
    pub tgid: u32,
    pub _pad: u32,
}

/// It was reported.
pub const PLACE_REPORTED: u32 = 1;
/// A probe is there.
pub const PLACE_MARKED: u32 = 2;
/// Polls return to it that do not directly follow another one: it is not where the worker takes a task from its own
/// slot for what the last poll woke or spawned.
pub const PLACE_OF_FIRST_POLLS: u32 = 4;

/// What a probe on a poll function knows of it, as the word it is attached with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollCookie {
    pub task_type: u16,
    /// From a task's header to its id, in bytes.
    pub id_offset: u16,
    /// How far the stack pointer is below the return address, in bytes.
    pub stack_down: u16,
}

impl PollCookie {
    #[inline(always)]
    pub fn word(self) -> u64 {
        self.task_type as u64 | (self.id_offset as u64) << 16 | (self.stack_down as u64) << 32
    }

    #[inline(always)]
    pub fn of(word: u64) -> Self {
        Self { task_type: word as u16, id_offset: (word >> 16) as u16, stack_down: (word >> 32) as u16 }
    }
}

#[cfg(feature = "user")]
// SAFETY: plain integers without padding bytes.
unsafe impl aya::Pod for Worker {}
#[cfg(feature = "user")]
// SAFETY: as above.
unsafe impl aya::Pod for ReturnPlace {}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const START: u64 = 1000 * MS;

    /// A worker's story, one edge a line: `time_ms what`. What comes out: one line for each step and each futex wait.
    fn check(story: &str, expected: &[&str]) {
        let (mut clock, mut worker, mut marked) = (LoopClock::idle(), Worker::default(), true);
        let mut told: Vec<String> = Vec::new();
        let tell = |ended: EndedStep, task: &str, told: &mut Vec<String>| {
            if ended.duration_ns() > 0 {
                told.push(format!("{}..{} {task}", (ended.start_ns - START) / MS, (ended.end_ns - START) / MS));
            }
        };
        for line in story.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let now = START + words[0].parse::<u64>().unwrap() * MS;
            let number = |at: usize| words[at].parse::<u64>().unwrap();
            let running = if worker.polls(&clock) { format!("task {}", worker.task_id) } else { "-".to_owned() };
            match words[1] {
                "unmarked" => marked = false,
                "marked" => marked = true,
                "runs" => {
                    if let Some(waited) = clock.unclear_sleep_ns(now) {
                        told.push(format!("unclear for {}", waited / MS));
                    }
                    clock.switch_in(now);
                }
                "poll" | "poll-without-end" => {
                    let has_end = words[1] == "poll";
                    let poll = Poll { sp: number(3), task_id: number(2), task_type: 0, has_end };
                    if let Begun::Step(ended) = worker.poll_begins(&mut clock, now, poll) {
                        tell(ended, &running, &mut told);
                        clock.begin_step(now, if has_end { STEP_PROBED } else { 0 });
                    }
                }
                "end" => {
                    if worker.is_poll_end(&clock, number(2)) {
                        tell(clock.end_step(now), &running, &mut told);
                        clock.begin_step(now, 0);
                    }
                }
                "blocking-task" => worker.leaves(&mut clock),
                "futex" => {
                    let wait = FutexWait {
                        address: number(2),
                        sp: number(3),
                        expected: if words.get(4) == Some(&"lock") { LOCK_CONTENDED } else { 0 },
                        has_timeout: words.get(4) == Some(&"timeout"),
                        marked,
                    };
                    let meaning = worker.futex_waits(&clock, wait);
                    told.push(format!("{meaning:?}"));
                    match meaning {
                        FutexMeaning::Waits => {
                            clock.switch_out(now, SwitchOut::Waits { syscall: 202, arg0: 1, gil: false });
                        }
                        FutexMeaning::Parks | FutexMeaning::Unclear | FutexMeaning::MayLeave | FutexMeaning::Locks => {
                            if clock.in_tick() {
                                tell(clock.end_step(now), &running, &mut told);
                                clock.end_tick(now);
                                clock.switch_out(now, meaning.switch_out());
                            }
                            if meaning.is_workers() {
                                worker.parks(&mut clock);
                            }
                        }
                        FutexMeaning::Leaves => worker.leaves(&mut clock),
                    }
                }
                other => panic!("{other}"),
            }
        }
        assert_eq!(told, expected);
    }

    #[test]
    fn a_poll_lasts_from_its_call_to_its_return() {
        check(
            "10 runs\n 11 poll 7 1000\n 31 end 1008\n 33 poll 8 1000\n 40 end 1008\n 41 futex 500 900",
            &["10..11 -", "11..31 task 7", "31..33 -", "33..40 task 8", "Parks", "40..41 -"],
        );
    }

    #[test]
    fn a_wait_inside_a_poll_blocks_and_a_park_does_not() {
        check(
            "10 runs\n 11 poll 7 1000\n 12 futex 500 900\n 52 runs\n 53 end 1008\n 54 futex 500 900\n 99 runs",
            &["10..11 -", "Waits", "11..53 task 7", "Parks", "53..54 -"],
        );
    }

    #[test]
    fn other_code_that_passes_by_the_end_ends_nothing() {
        // A nested poll is part of the outer one; only the outer one's own return ends it.
        check(
            "10 runs\n 10 poll 7 1000\n 12 end 2000\n 13 poll 9 800\n 14 end 808\n 20 end 1008\n 21 end 1008",
            &["10..20 task 7"],
        );
    }

    #[test]
    fn a_poll_whose_end_was_missed_ends_with_the_next() {
        check("10 runs\n 10 poll 7 1000\n 30 poll 8 1000\n 31 end 1008", &["10..30 task 7", "30..31 task 8"]);
    }

    #[test]
    fn a_worker_that_gave_itself_away_is_nobodys() {
        // Idle in the blocking pool, then a task of it, then a worker again.
        check(
            "10 runs\n 10 poll 7 1000\n 40 end 1008\n 40 futex 600 700 timeout\n 50 runs\n 80 futex 900 100\n\
             90 poll 8 1000\n 95 end 1008",
            &["10..40 task 7", "Leaves", "Leaves", "90..95 task 8"],
        );
        check(
            "10 runs\n 10 poll 7 1000\n 40 end 1008\n 40 blocking-task\n 80 futex 900 100\n 90 runs",
            &["10..40 task 7", "Leaves"],
        );
    }

    #[test]
    fn a_lock_between_polls_is_no_park() {
        // The pool's, on the way back to it: what the poll held is not released, and where it waits is not remembered.
        check(
            "10 runs\n 10 poll 7 1000\n 40 end 1008\n 41 futex 500 900 lock\n 42 runs\n 43 futex 600 700 timeout\n\
             50 runs\n 51 unmarked\n 51 futex 500 900\n 52 runs",
            &["10..40 task 7", "Locks", "40..41 -", "unclear for 1", "Leaves", "Leaves"],
        );
        // A lock that is waited for inside a poll blocks; a park whose count is by chance the lock's value is known.
        check("10 runs\n 10 poll 7 1000\n 11 futex 500 900 lock\n 30 runs\n 31 end 1008", &["Waits", "10..31 task 7"]);
        check(
            "10 runs\n 10 poll 7 1000\n 20 end 1008\n 20 futex 500 900\n 30 runs\n 30 futex 500 900 lock",
            &["10..20 task 7", "Parks", "Parks"],
        );
        // parking_lot's lock, on the futex of the park but from another place. The park is known again by the second.
        check(
            "10 runs\n 10 poll 7 1000\n 20 end 1008\n 20 futex 500 900\n 30 runs\n 30 futex 500 800\n 31 runs\n\
             31 futex 500 900\n 32 runs\n 32 futex 500 900",
            &["10..20 task 7", "Parks", "Locks", "unclear for 1", "Locks", "unclear for 1", "Parks"],
        );
    }

    #[test]
    fn without_marks_the_park_is_told_by_where_it_was() {
        let learned = "10 runs\n 11 poll 7 1000\n 12 end 1008\n 13 futex 500 900\n 20 unmarked\n";
        let expected = |more: &[&'static str]| [&["10..11 -", "11..12 task 7", "Parks", "12..13 -"][..], more].concat();
        check(&format!("{learned} 20 runs\n 25 futex 500 900"), &expected(&["Parks", "20..25 -"]));
        check(&format!("{learned} 20 runs\n 25 futex 123 800"), &expected(&["Waits"]));
        // parking_lot waits for everything on one futex a thread.
        check(&format!("{learned} 20 runs\n 25 futex 500 800"), &expected(&["MayLeave", "20..25 -"]));
        check(&format!("{learned} 20 runs\n 25 futex 123 800 timeout"), &expected(&["MayLeave", "20..25 -"]));
        check("1 unmarked\n 10 runs\n 20 futex 500 900", &["Unclear", "10..20 -"]);
        // Where the pool's threads wait is remembered as well.
        check(
            &format!(
                "{learned} 20 marked\n 20 runs\n 25 poll 8 1000\n 26 end 1008\n 26 futex 123 800 timeout\n\
                      27 runs\n 27 poll 9 1000\n 28 end 1008\n 28 unmarked\n 29 futex 123 800 timeout"
            ),
            &expected(&["20..25 -", "25..26 task 8", "Leaves", "27..28 task 9", "Leaves"]),
        );
        check("10 runs\n 11 poll-without-end 7 1000\n 20 futex 500 900", &["10..11 -", "Unclear", "11..20 -"]);
        // Not even whether it parked then is known: the poll may go on.
        check(
            "10 runs\n 11 poll-without-end 7 1000\n 20 futex 500 900 timeout\n 30 runs\n 31 futex 500 900",
            &["10..11 -", "MayLeave", "11..20 -", "unclear for 10", "Unclear", "30..31 -"],
        );
    }

    #[test]
    fn an_unclear_wait_is_measured() {
        let learned = "10 runs\n 11 poll 7 1000\n 12 end 1008\n 13 futex 500 900\n 20 unmarked\n";
        check(
            &format!("{learned} 20 runs\n 25 futex 500 800\n 85 runs\n 86 futex 500 900\n 90 runs"),
            &[
                "10..11 -",
                "11..12 task 7",
                "Parks",
                "12..13 -",
                "MayLeave",
                "20..25 -",
                "unclear for 60",
                "Parks",
                "85..86 -",
            ],
        );
    }

    #[test]
    fn a_poll_that_ran_before_polls_were_marked_teaches_no_park() {
        // It waits for something of its own; the park that is known stays.
        check(
            "10 runs\n 11 poll 7 1000\n 12 end 1008\n 13 futex 500 900\n 20 unmarked\n 20 runs\n 21 futex 500 900\n\
             30 runs\n 31 marked\n 32 futex 123 800\n 52 runs\n 53 poll 8 1000\n 54 end 1008\n 55 futex 500 900",
            &[
                "10..11 -",
                "11..12 task 7",
                "Parks",
                "12..13 -",
                "Parks",
                "20..21 -",
                "Waits",
                "30..53 -",
                "53..54 task 8",
                "Parks",
                "54..55 -",
            ],
        );
    }

    #[test]
    fn cookies_hold_what_they_are_given() {
        let cookie = PollCookie { task_type: 513, id_offset: 48, stack_down: 65535 };
        assert_eq!(PollCookie::of(cookie.word()), cookie);
    }
}
