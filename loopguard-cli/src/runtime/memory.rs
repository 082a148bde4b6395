//! Turns addresses of another process into bytes: live, while recording, or from a recording.
//!
//! Everything read is the target's own: it may change between two reads and may be hostile. Reads are exact (all bytes
//! or a [`Fault`]), bounded, and never stop the target.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Mutex, MutexGuard};

use loopguard_common::walk::Memory;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// The most one read may ask for; nothing an interpreter keeps in one piece and loopguard looks at is larger.
pub const MAX_READ: usize = 1 << 20;

/// Why something in the target could not be read.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Fault {
    #[error("the process is gone")]
    Gone,
    #[error("no permission to read the process's memory (run as root, or with CAP_SYS_PTRACE)")]
    Denied,
    #[error("the process has no {length} readable bytes at {address:#x}")]
    Unmapped { address: u64, length: usize },
    #[error("what stands at {address:#x} is not {expected}")]
    Unexpected { address: u64, expected: &'static str },
}

/// Exact reads of a target's memory, with the reason when one fails.
pub trait TargetMemory: Memory {
    /// Fills `to` from `address`.
    fn read_exact(&self, address: u64, to: &mut [u8]) -> Result<(), Fault>;

    /// `length` bytes at `address`, at most [`MAX_READ`].
    fn bytes(&self, address: u64, length: usize) -> Result<Vec<u8>, Fault> {
        if length > MAX_READ {
            return Err(Fault::Unmapped { address, length });
        }
        let mut bytes = vec![0; length];
        self.read_exact(address, &mut bytes)?;
        Ok(bytes)
    }

    fn u64(&self, address: u64) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.read_exact(address, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// The word at `offset` of the struct at `base`.
    fn field(&self, base: u64, offset: impl Into<u64>) -> Result<u64, Fault> {
        self.u64(base.wrapping_add(offset.into()))
    }

    fn u32(&self, address: u64) -> Result<u32, Fault> {
        let mut bytes = [0; 4];
        self.read_exact(address, &mut bytes)?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn u8(&self, address: u64) -> Result<u8, Fault> {
        let mut bytes = [0; 1];
        self.read_exact(address, &mut bytes)?;
        Ok(bytes[0])
    }

    /// `count` machine words at `address`.
    fn words(&self, address: u64, count: usize) -> Result<Vec<u64>, Fault> {
        let bytes = self.bytes(address, count.saturating_mul(8))?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect())
    }

    /// The NUL-terminated string at `address`, UTF-8-repaired, cut at `limit` bytes.
    fn c_string(&self, address: u64, limit: usize) -> Result<String, Fault> {
        const PIECE: usize = 64;
        let mut text = Vec::new();
        let mut at = address;
        while text.len() < limit {
            // Short pieces that do not cross a page: what follows the string may not be there.
            let mut piece = [0; PIECE];
            let piece = &mut piece[..(PIECE - at as usize % PIECE).min(limit - text.len())];
            self.read_exact(at, piece)?;
            let end = piece.iter().position(|&byte| byte == 0);
            text.extend_from_slice(&piece[..end.unwrap_or(piece.len())]);
            if end.is_some() {
                break;
            }
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(String::from_utf8(text).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }
}

/// The memory of a live process, by `process_vm_readv(2)`: needs ptrace access to it, and stops nothing.
#[derive(Clone, Copy, Debug)]
pub struct ProcessMemory {
    pub pid: u32,
}

impl ProcessMemory {
    /// Fills `to` with parts of pages; returns how many bytes were read before one that can't be.
    fn read_parts(&self, parts: &[(u64, Part)], to: &mut [u8]) -> usize {
        debug_assert_eq!(to.len(), parts.iter().map(|(_, part)| part.len()).sum::<usize>());
        let local = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
        let remote = |&(page, part): &(u64, Part)| libc::iovec {
            iov_base: (page + part.start as u64) as *mut libc::c_void,
            iov_len: part.len(),
        };
        let remote: Vec<libc::iovec> = parts.iter().map(remote).collect();
        // SAFETY: `local` describes `to`; the others are only addresses to the kernel.
        let got = unsafe {
            libc::process_vm_readv(self.pid as libc::pid_t, &local, 1, remote.as_ptr(), remote.len() as u64, 0)
        };
        usize::try_from(got).unwrap_or_default()
    }

    /// What there is from `address` on, at most `length` bytes.
    pub fn bytes_up_to(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        // SAFETY: `bytes` is valid for writing its length.
        let got = unsafe { read_process(self.pid, address, bytes.as_mut_ptr(), length) };
        bytes.truncate(usize::try_from(got).unwrap_or_default());
        bytes
    }
}

impl TargetMemory for ProcessMemory {
    fn read_exact(&self, address: u64, to: &mut [u8]) -> Result<(), Fault> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` is valid for writing its length.
        let got = unsafe { read_process(self.pid, address, to.as_mut_ptr(), to.len()) };
        if got == to.len() as isize {
            return Ok(());
        }
        if got < 0 {
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::ESRCH) => return Err(Fault::Gone),
                Some(libc::EPERM) => return Err(Fault::Denied),
                _ => {}
            }
        }
        Err(Fault::Unmapped { address, length: to.len() })
    }
}

impl Memory for ProcessMemory {
    unsafe fn read_raw(&self, address: u64, to: *mut u8, length: usize) -> bool {
        // SAFETY: the caller's promise.
        unsafe { read_process(self.pid, address, to, length) == length as isize }
    }
}

/// # Safety
/// `to` must be valid for writing `length` bytes.
unsafe fn read_process(pid: u32, address: u64, to: *mut u8, length: usize) -> isize {
    let local = libc::iovec { iov_base: to.cast(), iov_len: length };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: length };
    // SAFETY: `local` describes memory of ours, by the caller's promise; `remote` is only an address to the kernel.
    unsafe { libc::process_vm_readv(pid as libc::pid_t, &local, 1, &remote, 1, 0) }
}

/// Bytes of a page: what is or isn't mapped as a whole.
const PAGE: usize = 4096;
/// Pages kept at a time.
const MAX_PAGES: usize = 256;
/// Room for so many is kept from one look to the next: few need more.
const ROOM_KEPT: usize = 64;
/// Reads from this size on are not worth keeping.
const LARGE_READ: usize = 4 * PAGE;

/// Parts of pages begin and end at a multiple of this, a line of the processor's cache.
const LINE: usize = 64;

/// The memory of a live process; during a [`Glance`] every page is read once.
///
/// One look follows hundreds of pointers, and most lead to a few pages: a system call for each of them costs far more
/// than the bytes.
#[derive(Debug)]
pub struct GlancedMemory {
    memory: ProcessMemory,
    kept: Mutex<KeptPages>,
}

/// The pages of one look, one after the other.
#[derive(Debug, Default)]
struct KeptPages {
    is_looking: bool,
    at: HashMap<u64, Kept>,
    /// What the next look reads takes the place of what the last one did.
    bytes: Vec<u8>,
    /// How many of them this look has filled.
    filled: usize,
    /// What the last look of each kind that comes again and again needed, by pages.
    usual: [Vec<(u64, Part)>; 2],
}

/// Looks that come again and again and lead to the same places, all of a kind.
#[derive(Clone, Copy, Debug)]
pub enum Usual {
    /// At what changes from one look to the next.
    Brief,
    /// At all there is.
    Thorough,
}

/// What was read of a page.
#[derive(Clone, Copy, Debug)]
struct Kept {
    /// Where it begins among the bytes.
    at: usize,
    read: Part,
    /// What this look needed of it.
    used: Part,
}

/// Bytes of a page, from and to; none where it ends before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    start: usize,
    end: usize,
}

impl Part {
    const NONE: Self = Self { start: PAGE, end: 0 };
    const PAGE: Self = Self { start: 0, end: PAGE };

    fn has(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Both, and what lies between.
    fn and(self, other: Self) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    fn len(self) -> usize {
        self.end.saturating_sub(self.start)
    }
}

impl KeptPages {
    fn bytes(&mut self, memory: &ProcessMemory, page: u64, part: Part) -> Result<&[u8], Fault> {
        let start = match self.at.get_mut(&page) {
            Some(kept) if kept.read.has(part) => {
                kept.used = kept.used.and(part);
                kept.at + part.start - kept.read.start
            }
            known => {
                // What was usual and is not enough grows: objects of a kind come and go in the same pages.
                let used = known.map_or(Part::NONE, |known| known.read).and(part);
                if self.at.len() >= MAX_PAGES {
                    self.clear();
                }
                let at = self.filled;
                memory.read_exact(page, self.room(PAGE))?;
                self.filled += PAGE;
                self.at.insert(page, Kept { at, read: Part::PAGE, used });
                at + part.start
            }
        };
        Ok(&self.bytes[start..start + part.len()])
    }

    /// Reads what the last look of the kind needed by one system call: most of it is where it was. Pages behind one that
    /// is gone are read when they are needed.
    fn read_usual(&mut self, memory: &ProcessMemory, kind: Usual) {
        let usual = std::mem::take(&mut self.usual[kind as usize]);
        let got = memory.read_parts(&usual, self.room(usual.iter().map(|(_, part)| part.len()).sum()));
        for &(page, part) in &usual {
            if self.filled + part.len() > got {
                break;
            }
            self.at.insert(page, Kept { at: self.filled, read: part, used: Part::NONE });
            self.filled += part.len();
        }
        self.usual[kind as usize] = usual;
    }

    /// Where the next bytes go.
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        let end = self.filled + bytes;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[self.filled..end]
    }

    fn remember_usual(&mut self, kind: Usual) {
        let usual = &mut self.usual[kind as usize];
        usual.clear();
        usual.extend(self.at.iter().filter(|(_, kept)| kept.used != Part::NONE).map(|(&page, kept)| {
            let Part { start, end } = kept.used;
            (page, Part { start: start / LINE * LINE, end: end.next_multiple_of(LINE) })
        }));
        usual.sort_unstable_by_key(|&(page, _)| page);
    }

    fn clear(&mut self) {
        self.at.clear();
        self.filled = 0;
    }

    /// Gives back what a look at more than usual needed.
    fn give_back(&mut self) {
        self.bytes.truncate(ROOM_KEPT * PAGE);
        self.bytes.shrink_to(ROOM_KEPT * PAGE);
    }

    /// Hands `length` bytes at `address` to `take`, in pieces, each with its place among them.
    fn read(
        &mut self,
        memory: &ProcessMemory,
        address: u64,
        length: usize,
        mut take: impl FnMut(usize, &[u8]),
    ) -> Result<(), Fault> {
        let mut done = 0;
        while done < length {
            let at = address.wrapping_add(done as u64);
            let offset = at as usize % PAGE;
            let piece = (length - done).min(PAGE - offset);
            let part = Part { start: offset, end: offset + piece };
            let bytes = self.bytes(memory, at - offset as u64, part).map_err(|fault| match fault {
                Fault::Unmapped { .. } => Fault::Unmapped { address, length },
                other => other,
            })?;
            take(done, bytes);
            done += piece;
        }
        Ok(())
    }
}

impl GlancedMemory {
    fn kept(&self) -> MutexGuard<'_, KeptPages> {
        self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl From<ProcessMemory> for GlancedMemory {
    fn from(memory: ProcessMemory) -> Self {
        Self { memory, kept: Mutex::default() }
    }
}

impl TargetMemory for GlancedMemory {
    fn read_exact(&self, address: u64, to: &mut [u8]) -> Result<(), Fault> {
        let mut kept = self.kept();
        if !kept.is_looking || to.len() >= LARGE_READ {
            return self.memory.read_exact(address, to);
        }
        kept.read(&self.memory, address, to.len(), |at, piece| to[at..at + piece.len()].copy_from_slice(piece))
    }
}

impl Memory for GlancedMemory {
    unsafe fn read_raw(&self, address: u64, to: *mut u8, length: usize) -> bool {
        let mut kept = self.kept();
        if !kept.is_looking || length >= LARGE_READ {
            // SAFETY: the caller's promise.
            return unsafe { self.memory.read_raw(address, to, length) };
        }
        let take = |at: usize, piece: &[u8]| {
            // SAFETY: pieces lie within `length`, and by the caller's promise `to` takes as many.
            unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), to.add(at), piece.len()) };
        };
        kept.read(&self.memory, address, length, take).is_ok()
    }
}

/// One look at a process: what it reads is of one instant or little later, and forgotten when this is dropped.
#[derive(Debug)]
pub struct Glance<'a> {
    /// `None`: within another glance, or there is nothing to read.
    memory: Option<&'a GlancedMemory>,
    usual: Option<Usual>,
}

impl Drop for Glance<'_> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory {
            let mut kept = memory.kept();
            kept.is_looking = false;
            if let Some(kind) = self.usual {
                kept.remember_usual(kind);
            }
            kept.clear();
            kept.give_back();
        }
    }
}

/// Hands reads on to another memory and remembers what came back.
#[derive(Debug)]
pub struct Recorder<M> {
    memory: M,
    seen: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl<M> Recorder<M> {
    pub fn new(memory: M) -> Self {
        Self { memory, seen: Mutex::default() }
    }

    /// All that was read so far.
    pub fn recording(&self) -> RecordedMemory {
        let seen = self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        RecordedMemory::from_pieces(seen.iter().map(|(&address, bytes)| (address, bytes.clone())))
    }

    fn remember(&self, address: u64, bytes: &[u8]) {
        let mut seen = self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let known = seen.entry(address).or_default();
        if known.len() <= bytes.len() {
            *known = bytes.to_vec();
        }
    }
}

impl<M: TargetMemory> TargetMemory for Recorder<M> {
    fn read_exact(&self, address: u64, to: &mut [u8]) -> Result<(), Fault> {
        self.memory.read_exact(address, to)?;
        self.remember(address, to);
        Ok(())
    }
}

impl<M: Memory> Memory for Recorder<M> {
    unsafe fn read_raw(&self, address: u64, to: *mut u8, length: usize) -> bool {
        // SAFETY: the caller's promise.
        if !unsafe { self.memory.read_raw(address, to, length) } {
            return false;
        }
        // SAFETY: just written, by a read that succeeded.
        self.remember(address, unsafe { std::slice::from_raw_parts(to, length) });
        true
    }
}

/// Pieces of a process's memory as they once were. On disk: a list of `[address, bytes]`, both in hexadecimal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordedMemory {
    /// Address of each, and where its bytes begin among all bytes; by address, neither overlapping nor touching.
    pieces: Vec<(u64, usize)>,
    bytes: Vec<u8>,
}

impl RecordedMemory {
    /// Joins pieces that overlap or touch; where they disagree, the one at the lower address wins.
    pub fn from_pieces(pieces: impl IntoIterator<Item = (u64, Vec<u8>)>) -> Self {
        let sorted: BTreeMap<u64, Vec<u8>> = pieces.into_iter().collect();
        let mut joined = Self::default();
        for (address, bytes) in sorted {
            let overlap = joined.pieces.last().and_then(|(last, at)| {
                let end = last + (joined.bytes.len() - at) as u64;
                end.checked_sub(address)
            });
            match overlap {
                Some(overlap) => joined.bytes.extend_from_slice(bytes.get(overlap as usize..).unwrap_or_default()),
                None => {
                    joined.pieces.push((address, joined.bytes.len()));
                    joined.bytes.extend_from_slice(&bytes);
                }
            }
        }
        joined
    }

    /// In the order of their addresses.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let ends = self.pieces.iter().skip(1).map(|(_, at)| *at).chain([self.bytes.len()]);
        self.pieces.iter().zip(ends).map(|((address, at), end)| (*address, &self.bytes[*at..end]))
    }

    /// All bytes it holds, one piece behind the other.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// The address of the `nth` byte it holds.
    pub fn address_of(&self, nth: usize) -> Option<u64> {
        let (address, at) = self.pieces[..self.pieces.partition_point(|(_, at)| *at <= nth)].last()?;
        (nth < self.bytes.len()).then(|| address + (nth - at) as u64)
    }

    /// Bytes it holds.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    fn find(&self, address: u64, length: usize) -> Option<&[u8]> {
        let next = self.pieces.partition_point(|(start, _)| *start <= address);
        let (start, at) = self.pieces[..next].last()?;
        let end = self.pieces.get(next).map_or(self.bytes.len(), |(_, at)| *at);
        let from = usize::try_from(address - start).ok()?;
        self.bytes[*at..end].get(from..from.checked_add(length)?)
    }
}

impl TargetMemory for RecordedMemory {
    fn read_exact(&self, address: u64, to: &mut [u8]) -> Result<(), Fault> {
        let bytes = self.find(address, to.len()).ok_or(Fault::Unmapped { address, length: to.len() })?;
        to.copy_from_slice(bytes);
        Ok(())
    }
}

impl Memory for RecordedMemory {
    unsafe fn read_raw(&self, address: u64, to: *mut u8, length: usize) -> bool {
        let Some(bytes) = self.find(address, length) else { return false };
        // SAFETY: `bytes` has `length` bytes, and `to` takes as many.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, length) };
        true
    }
}

impl Serialize for RecordedMemory {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.pieces().map(|(address, bytes)| {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            (format!("{address:x}"), hex)
        }))
    }
}

impl<'de> Deserialize<'de> for RecordedMemory {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let pieces = Vec::<(String, String)>::deserialize(from)?;
        let decoded: Option<Vec<(u64, Vec<u8>)>> = pieces
            .iter()
            .map(|(address, hex)| Some((u64::from_str_radix(address, 16).ok()?, decode_hex(hex.as_bytes())?)))
            .collect();
        Ok(Self::from_pieces(decoded.ok_or_else(|| serde::de::Error::custom("memory pieces are not hexadecimal"))?))
    }
}

fn decode_hex(hex: &[u8]) -> Option<Vec<u8>> {
    let (pairs, []) = hex.as_chunks::<2>() else { return None };
    pairs.iter().map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// Where an interpreter's memory comes from.
#[derive(Debug)]
pub enum Source {
    Live(GlancedMemory),
    Recording(Recorder<ProcessMemory>),
    Recorded(RecordedMemory),
}

impl Source {
    /// From now on each page is read once, until the glance is dropped. Inside another glance it is that one that counts.
    pub fn glance(&self) -> Glance<'_> {
        self.begin_glance(None)
    }

    /// A glance of a kind that comes again and again: what the last one needed is read beforehand, at once.
    pub fn usual_glance(&self, kind: Usual) -> Glance<'_> {
        self.begin_glance(Some(kind))
    }

    fn begin_glance(&self, usual: Option<Usual>) -> Glance<'_> {
        let Self::Live(memory) = self else { return Glance { memory: None, usual } };
        let mut kept = memory.kept();
        let is_outermost = !std::mem::replace(&mut kept.is_looking, true);
        if is_outermost && let Some(kind) = usual {
            kept.read_usual(&memory.memory, kind);
        }
        Glance { memory: is_outermost.then_some(memory), usual }
    }

    /// What is read from now on is read anew, within a glance too.
    pub fn look_again(&self) {
        if let Self::Live(memory) = self {
            memory.kept().clear();
        }
    }
}

impl TargetMemory for Source {
    fn read_exact(&self, address: u64, to: &mut [u8]) -> Result<(), Fault> {
        match self {
            Self::Live(memory) => memory.read_exact(address, to),
            Self::Recording(memory) => memory.read_exact(address, to),
            Self::Recorded(memory) => memory.read_exact(address, to),
        }
    }
}

impl Memory for Source {
    unsafe fn read_raw(&self, address: u64, to: *mut u8, length: usize) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Live(memory) => memory.read_raw(address, to, length),
                Self::Recording(memory) => memory.read_raw(address, to, length),
                Self::Recorded(memory) => memory.read_raw(address, to, length),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_of_this_process_are_exact_or_say_why_not() {
        let here = ProcessMemory { pid: std::process::id() };
        let text = *b"left\0right\xff\0";
        let address = text.as_ptr() as u64;
        assert_eq!(here.bytes(address, 4).unwrap(), b"left");
        assert_eq!(here.c_string(address, 100).unwrap(), "left");
        assert_eq!(here.c_string(address + 5, 100).unwrap(), "right\u{fffd}");
        assert_eq!(here.c_string(address, 2).unwrap(), "le");
        assert_eq!(here.u64(8), Err(Fault::Unmapped { address: 8, length: 8 }));
        assert_eq!(ProcessMemory { pid: u32::MAX >> 2 }.u64(address), Err(Fault::Gone));
    }

    #[test]
    fn a_glance_reads_every_page_once() {
        let source = Source::Live(ProcessMemory { pid: std::process::id() }.into());
        let mut bytes = vec![1u8; 3 * PAGE];
        let address = bytes.as_ptr() as u64;
        let read = |at: usize| source.bytes(address + at as u64, 16).unwrap();
        {
            let _glance = source.glance();
            let across = PAGE - address as usize % PAGE - 8;
            assert_eq!(read(across), [1; 16]);
            bytes[across..across + 16].fill(2);
            // As it was, in an inner glance and after it too.
            drop(source.glance());
            assert_eq!(read(across), [1; 16]);
            source.look_again();
            assert_eq!(read(across), [2; 16]);
            bytes.fill(3);
            assert_eq!(source.bytes(address, 2 * PAGE + 100).unwrap().len(), 2 * PAGE + 100);
            assert_eq!(source.u64(8), Err(Fault::Unmapped { address: 8, length: 8 }));
        }
        assert_eq!(read(0), [3; 16]);
    }

    #[test]
    fn a_usual_glance_reads_what_the_last_one_needed_beforehand() {
        let source = Source::Live(ProcessMemory { pid: std::process::id() }.into());
        let mut bytes = vec![1u8; 4 * PAGE];
        let address = bytes.as_ptr() as u64;
        let read = |at: usize| source.bytes(address + at as u64, 1).unwrap();
        {
            let _glance = source.usual_glance(Usual::Brief);
            assert_eq!((read(0), read(2 * PAGE)), (vec![1], vec![1]));
        }
        {
            // One of the other kind in between changes nothing.
            let _glance = source.usual_glance(Usual::Thorough);
            assert_eq!(read(3 * PAGE), [1]);
        }
        bytes.fill(2);
        {
            let _glance = source.usual_glance(Usual::Brief);
            bytes.fill(3);
            // As it was when the glance began, but for what the last one did not need.
            assert_eq!((read(0), read(3 * PAGE), read(2 * PAGE)), (vec![2], vec![3], vec![2]));
            // Nor was more read of a page than that.
            assert_eq!((read(PAGE / 2), read(2 * PAGE)), (vec![3], vec![2]));
        }
        {
            let _glance = source.glance();
            bytes.fill(4);
            assert_eq!(read(0), [4]);
        }
    }

    #[test]
    fn a_glance_at_much_keeps_little_room() {
        let memory = GlancedMemory::from(ProcessMemory { pid: std::process::id() });
        let source = Source::Live(memory);
        let bytes = vec![1u8; 3 * ROOM_KEPT * PAGE];
        {
            let _glance = source.glance();
            for at in (0..bytes.len()).step_by(PAGE) {
                assert_eq!(source.bytes(bytes.as_ptr() as u64 + at as u64, 1).unwrap(), [1]);
            }
        }
        let Source::Live(memory) = &source else { panic!("it is live") };
        assert!(memory.kept().bytes.capacity() <= ROOM_KEPT * PAGE);
    }

    #[test]
    fn pages_are_read_up_to_one_that_is_gone() {
        let here = ProcessMemory { pid: std::process::id() };
        let bytes = vec![7u8; 3 * PAGE];
        let page = (bytes.as_ptr() as u64).next_multiple_of(PAGE as u64);
        let (part, mut to) = (Part { start: 64, end: 192 }, vec![0; 2 * PAGE + 128]);
        assert_eq!(here.read_parts(&[(page, part), (0, Part::PAGE), (page + PAGE as u64, Part::PAGE)], &mut to), 128);
        assert_eq!(to[..128], [7; 128]);
        assert_eq!(here.bytes_up_to(page, 100), [7; 100]);
        assert!(here.bytes_up_to(8, 100).is_empty());
    }

    #[test]
    fn what_is_usual_of_a_page_grows_by_what_it_lacked() {
        let source = Source::Live(ProcessMemory { pid: std::process::id() }.into());
        let mut bytes = vec![1u8; 3 * PAGE];
        let start = (bytes.as_ptr() as u64).next_multiple_of(PAGE as u64);
        let read = |at: usize| source.bytes(start + at as u64, 4).unwrap();
        for at in [100, 1000, 2000] {
            let _glance = source.usual_glance(Usual::Brief);
            assert_eq!(read(at), [1; 4]);
        }
        let _glance = source.usual_glance(Usual::Brief);
        bytes.fill(2);
        // All that the looks before needed, and what lies between.
        assert_eq!((read(64), read(2044), read(60)), (vec![1; 4], vec![1; 4], vec![2; 4]));
    }

    #[test]
    fn a_recording_answers_what_was_read_and_nothing_else() {
        let bytes: Vec<u8> = (0..64).collect();
        let address = bytes.as_ptr() as u64;
        let recorder = Recorder::new(ProcessMemory { pid: std::process::id() });
        recorder.bytes(address + 8, 8).unwrap();
        recorder.bytes(address + 12, 20).unwrap();
        recorder.bytes(address + 40, 4).unwrap();
        let json = serde_json::to_string(&recorder.recording()).unwrap();
        let replay: RecordedMemory = serde_json::from_str(&json).unwrap();
        assert_eq!(replay.size(), 28);
        assert_eq!(replay.bytes(address + 8, 24).unwrap(), bytes[8..32]);
        assert_eq!(replay.bytes(address + 41, 3).unwrap(), bytes[41..44]);
        for (offset, length) in [(0, 1), (7, 2), (31, 2), (44, 1)] {
            assert!(replay.bytes(address + offset, length).is_err());
        }
    }

    #[test]
    fn a_broken_recording_is_an_error() {
        for json in [r#"[["zz","00"]]"#, r#"[["10","0"]]"#, r#"[["10","0g"]]"#] {
            assert!(serde_json::from_str::<RecordedMemory>(json).is_err());
        }
    }
}
