//! Turns a process that runs CPython into named frames, requests and tasks, from outside and without stopping it.
//!
//! [`find`] locates the interpreter; [`Inspector`] resolves what the kernel programs captured in it. Nothing here
//! writes to the target, and nothing it reads is trusted.

mod code;
mod in_flight;
mod inspect;
mod object;
mod offsets;
mod probe;
mod request;
mod request_object;
mod task;

use std::fmt;
use std::io;
use std::sync::OnceLock;

use loopguard_common::layout::PyLayout;
use loopguard_common::records::AddressRange;
use loopguard_common::walk::PyThread;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::elf::{self, Image, Mapping, SymbolTable};
use super::memory::{Fault, ProcessMemory, RecordedMemory, Recorder, Source, TargetMemory};
use offsets::{ASYNCIO_OFFSETS_SIZE, AsyncioOffsets, BadOffsets, DEBUG_OFFSETS_SIZE, GIL_SIZE, Gil, Offsets};

pub use inspect::{Inspector, incomplete};
pub use probe::StepProbe;
pub use task::{NotTold, TaskFacts};

const MAX_INTERPRETERS: usize = 64;
/// Of all interpreters; Linux allows a machine as many unless it is told otherwise (`pid_max`).
const MAX_THREADS: usize = 32768;

/// Why a process's Python, if it has one, can't be read.
#[derive(Debug, Error)]
pub enum NotUsable {
    #[error("the process does not run CPython")]
    NotPython,
    #[error("CPython {version} can't be read: loopguard works on 3.11 to 3.15")]
    UnsupportedVersion { version: String },
    #[error("this is a free-threaded build of CPython (no GIL), which loopguard can't read yet; use the default build")]
    FreeThreaded,
    #[error("the interpreter's memory can't be read: {0}")]
    Unreadable(String),
    #[error("the process is gone")]
    Gone,
}

impl From<Fault> for NotUsable {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Gone => Self::Gone,
            fault => Self::Unreadable(fault.to_string()),
        }
    }
}

impl From<io::Error> for NotUsable {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Gone,
            _ if error.raw_os_error() == Some(libc::ESRCH) => Self::Gone,
            _ => Self::Unreadable(error.to_string()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What gave away the address of `_PyRuntime`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FoundBy {
    DynamicSymbol,
    Symbol,
    /// The section `.PyRuntime`.
    Section,
}

/// Addresses in the target that its ELF symbols tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Anchors {
    runtime: u64,
    dict_type: u64,
    cell_type: u64,
    str_type: u64,
    bytes_type: u64,
}

/// One live thread state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PyThreadInfo {
    /// The thread's id as the interpreter sees it: in the target's own pid namespace.
    pub native_thread_id: u64,
    /// Address of its `PyThreadState`.
    pub state: u64,
    /// Address of its `PyInterpreterState`.
    pub interpreter: u64,
}

impl PyThreadInfo {
    /// As the frame walker wants it.
    pub fn walked(&self) -> PyThread {
        PyThread { state: self.state, native_thread_id: self.native_thread_id }
    }
}

/// The CPython of one process: how to read it.
#[derive(Debug)]
pub struct Interpreter {
    pub pid: u32,
    pub version: Version,
    pub found_by: FoundBy,
    memory: Source,
    anchors: Anchors,
    offsets: Offsets,
    asyncio: OnceLock<AsyncioOffsets>,
    /// Where the kind bits are in a `str`'s state; see [`object`].
    str_shift: OnceLock<u32>,
    /// Address of the dict of running tasks by event loop; before 3.14.
    current_tasks: OnceLock<u64>,
    /// Address of the set of all tasks; before 3.14.
    all_tasks: OnceLock<u64>,
}

/// Locates the CPython interpreter of a process and checks that it can be read.
pub fn find(pid: u32) -> Result<Interpreter, NotUsable> {
    locate(pid, Source::Live(ProcessMemory { pid }.into()))
}

/// Like [`find`], and remembers everything that is read for [`Interpreter::image`].
pub fn find_recording(pid: u32) -> Result<Interpreter, NotUsable> {
    locate(pid, Source::Recording(Recorder::new(ProcessMemory { pid })))
}

/// An interpreter at one instant: enough to resolve again, elsewhere, what was resolved while it was recorded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemoryImage {
    pid: u32,
    version: Version,
    found_by: FoundBy,
    anchors: Anchors,
    asyncio: Option<AsyncioOffsets>,
    pub memory: RecordedMemory,
}

impl MemoryImage {
    /// The interpreter it was recorded from.
    pub fn interpreter(self) -> Result<Interpreter, NotUsable> {
        let interpreter =
            Interpreter::new(self.pid, (self.version, self.found_by), self.anchors, Source::Recorded(self.memory))?;
        if let Some(asyncio) = self.asyncio {
            let _ = interpreter.asyncio.set(asyncio);
        }
        Ok(interpreter)
    }
}

fn locate(pid: u32, memory: Source) -> Result<Interpreter, NotUsable> {
    let mappings = elf::mappings(pid)?;
    let mut refused = NotUsable::NotPython;
    for path in candidates(pid, &mappings) {
        let image = match Image::open(pid, &path, &mappings) {
            Ok(image) => image,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => continue,
            Err(error) => {
                refused = NotUsable::Unreadable(format!("{path}: {error}"));
                continue;
            }
        };
        let [runtime, dict_type, cell_type, str_type, bytes_type, version, initialize] = image.symbols([
            "_PyRuntime",
            "PyDict_Type",
            "PyCell_Type",
            "PyUnicode_Type",
            "PyBytes_Type",
            "Py_Version",
            "Py_Initialize",
        ]);
        let (runtime, found_by) = match (runtime, image.section(".PyRuntime")) {
            (Some(symbol), _) if symbol.table == SymbolTable::Dynamic => (symbol.address, FoundBy::DynamicSymbol),
            (Some(symbol), _) => (symbol.address, FoundBy::Symbol),
            (None, Some(section)) => (section.address, FoundBy::Section),
            (None, None) => {
                if initialize.is_some() {
                    refused = NotUsable::UnsupportedVersion { version: version_in_path(&path) };
                }
                continue;
            }
        };
        let head = memory.bytes(runtime, DEBUG_OFFSETS_SIZE)?;
        let hex = match (offsets::described_version(&head), version) {
            (Some(hex), _) => hex,
            // `Py_Version` is there from 3.11 on.
            (None, Some(version)) => memory.u64(version.address)?,
            (None, None) => return Err(NotUsable::UnsupportedVersion { version: version_in_path(&path) }),
        };
        let (major, minor, micro) = offsets::version_of_hex(hex);
        let version = Version { major, minor, micro };
        let (Some(dict_type), Some(cell_type), Some(str_type), Some(bytes_type)) =
            (dict_type, cell_type, str_type, bytes_type)
        else {
            return Err(NotUsable::Unreadable(format!("{path} has no symbols for the built-in types")));
        };
        let anchors = Anchors {
            runtime,
            dict_type: dict_type.address,
            cell_type: cell_type.address,
            str_type: str_type.address,
            bytes_type: bytes_type.address,
        };
        let interpreter = Interpreter::new(pid, (version, found_by), anchors, memory)?;
        interpreter.look_for_asyncio(&mappings);
        return Ok(interpreter);
    }
    Err(refused)
}

/// The mapped files that may hold an interpreter, the likeliest first.
fn candidates(pid: u32, mappings: &[Mapping]) -> Vec<String> {
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    let rank = |path: &str| {
        let name = path.rsplit('/').next().unwrap_or_default();
        if name.starts_with("libpython") && name.contains(".so") {
            Some(0)
        } else if exe.to_str() == Some(path) {
            Some(1)
        } else if name.starts_with("python") {
            Some(2)
        } else {
            None
        }
    };
    let mut found: Vec<(u32, &str)> =
        mappings.iter().filter_map(|mapping| Some((rank(&mapping.path)?, mapping.path.as_str()))).collect();
    found.sort_unstable();
    found.dedup();
    found.into_iter().map(|(_, path)| path.to_owned()).collect()
}

/// `3.10` of `/usr/lib/libpython3.10.so.1.0`.
fn version_in_path(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or_default();
    let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
    let version = digits[..end].trim_end_matches('.');
    let version = if version.is_empty() { "before 3.11" } else { version };
    version.to_owned()
}

impl Interpreter {
    fn new(
        pid: u32,
        (version, found_by): (Version, FoundBy),
        anchors: Anchors,
        memory: Source,
    ) -> Result<Self, NotUsable> {
        let head = memory.bytes(anchors.runtime, DEBUG_OFFSETS_SIZE)?;
        let unsupported = || NotUsable::UnsupportedVersion { version: version.to_string() };
        if version.major != 3 {
            return Err(unsupported());
        }
        let mut offsets = offsets::offsets(version.minor, &head).map_err(|bad| match bad {
            BadOffsets::Version => unsupported(),
            BadOffsets::FreeThreaded => NotUsable::FreeThreaded,
            BadOffsets::Nonsense => NotUsable::Unreadable(bad.to_string()),
        })?;
        offsets.layout.dict_type = anchors.dict_type;
        offsets.layout.cell_type = anchors.cell_type;
        Ok(Self {
            pid,
            version,
            found_by,
            memory,
            anchors,
            offsets,
            asyncio: OnceLock::new(),
            str_shift: OnceLock::new(),
            current_tasks: OnceLock::new(),
            all_tasks: OnceLock::new(),
        })
    }

    /// The same interpreter in a process that was forked from this one.
    ///
    /// # Errors
    /// When the process does not have it, or not any more.
    pub fn of_fork(&self, pid: u32) -> Result<Self, NotUsable> {
        let memory = Source::Live(ProcessMemory { pid }.into());
        let fork = Self::new(pid, (self.version, self.found_by), self.anchors, memory)?;
        if let Some(asyncio) = self.asyncio.get() {
            let _ = fork.asyncio.set(*asyncio);
        }
        Ok(fork)
    }

    /// What the kernel programs need to know; changes once, when [`refresh_asyncio`](Self::refresh_asyncio) succeeds.
    pub fn layout(&self) -> PyLayout {
        let mut layout = self.offsets.layout;
        if let Some(asyncio) = self.asyncio.get() {
            // Checked to fit when it was parsed.
            layout.ts_running_task = asyncio.running_task as u16;
        }
        layout
    }

    /// The target's memory, as a walk needs it.
    pub fn memory(&self) -> &Source {
        &self.memory
    }

    /// What was read so far; `None` unless it comes from [`find_recording`].
    pub fn image(&self) -> Option<MemoryImage> {
        let Source::Recording(recorder) = &self.memory else { return None };
        Some(MemoryImage {
            pid: self.pid,
            version: self.version,
            found_by: self.found_by,
            anchors: self.anchors,
            asyncio: self.asyncio.get().copied(),
            memory: recorder.recording(),
        })
    }

    /// Whether the running task can be read. From 3.14 on this needs the `_asyncio` extension, which may come in after
    /// loopguard attached.
    pub fn knows_asyncio(&self) -> bool {
        self.version.minor < 14 || self.asyncio.get().is_some()
    }

    /// Looks for the `_asyncio` extension again. `true`: it was found now, and [`layout`](Self::layout) has changed.
    pub fn refresh_asyncio(&self) -> bool {
        if self.knows_asyncio() || matches!(self.memory, Source::Recorded(_)) {
            return false;
        }
        elf::mappings(self.pid).is_ok_and(|mappings| self.look_for_asyncio(&mappings))
    }

    fn look_for_asyncio(&self, mappings: &[Mapping]) -> bool {
        if self.knows_asyncio() {
            return false;
        }
        let mut paths: Vec<String> = Vec::new();
        for mapping in mappings {
            let name = mapping.path.rsplit('/').next().unwrap_or_default();
            if name.starts_with("_asyncio.") && !paths.contains(&mapping.path) {
                paths.push(mapping.path.clone());
            }
        }
        // Built in.
        paths.extend(candidates(self.pid, mappings));
        paths.iter().any(|path| {
            let Ok(image) = Image::open(self.pid, path, mappings) else { return false };
            let Some(section) = image.section(".AsyncioDebug") else { return false };
            let mut bytes = [0; ASYNCIO_OFFSETS_SIZE];
            self.memory.read_exact(section.address, &mut bytes).is_ok()
                && AsyncioOffsets::parse(&bytes).is_some_and(|offsets| self.asyncio.set(offsets).is_ok())
        })
    }

    /// All thread states of all interpreters, bounded.
    ///
    /// The lists change while they are read: a thread that comes or goes meanwhile may be missing.
    pub fn threads(&self) -> Result<Vec<PyThreadInfo>, Fault> {
        let mut threads = Vec::new();
        self.find_thread(|thread| {
            threads.push(*thread);
            false
        })?;
        Ok(threads)
    }

    /// The state of the thread that the target knows by this id, with the same reservation.
    pub fn thread(&self, native_thread_id: u64) -> Result<Option<PyThreadInfo>, Fault> {
        self.find_thread(|thread| thread.native_thread_id == native_thread_id)
    }

    fn find_thread(&self, mut is_wanted: impl FnMut(&PyThreadInfo) -> bool) -> Result<Option<PyThreadInfo>, Fault> {
        let mut interpreter = self.memory.field(self.anchors.runtime, self.offsets.interpreters_head)?;
        let mut count = 0usize;
        for _ in 0..MAX_INTERPRETERS {
            if interpreter == 0 {
                break;
            }
            let mut state = self.memory.field(interpreter, self.offsets.threads_head)?;
            // A list that leads back into itself comes by the same state again, whichever that is.
            let mut earlier = 0;
            while state != 0 && state != earlier && count < MAX_THREADS {
                if count.is_power_of_two() {
                    earlier = state;
                }
                count += 1;
                let id = self.memory.field(state, self.offsets.layout.ts_native_thread_id);
                let next = self.memory.field(state, self.offsets.thread_next);
                let (Ok(native_thread_id), Ok(next)) = (id, next) else { break };
                let thread = PyThreadInfo { native_thread_id, state, interpreter };
                if is_wanted(&thread) {
                    return Ok(Some(thread));
                }
                state = next;
            }
            interpreter = self.memory.field(interpreter, self.offsets.interpreter_next)?;
        }
        Ok(None)
    }

    /// The address ranges in which a thread sleeps that waits for the GIL of this interpreter: its
    /// `struct _gil_runtime_state` (`pycore_gil.h`) and nothing else. The second range is empty, and both are when the
    /// interpreter can't be read.
    pub fn gil_ranges(&self, interpreter: u64) -> [AddressRange; 2] {
        let start = match self.offsets.gil {
            Gil::InRuntime(offset) => Some(self.anchors.runtime + offset),
            Gil::Behind(offset) => self.memory.field(interpreter, offset).ok().filter(|&gil| gil != 0),
        };
        let range = start.map(|start| AddressRange { start, end: start.saturating_add(GIL_SIZE) });
        [range.unwrap_or_default(), AddressRange::default()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_python_says_so() {
        assert!(matches!(find(std::process::id()), Err(NotUsable::NotPython)));
        assert!(matches!(find(u32::MAX >> 2), Err(NotUsable::Gone)));
    }

    #[test]
    fn versions_in_paths() {
        for (path, version) in [
            ("/usr/lib/x86_64-linux-gnu/libpython3.10.so.1.0", "3.10"),
            ("/opt/py2/bin/python2.7", "2.7"),
            ("/usr/bin/python", "before 3.11"),
        ] {
            assert_eq!(version_in_path(path), version);
        }
    }
}
