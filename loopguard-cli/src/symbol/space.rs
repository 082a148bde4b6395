//! Turns addresses in a process into places in files, following what it maps and unmaps.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    maps::{self, Backing, CodeMapping},
    object::{Object, Objects},
};
use crate::runtime::elf::mapped_pages;

/// Whether a map still holds is asked before it is used if this is longer ago: a library may have been unloaded and
/// another one be there.
const FRESH_FOR: Duration = Duration::from_secs(1);
/// Even if as much is mapped as before, it is read again after this time.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// An address that is in no mapping has the map read again, but not more often than this.
const MISS_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// The code of one process.
#[derive(Debug)]
pub struct AddressSpace {
    pid: u32,
    mappings: Vec<Mapped>,
    read_at: Option<Instant>,
    /// How much it mapped then, and when that was last found to be so.
    pages: Option<u64>,
    checked_at: Option<Instant>,
}

#[derive(Debug)]
struct Mapped {
    mapping: CodeMapping,
    /// Opened when an address is first looked up in it.
    object: Option<Option<Arc<Object>>>,
}

/// Where an address stands.
#[derive(Clone, Debug)]
pub struct Place {
    pub object: Arc<Object>,
    /// In the file's own terms.
    pub address: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPlace {
    /// Not mapped, or not as code.
    Unmapped,
    /// Code that was made at run time, or that belongs to a file that cannot be read.
    NoFile,
}

impl AddressSpace {
    pub fn new(pid: u32) -> Self {
        Self { pid, mappings: Vec::new(), read_at: None, pages: None, checked_at: None }
    }

    /// Makes sure that the map is what it is now, or was a moment ago.
    fn check(&mut self) {
        if self.checked_at.is_some_and(|at| at.elapsed() <= FRESH_FOR) {
            return;
        }
        let pages = mapped_pages(self.pid);
        let is_recent = self.read_at.is_some_and(|at| at.elapsed() <= READ_AGAIN_AFTER);
        if is_recent && pages.is_some() && pages == self.pages {
            self.checked_at = Some(Instant::now());
        } else {
            self.refresh();
        }
    }

    /// Reads the map now, so that it is known should the process end.
    pub fn refresh(&mut self) {
        // Before the map: what changes meanwhile has it read again.
        let pages = mapped_pages(self.pid);
        let Ok(mappings) = maps::code_mappings(self.pid) else { return };
        let now = Instant::now();
        (self.read_at, self.checked_at, self.pages) = (Some(now), Some(now), pages);
        if mappings.is_empty() {
            // Ended, and its memory gone: what was known still names the past.
            return;
        }
        let mut before = std::mem::take(&mut self.mappings);
        self.mappings = mappings
            .into_iter()
            .map(|mapping| {
                let known = before.iter_mut().find(|known| known.mapping == mapping);
                let object = known.and_then(|known| known.object.take());
                Mapped { mapping, object }
            })
            .collect();
    }

    pub fn place(&mut self, objects: &mut Objects, address: u64) -> Result<Place, NoPlace> {
        self.check();
        let mut at = self.find(address);
        if at.is_none() && self.read_at.is_none_or(|at| at.elapsed() > MISS_AGAIN_AFTER) {
            self.refresh();
            at = self.find(address);
        }
        let pid = self.pid;
        let known = &mut self.mappings[at.ok_or(NoPlace::Unmapped)?];
        let mapping = &known.mapping;
        let object = known.object.get_or_insert_with(|| objects.of(pid, mapping)).clone().ok_or(NoPlace::NoFile)?;
        let offset = address - mapping.start + mapping.offset;
        let offset = if mapping.backing == Backing::Vdso { address - mapping.start } else { offset };
        let address = object.address_of(offset).ok_or(NoPlace::NoFile)?;
        Ok(Place { object, address })
    }

    /// The first place with code in the file of this path.
    pub fn first_of(&mut self, objects: &mut Objects, wanted: &str) -> Option<Place> {
        let of_file = |known: &&Mapped| matches!(&known.mapping.backing, Backing::File { path, .. } if path == wanted);
        let start = self.mappings.iter().find(of_file)?.mapping.start;
        self.place(objects, start).ok()
    }

    fn find(&self, address: u64) -> Option<usize> {
        let at = self.mappings.partition_point(|known| known.mapping.end <= address);
        self.mappings.get(at).is_some_and(|known| known.mapping.contains(address)).then_some(at)
    }
}
