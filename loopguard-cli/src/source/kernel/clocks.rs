//! The loop threads' clocks, read where the kernel programs keep them: each of many loops is looked at many times a
//! second, and a system call costs more than the look.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    ptr::NonNull,
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, Map, MapData};
use loopguard_common::clock::LoopClock;

/// One clock a slot.
pub struct Clocks {
    map: Array<MapData, LoopClock>,
    /// The same entries.
    mapped: NonNull<LoopClock>,
    count: usize,
}

// An array has its entries eight bytes apart at least, and one after the other (kernel/bpf/arraymap.c).
const _: () = assert!(size_of::<LoopClock>().is_multiple_of(8));

// SAFETY: the memory belongs to the kernel and is only read here; whoever has this may read it from anywhere.
unsafe impl Send for Clocks {}

impl Clocks {
    /// # Errors
    /// When the map cannot be mapped: it was not made for that (BPF_F_MMAPABLE).
    pub fn new(map: Map) -> Result<Self> {
        let Map::Array(data) = &map else { bail!("the clocks are in no array") };
        let fd = data.fd().as_fd().as_raw_fd();
        let count = data.info()?.max_entries() as usize;
        // SAFETY: a new mapping wherever the kernel likes.
        let at = unsafe {
            let length = count * size_of::<LoopClock>();
            libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, fd, 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("map the clocks into memory");
        }
        let mapped = NonNull::new(at.cast()).context("the clocks were mapped to address 0")?;
        Ok(Self { map: map.try_into()?, mapped, count })
    }

    /// A copy. The thread may be at an edge at this very moment: its counter of steps, read again, tells.
    pub fn get(&self, slot: u32) -> Option<LoopClock> {
        let slot = slot as usize;
        // SAFETY: inside the mapping, which lives as long as this. Any bits are a clock; they may change meanwhile.
        (slot < self.count).then(|| unsafe { self.mapped.add(slot).read_volatile() })
    }

    pub fn set(&mut self, slot: u32, clock: LoopClock) -> Result<()> {
        Ok(self.map.set(slot, clock, 0)?)
    }
}

impl Drop for Clocks {
    fn drop(&mut self) {
        // SAFETY: a mapping of ours, that nobody else knows.
        unsafe { libc::munmap(self.mapped.as_ptr().cast(), self.count * size_of::<LoopClock>()) };
    }
}
