//! Turns what the kernel copied of a thread's stack into named frames, Python's among them.
//!
//! [`space`] says which file an address is in ([`maps`], [`object`]), [`unwind`] follows the calls by what [`cfi`] reads (or [`leaf`]),
//! [`names`] names them and [`origin`] says whose they are ([`recent`] remembers both, [`shared`] what many
//! places have in common), [`join`] puts the Python frames in their place. All of it runs
//! on a thread of its own, behind [`naming`]; [`footprint`] keeps it small.

pub mod cfi;
mod footprint;
pub mod join;
#[cfg(target_arch = "x86_64")]
mod leaf;
mod maps;
mod names;
pub mod naming;
mod object;
mod origin;
mod recent;
mod shared;
mod space;
pub mod unwind;

use std::{collections::HashMap, fs, sync::Arc};

use crate::core::event::{Frame, Stack};
use cfi::{Row, Rows};
use join::{Ends, NativeCall, PythonRun, join};
use names::Names;
use object::{Object, Objects};
use space::{AddressSpace, NoPlace, Place};
use unwind::{Call, End, FindRow, Missing, StackCopy, unwind};

/// What is to be named.
#[derive(Clone, Debug, Default)]
pub struct RawStack {
    pub pid: u32,
    pub copy: StackCopy,
    /// The system call the thread is in.
    pub kernel: Option<Arc<Frame>>,
    pub python: Vec<PythonRun>,
    /// Why the outermost Python frames are missing, if they are.
    pub python_incomplete: Option<&'static str>,
}

/// A stack with names, and how many of its native calls have none.
#[derive(Clone, Debug, Default)]
pub struct NamedStack {
    pub stack: Stack,
    pub unnamed: u64,
    pub calls: Vec<Call>,
    pub end: Option<End>,
}

/// Unwinds and names the stacks of any number of processes. What it remembers is bounded, and shared between processes
/// that map the same files.
#[derive(Default)]
pub struct Stacks {
    processes: HashMap<u32, Process>,
    objects: Objects,
    rows: Rows,
    names: Names,
}

struct Process {
    space: AddressSpace,
    executable: String,
}

impl Process {
    fn new(pid: u32) -> Self {
        let executable = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let executable = executable.to_string_lossy();
        let executable = executable.strip_suffix(" (deleted)").unwrap_or(&executable).to_owned();
        Self { space: AddressSpace::new(pid), executable }
    }
}

impl Stacks {
    /// Reads what a process maps, and its executable's names, before they are needed.
    pub fn prepare(&mut self, pid: u32) {
        let process = self.processes.entry(pid).or_insert_with(|| Process::new(pid));
        process.space.refresh();
        if let Some(place) = process.space.first_of(&mut self.objects, &process.executable) {
            let _ = place.object.row(place.address);
            self.names.name(pid, &process.executable, &place);
        }
    }

    pub fn forget(&mut self, pid: u32) {
        self.processes.remove(&pid);
    }

    /// The calls of a stack without names, and why there are no more.
    pub fn unwind(&mut self, raw: &RawStack) -> (Vec<Call>, End) {
        let Followed { calls, end, .. } = self.follow(raw);
        (calls, end)
    }

    fn follow(&mut self, raw: &RawStack) -> Followed<'_> {
        let process = self.processes.entry(raw.pid).or_insert_with(|| Process::new(raw.pid));
        let mut places = Places {
            space: &mut process.space,
            objects: &mut self.objects,
            rows: &mut self.rows,
            found: Vec::with_capacity(64),
        };
        let (calls, end) = unwind(&raw.copy, &mut places);
        Followed { calls, found: places.found, end, names: &mut self.names, executable: &process.executable }
    }

    pub fn name(&mut self, raw: &RawStack) -> NamedStack {
        let Followed { calls, found, end, names, executable } = self.follow(raw);
        let mut unnamed = 0;
        let native: Vec<NativeCall> = calls
            .iter()
            .zip(found)
            .map(|(call, place)| {
                let named = match place {
                    Some(place) => names.name(raw.pid, executable, &place),
                    None => names::unplaced(call.address),
                };
                unnamed += u64::from(named.is_unnamed);
                NativeCall { sp: call.sp, cfa: call.cfa, frames: named.frames, is_eval: named.is_eval }
            })
            .collect();
        let ends = Ends { native: end.reason(), python: raw.python_incomplete };
        let mut stack = join(&native, &raw.python, ends);
        stack.frames.splice(0..0, raw.kernel.clone());
        NamedStack { stack, unnamed, calls, end: Some(end) }
    }

    /// Whether anything is remembered of what was read of symbol files.
    fn is_reading(&self) -> bool {
        self.names.is_reading()
    }

    /// Lets go of what was read of symbol files and is hardly needed any more. Returns whether that was the last of it.
    fn let_go(&mut self) -> bool {
        if !self.is_reading() {
            return false;
        }
        self.names.let_go();
        let was_last = !self.is_reading();
        if was_last {
            footprint::trim();
        }
        was_last
    }

    /// Files found to have no names since the last call.
    fn take_nameless(&mut self) -> Vec<Arc<Object>> {
        self.names.take_nameless()
    }
}

/// The calls of a stack, where each stands, and what names them.
struct Followed<'a> {
    calls: Vec<Call>,
    found: Vec<Option<Place>>,
    end: End,
    names: &'a mut Names,
    executable: &'a str,
}

/// Finds rows for the unwinder and remembers where each address stands.
struct Places<'a> {
    space: &'a mut AddressSpace,
    objects: &'a mut Objects,
    rows: &'a mut Rows,
    found: Vec<Option<Place>>,
}

impl FindRow for Places<'_> {
    fn row(&mut self, address: u64) -> Result<Arc<Row>, Missing> {
        let place = self.space.place(self.objects, address);
        self.found.push(place.clone().ok());
        match place {
            Ok(place) => {
                let key = (place.object.id, place.address);
                self.rows.get(key, || place.object.row(place.address)).map_err(Missing::Row)
            }
            Err(NoPlace::Unmapped | NoPlace::NoFile) => Err(Missing::Module),
        }
    }

    fn row_by_code(&mut self) -> Result<Arc<Row>, Missing> {
        let Some(Some(place)) = self.found.last() else { return Err(Missing::Module) };
        let key = (place.object.id, place.address);
        self.rows.get_by_code(key, || place.object.row_by_code(place.address)).map_err(Missing::Row)
    }
}
