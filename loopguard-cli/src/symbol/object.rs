//! Turns mapped files into code whose calls can be undone and named; the vDSO too, which has no file.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::{File, Metadata},
    io::{self, Write as _},
    os::{fd::FromRawFd as _, unix::fs::MetadataExt as _},
    path::Path,
    sync::{Arc, OnceLock},
};

#[cfg(target_arch = "x86_64")]
use super::leaf;
use super::{
    cfi::{Index, NoRow, Row, Section, Tables},
    maps::{Backing, CodeMapping, FileKey},
};
use crate::runtime::{
    elf::Image,
    memory::{ProcessMemory, TargetMemory as _},
    target_file,
};

/// Files known at a time.
const MAX_OBJECTS: usize = 4096;
const MAX_VDSO: u64 = 64 << 10;
const MAX_BUILD_ID: usize = 64;

/// An ELF file with code, opened once and kept open: it can be named after its process or its directory entry is gone.
#[derive(Debug)]
pub struct Object {
    pub id: u32,
    /// The target's name for it.
    pub path: String,
    pub build_id: Vec<u8>,
    pub image: Image,
    tables: OnceLock<(Tables, Index)>,
}

impl Object {
    pub(super) fn new(id: u32, file: File, path: &str) -> io::Result<Self> {
        let image = Image::of_file(file)?;
        let build_id = image.section_bytes(".note.gnu.build-id").and_then(|(_, note)| build_id(&note));
        Ok(Self {
            id,
            path: path.strip_suffix(" (deleted)").unwrap_or(path).to_owned(),
            build_id: build_id.unwrap_or_default(),
            image,
            tables: OnceLock::new(),
        })
    }

    /// The last part of its path.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// A path of ours that opens the same file, whatever happened to its own.
    pub fn own_path(&self) -> &Path {
        &self.image.opened
    }

    /// The rules at `address`, in the file's own terms.
    pub fn row(&self, address: u64) -> Result<Row, NoRow> {
        let (tables, index) = self.tables.get_or_init(|| {
            let tables = tables(&self.image);
            let index = tables.index();
            (tables, index)
        });
        tables.row(index, address)
    }

    /// The rules at `address` by the code there, for a function that calls nobody and that no table covers.
    #[cfg(target_arch = "x86_64")]
    pub fn row_by_code(&self, address: u64) -> Result<Row, NoRow> {
        let start = address.saturating_sub(leaf::WINDOW);
        let around = |start: u64| {
            let length = address - start + leaf::WINDOW;
            Some((start, self.image.bytes_at(start, length as usize)?))
        };
        let (start, code) = around(start).or_else(|| around(address)).ok_or(NoRow::Uncovered)?;
        leaf::row(&code, start, address).ok_or(NoRow::Uncovered)
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn row_by_code(&self, _address: u64) -> Result<Row, NoRow> {
        Err(NoRow::Uncovered)
    }

    /// The address in the file's own terms that is mapped from `offset` of the file.
    pub fn address_of(&self, offset: u64) -> Option<u64> {
        self.image.address_of(offset)
    }
}

pub(super) fn tables(image: &Image) -> Tables {
    let section = |name: &str| {
        let (address, bytes) = image.section_bytes(name)?;
        Some(Section { address, bytes: bytes.into() })
    };
    let address = |name: &str| image.section(name).map_or(0, |section| section.address);
    let mut tables = Tables {
        eh_frame: section(".eh_frame"),
        eh_frame_hdr: section(".eh_frame_hdr"),
        debug_frame: section(".debug_frame"),
        text: address(".text"),
        got: address(".got"),
    };
    if tables.eh_frame.is_none() {
        // A file stripped of its section table keeps what the run-time library unwinds with.
        (tables.eh_frame_hdr, tables.eh_frame) = by_segments(image);
    }
    tables
}

fn by_segments(image: &Image) -> (Option<Section>, Option<Section>) {
    let Some((address, bytes)) = image.unwind_segment() else { return (None, None) };
    // Version 1, then how the pointer to .eh_frame is written: relative to itself, four bytes signed.
    let frames = match *bytes {
        [1, 0x1b, _, _, a, b, c, d, ..] => {
            address.wrapping_add(4).wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into())
        }
        _ => return (None, None),
    };
    let rest = image.bytes_to_segment_end(frames);
    let section = |(address, bytes): (u64, Vec<u8>)| Section { address, bytes: bytes.into() };
    (Some(section((address, bytes))), rest.map(|bytes| section((frames, bytes))))
}

/// `struct Elf64_Nhdr`: sizes of name and descriptor, type, then both, each padded to four bytes.
fn build_id(note: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| Some(u32::from_le_bytes(*note.get(at..)?.first_chunk()?) as usize);
    let (name, size) = (word(0)?, word(4)?);
    let start = 12usize.checked_add(name.checked_next_multiple_of(4)?)?;
    (size <= MAX_BUILD_ID).then(|| note.get(start..start + size).map(<[u8]>::to_vec))?
}

/// All files seen so far, each once: by where it lies, and by its build id.
#[derive(Debug, Default)]
pub struct Objects {
    by_key: HashMap<FileKey, Option<Arc<Object>>>,
    by_build_id: HashMap<Vec<u8>, Arc<Object>>,
    vdso: Option<Option<Arc<Object>>>,
    next_id: u32,
}

impl Objects {
    /// The file behind a mapping of process `pid`; `None` when it is not one that can be read.
    pub fn of(&mut self, pid: u32, mapping: &CodeMapping) -> Option<Arc<Object>> {
        match &mapping.backing {
            Backing::Anonymous => None,
            // The kernel maps the same one into all processes (of one kind of machine).
            Backing::Vdso => {
                if self.vdso.is_none() {
                    let found = vdso(pid, mapping).and_then(|file| self.add(file, "[vdso]"));
                    self.vdso = Some(found.ok());
                }
                self.vdso.clone()?
            }
            Backing::File { key, path } => {
                if let Some(known) = self.by_key.get(key) {
                    return known.clone();
                }
                let found = open(pid, mapping, *key, path).and_then(|file| self.add(file, path));
                if self.by_key.len() >= MAX_OBJECTS {
                    self.by_key.clear();
                    self.by_build_id.clear();
                }
                // The process may just have ended: another one may still lead to the file.
                let object = match found {
                    Ok(object) => Some(object),
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => None,
                    Err(_) => return None,
                };
                self.by_key.insert(*key, object.clone());
                object
            }
        }
    }

    fn add(&mut self, file: File, path: &str) -> io::Result<Arc<Object>> {
        let object = Object::new(self.next_id, file, path)?;
        if let Some(known) = self.by_build_id.get(&object.build_id).filter(|known| known.path == object.path) {
            return Ok(known.clone());
        }
        self.next_id += 1;
        let object = Arc::new(object);
        if !object.build_id.is_empty() {
            self.by_build_id.insert(object.build_id.clone(), object.clone());
        }
        Ok(object)
    }
}

fn open(pid: u32, mapping: &CodeMapping, key: FileKey, path: &str) -> io::Result<File> {
    let by_map = File::open(mapping.map_file(pid));
    if by_map.is_ok() {
        return by_map;
    }
    // By name only if that still leads to the very file: in the target's root, or in ours.
    let is_it = |metadata: &Metadata| metadata.ino() == key.inode && device(metadata) == key.device;
    let by_name = roots(pid).into_iter().find_map(|root| target_file::open_if(&root, path, is_it).ok());
    by_name.map_or(by_map, Ok)
}

fn roots(pid: u32) -> [String; 2] {
    [format!("/proc/{pid}/root"), "/".to_owned()]
}

fn device(metadata: &Metadata) -> u64 {
    u64::from(libc::major(metadata.dev())) << 32 | u64::from(libc::minor(metadata.dev()))
}

/// The vDSO as a file in memory, so that it can be read like any other.
fn vdso(pid: u32, mapping: &CodeMapping) -> io::Result<File> {
    let length = (mapping.end - mapping.start).min(MAX_VDSO) as usize;
    let bytes = ProcessMemory { pid }.bytes(mapping.start, length).map_err(io::Error::other)?;
    let name = CString::new("vdso").unwrap_or_default();
    // SAFETY: a string that ends in NUL; the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nothing else owns.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(&bytes)?;
    Ok(file)
}

/// The file with the debug information of `object`, if it is installed: for the target, or here.
pub fn debug_file(pid: u32, object: &Object) -> Option<File> {
    let mut names = Vec::new();
    if let [first, rest @ ..] = object.build_id.as_slice()
        && !rest.is_empty()
    {
        let rest: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
        names.push(format!("/usr/lib/debug/.build-id/{first:02x}/{rest}.debug"));
    }
    let link = object.image.section_bytes(".gnu_debuglink").and_then(|(_, bytes)| {
        let name = bytes.split(|&byte| byte == 0).next()?;
        // A name only, never a way out of the folders it is looked for in.
        std::str::from_utf8(name).ok().filter(|name| !name.contains('/') && !name.is_empty()).map(str::to_owned)
    });
    if let (Some(link), Some((folder, _))) = (link, object.path.rsplit_once('/')) {
        names.extend([
            format!("{folder}/{link}"),
            format!("{folder}/.debug/{link}"),
            format!("/usr/lib/debug{folder}/{link}"),
        ]);
    }
    let roots = roots(pid);
    let mut candidates = names.iter().flat_map(|name| roots.iter().map(move |root| (root, name)));
    candidates.find_map(|(root, name)| {
        let file = target_file::open_if(root, name, |_| true).ok()?;
        is_for(file.try_clone().ok()?, object).then_some(file)
    })
}

/// Whether a debug file was made with this object: both carry the same build id.
fn is_for(file: File, object: &Object) -> bool {
    let Ok(image) = Image::of_file(file) else { return false };
    let own = image.section_bytes(".note.gnu.build-id").and_then(|(_, note)| build_id(&note));
    // One that refers to yet another one would be followed wherever that leads.
    let is_last = image.section_bytes(".gnu_debuglink").is_none();
    is_last && !object.build_id.is_empty() && own.as_ref() == Some(&object.build_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_ids() {
        let note = [&[4, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0][..], b"GNU\0", &[1, 2, 3, 0]].concat();
        assert_eq!(build_id(&note), Some(vec![1, 2, 3]));
        assert_eq!(build_id(&note[..note.len() - 3]), None);
        let huge = [&[255; 8][..], &[0; 64]].concat();
        assert_eq!(build_id(&huge), None);
        assert_eq!(build_id(&[]), None);
    }
}
