//! Says what a wait waits on: a peer, a file, a child, or whoever has the lock.

use loopguard_common::records::{CaptureRecord, HOLDER_FRAMES, RawFrame};

use super::Live;
use crate::{
    core::event::{Frame, Origin, Tid},
    runtime::memory::{ProcessMemory, TargetMemory as _},
    source::{process, syscall},
};

impl Live {
    /// What the system says of the first argument of the call, as long as the wait lasts.
    pub(super) fn waits_on(&self, record: &CaptureRecord) -> Option<String> {
        let pid = record.header.tgid;
        match syscall::first_argument(record.syscall) {
            syscall::FirstArgument::Descriptor => process::descriptor(pid, record.arg0 as i32),
            syscall::FirstArgument::PollArray => {
                // struct pollfd: the descriptor comes first (poll.h).
                let fd = ProcessMemory { pid }.u32(record.arg0).ok()?;
                process::descriptor(pid, fd as i32)
            }
            syscall::FirstArgument::Child => {
                // 0 and negative numbers mean groups, or any child.
                let wanted = u32::try_from(record.arg0 as i32).ok().filter(|&pid| pid > 0);
                process::children(pid, wanted)
            }
            syscall::FirstArgument::Other => None,
        }
    }

    /// Who had what a futex stands for when the wait for it began: the kernel looked then.
    pub(super) fn futex_owner(&mut self, record: &CaptureRecord) -> Option<String> {
        let pid = record.header.tgid;
        if record.holder.native_thread_id != 0 {
            return self.gil_holder(pid, record);
        }
        let known = mutex_owner(&record.futex).and_then(|owner| process::tid_of_innermost(pid, owner.into()));
        // Semaphores, Python's locks and Rust's keep no owner.
        let Some(tid) = known else {
            return Some(format!("lock or condition at {:#x}, owner not recorded", record.arg0));
        };
        Some(format!("mutex held by thread {} (tid {tid})", process::thread_name(pid, tid)))
    }

    fn gil_holder(&mut self, pid: u32, record: &CaptureRecord) -> Option<String> {
        let holder = &record.holder;
        let tid = process::tid_of_innermost(pid, holder.native_thread_id)?;
        let mut text = format!("GIL held by thread {} (tid {tid})", process::thread_name(pid, tid));
        let frames: &[RawFrame] = &holder.frames[..(holder.frame_count as usize).min(HOLDER_FRAMES)];
        let python = self.targets.get_mut(&pid)?.python.as_mut()?;
        let runs = python.inspector.runs(frames);
        let frames: Vec<&Frame> = runs.iter().flat_map(|run| run.frames.iter().map(|frame| &**frame)).collect();
        let users = frames.iter().find(|frame| frame.origin == Origin::User);
        if let Some(frame) = users.or(frames.first())
            && let (Some(file), Some(line)) = (&frame.file, frame.line)
        {
            let name = file.rsplit('/').next().unwrap_or(file);
            text += &format!(" at {name}:{line} {}", frame.function);
        }
        Some(text)
    }
}

/// glibc's `pthread_mutex_t` (struct_mutex.h): lock, count, owner, users, kind, all of four bytes. Nothing else that
/// waits on a futex looks like one that is locked and waited for.
fn mutex_owner(words: &[u64]) -> Option<Tid> {
    /// `FUTEX_WAITERS` and `FUTEX_TID_MASK`, for mutexes that inherit priority (linux/futex.h).
    const WAITERS: u32 = 0x8000_0000;
    const TID_MASK: u32 = 0x3fff_ffff;
    /// `PTHREAD_MUTEX_KIND_MASK_NP`.
    const KIND_MASK: u32 = 3;
    /// All flags that a kind can have (pthreadP.h).
    const KIND_FLAGS: u32 = 0x3f0;
    let [lock_count, owner_users, kind, ..] = *words else { return None };
    let (lock, owner, users, kind) = (lock_count as u32, owner_users as u32, (owner_users >> 32) as u32, kind as u32);
    let is_waited_for = lock == 2 || (lock & WAITERS != 0 && lock & TID_MASK == owner);
    (is_waited_for && owner != 0 && owner <= TID_MASK && users > 0 && kind & !(KIND_MASK | KIND_FLAGS) == 0)
        .then_some(owner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutexes_and_what_is_none() {
        let words = |lock: u32, owner: u32, users: u32, kind: u32| {
            [u64::from(lock), u64::from(owner) | u64::from(users) << 32, u64::from(kind)]
        };
        assert_eq!(mutex_owner(&words(2, 77, 1, 0)), Some(77));
        assert_eq!(mutex_owner(&words(2, 77, 1, 0x80 | 1)), Some(77));
        assert_eq!(mutex_owner(&words(0x8000_0000 | 77, 77, 1, 0x20)), Some(77));
        // Nobody waits, nobody owns it, a semaphore, a lock of Rust's, a condition.
        for words in [words(1, 77, 1, 0), words(2, 0, 0, 0), words(0, 1, 0, 0), words(2, 1, 0, 77), [0, 1 << 33, 5]] {
            assert_eq!(mutex_owner(&words), None);
        }
        assert_eq!(mutex_owner(&[]), None);
    }

    /// A locked mutex of the C library's, as it really is.
    #[test]
    fn a_real_mutex() {
        let mut mutex = libc::PTHREAD_MUTEX_INITIALIZER;
        // SAFETY: a mutex of our own, locked once; its first words are read while nobody else knows it.
        let words = unsafe {
            libc::pthread_mutex_lock(&raw mut mutex);
            // As it would be if somebody waited.
            (&raw mut mutex).cast::<u32>().write(2);
            (&raw const mutex).cast::<[u64; 3]>().read_unaligned()
        };
        // SAFETY: no arguments.
        assert_eq!(mutex_owner(&words), Some(unsafe { libc::gettid() } as u32));
    }
}
