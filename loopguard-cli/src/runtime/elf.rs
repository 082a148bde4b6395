//! Turns a process's memory map into ELF images: symbols, sections, and where an address stands in which file.
//!
//! Nothing is read before it is asked for, and only the tables that are asked for: a libpython has 30 MB.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use object::Endianness;
use object::elf::{self, FileHeader64, Sym64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, Sym};
use object::read::{ReadCache, ReadRef};

use super::target_file;

/// The largest symbol or string table that is read.
const MAX_TABLE: u64 = 64 << 20;
const MAX_SECTIONS: usize = 4096;
const MAX_SEGMENTS: usize = 256;

/// One line of `/proc/PID/maps` that has a file behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    pub executable: bool,
    /// Offset of `start` in the file, in bytes.
    pub offset: u64,
    /// As the target names it, ` (deleted)` included.
    pub path: String,
}

impl Mapping {
    pub fn contains(&self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// A path that names this mapping's file in every mount namespace, deleted or not (needs CAP_SYS_ADMIN or
    /// CAP_CHECKPOINT_RESTORE).
    pub fn map_file(&self, pid: u32) -> PathBuf {
        format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end).into()
    }
}

/// The file mappings of a process, in address order.
///
/// # Errors
/// `NotFound` when there is no such process.
pub fn mappings(pid: u32) -> io::Result<Vec<Mapping>> {
    // A path may hold any bytes but NUL and (escaped) newline.
    let maps = std::fs::read(format!("/proc/{pid}/maps"))?;
    Ok(maps.split(|&byte| byte == b'\n').filter_map(|line| parse_mapping(&String::from_utf8_lossy(line))).collect())
}

/// How much a process maps in all, in pages (`size` in `/proc/PID/statm`): mapping or unmapping a file changes it, and to
/// ask for it costs a hundredth of what [`mappings`] do.
pub fn mapped_pages(pid: u32) -> Option<u64> {
    let sizes = std::fs::read(format!("/proc/{pid}/statm")).ok()?;
    std::str::from_utf8(&sizes).ok()?.split(' ').next()?.parse().ok()
}

fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = fields.next()?;
    let path = fields.nth(2)?.trim_start();
    path.starts_with('/').then(|| Mapping {
        start: u64::from_str_radix(start, 16).unwrap_or(0),
        end: u64::from_str_radix(end, 16).unwrap_or(0),
        executable: permissions.contains('x'),
        offset: u64::from_str_radix(offset, 16).unwrap_or(0),
        path: path.to_owned(),
    })
}

/// A mapped ELF file. Addresses are those of the target, load bias included.
#[derive(Debug)]
pub struct Image {
    /// As the target names it.
    pub path: String,
    /// A path of ours that opens the same file, as long as the image lives; the kernel can open it as well.
    pub opened: PathBuf,
    bias: u64,
    /// `e_machine`.
    machine: u16,
    file: File,
    segments: Vec<Segment>,
    /// `PT_GNU_EH_FRAME`.
    unwind: Option<Segment>,
    sections: Vec<Section>,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    address: u64,
    offset: u64,
    file_size: u64,
}

#[derive(Clone, Debug)]
pub struct Section {
    pub name: String,
    /// In the target.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    kind: u32,
    offset: u64,
    link: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// In the target.
    pub address: u64,
    /// Bytes; 0: not said.
    pub size: u64,
    pub table: SymbolTable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SymbolTable {
    /// `.dynsym`, which `strip` leaves.
    Dynamic,
    /// `.symtab`.
    Full,
}

impl Image {
    /// Opens the file `path` that `mappings` (of process `pid`) hold.
    ///
    /// # Errors
    /// `NotFound` when no mapping names it, `InvalidData` when it is not a 64-bit ELF file, or why it can't be opened.
    pub fn open(pid: u32, path: &str, mappings: &[Mapping]) -> io::Result<Self> {
        let own: Vec<&Mapping> = mappings.iter().filter(|mapping| mapping.path == path).collect();
        let Some(first) = own.first() else { return Err(io::ErrorKind::NotFound.into()) };
        let (file, opened) = open_mapped(pid, first)?;
        let mut image = Self::parse(file, opened)?;
        image.path = path.to_owned();
        image.bias = image
            .segments
            .iter()
            .find_map(|segment| {
                let in_page = segment.address % 4096;
                own.iter()
                    .find(|mapping| mapping.offset == segment.offset - in_page.min(segment.offset))
                    .map(|mapping| mapping.start.wrapping_sub(segment.address - in_page))
            })
            .ok_or(io::ErrorKind::InvalidData)?;
        for section in &mut image.sections {
            section.address = section.address.wrapping_add(image.bias);
        }
        for segment in &mut image.segments {
            segment.address = segment.address.wrapping_add(image.bias);
        }
        Ok(image)
    }

    /// Headers only; addresses are the file's own.
    fn parse(file: File, opened: PathBuf) -> io::Result<Self> {
        let invalid = |error: object::read::Error| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
        let cache = ReadCache::new(&file);
        let header = FileHeader64::<Endianness>::parse(&cache).map_err(invalid)?;
        let endian = header.endian().map_err(invalid)?;
        let programs = header.program_headers(endian, &cache).map_err(invalid)?;
        let of_type = |kind| {
            let of_kind = programs.iter().take(MAX_SEGMENTS).filter(move |segment| segment.p_type(endian) == kind);
            of_kind.map(move |segment| Segment {
                address: segment.p_vaddr(endian),
                offset: segment.p_offset(endian),
                file_size: segment.p_filesz(endian),
            })
        };
        let segments = of_type(elf::PT_LOAD).collect();
        let unwind = of_type(elf::PT_GNU_EH_FRAME).next();
        let table = header.sections(endian, &cache).map_err(invalid)?;
        let names = header.section_headers(endian, &cache).map_err(invalid)?;
        // The names in one piece: looked up one by one, each would be a read of its own.
        let strings = header
            .section_strings_index(endian, &cache)
            .ok()
            .and_then(|index| table.section(index).ok())
            .map(|strings| (strings.sh_offset(endian), strings.sh_size(endian).min(1 << 20)))
            .and_then(|(offset, size)| (&cache).read_bytes_at(offset, size).ok())
            .unwrap_or_default();
        let sections = names
            .iter()
            .take(MAX_SECTIONS)
            .map(|section| Section {
                name: String::from_utf8_lossy(text_at(strings, section.sh_name(endian) as usize)).into_owned(),
                address: section.sh_addr(endian),
                size: section.sh_size(endian),
                kind: section.sh_type(endian),
                offset: section.sh_offset(endian),
                link: section.sh_link(endian) as usize,
            })
            .collect();
        let machine = header.e_machine(endian);
        Ok(Self { path: String::new(), opened, bias: 0, machine, segments, unwind, sections, file })
    }

    /// An ELF file by itself: addresses are its own, as if it were loaded where it was linked for.
    ///
    /// # Errors
    /// `InvalidData` when it is not a 64-bit ELF file.
    pub fn of_file(file: File) -> io::Result<Self> {
        let opened = target_file::own_path(&file);
        Self::parse(file, opened)
    }

    /// What was added to the file's addresses when it was mapped.
    pub fn bias(&self) -> u64 {
        self.bias
    }

    /// The kind of processor it is for (`EM_*`).
    pub fn machine(&self) -> u16 {
        self.machine
    }

    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// The symbols of these names that the file defines, from `.dynsym` where it has them, else from `.symtab`.
    pub fn symbols<const N: usize>(&self, names: [&str; N]) -> [Option<Symbol>; N] {
        let mut found = [None; N];
        for table in [SymbolTable::Dynamic, SymbolTable::Full] {
            if found.iter().any(Option::is_none) {
                self.search(table, &names, &mut found);
            }
        }
        found
    }

    fn search(&self, table: SymbolTable, names: &[&str], found: &mut [Option<Symbol>]) {
        self.each_symbol(table, |name, symbol| {
            for (wanted, slot) in names.iter().zip(found.iter_mut()) {
                if slot.is_none() && name == wanted.as_bytes() {
                    *slot = Some(symbol);
                }
            }
        });
    }

    /// Calls `see` with the name, as it stands in the file, of every symbol that the file defines.
    pub fn each_symbol(&self, table: SymbolTable, mut see: impl FnMut(&[u8], Symbol)) {
        let kind = match table {
            SymbolTable::Dynamic => elf::SHT_DYNSYM,
            SymbolTable::Full => elf::SHT_SYMTAB,
        };
        let Some(section) = self.sections.iter().find(|section| section.kind == kind) else { return };
        let Some(strings) = self.sections.get(section.link) else { return };
        let (Ok(entries), Ok(strings)) = (self.contents(section), self.contents(strings)) else { return };
        // A symbol table is an array; a ragged tail is no symbol.
        let count = entries.len() / size_of::<Sym64<Endianness>>();
        let Ok((symbols, _)) = object::pod::slice_from_bytes::<Sym64<Endianness>>(&entries, count) else { return };
        let endian = Endianness::default();
        for symbol in symbols {
            let defined = symbol.st_shndx(endian) != elf::SHN_UNDEF && symbol.st_value(endian) != 0;
            let at = symbol.st_name(endian) as usize;
            if !defined || at == 0 {
                continue;
            }
            let address = symbol.st_value(endian).wrapping_add(self.bias);
            see(text_at(&strings, at), Symbol { address, size: symbol.st_size(endian), table });
        }
    }

    fn contents(&self, section: &Section) -> io::Result<Vec<u8>> {
        if section.size > MAX_TABLE || section.kind == elf::SHT_NOBITS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.read_file(section.offset, section.size as usize)
    }

    /// The section's bytes as the file holds them: not relocated, and not what a debugger may have patched.
    pub fn section_bytes(&self, name: &str) -> Option<(u64, Vec<u8>)> {
        let section = self.section(name)?;
        Some((section.address, self.contents(section).ok()?))
    }

    /// Where in the file the byte at `address` (in the target) stands.
    pub fn file_offset(&self, address: u64) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            let into = address.checked_sub(segment.address)?;
            (into < segment.file_size).then(|| segment.offset.checked_add(into))?
        })
    }

    /// The address of the byte at `offset` of the file.
    pub fn address_of(&self, offset: u64) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            // Whole pages are mapped, so what stands before a segment in its first page is mapped too.
            let page = segment.offset & !4095;
            let into = offset.checked_sub(page)?;
            (offset < segment.offset.checked_add(segment.file_size)?)
                .then(|| segment.address.wrapping_sub(segment.offset - page).wrapping_add(into))
        })
    }

    /// What `PT_GNU_EH_FRAME` leads to: `.eh_frame_hdr`, in a file without section headers too.
    pub fn unwind_segment(&self) -> Option<(u64, Vec<u8>)> {
        let Segment { address, offset, file_size } = self.unwind?;
        if file_size > MAX_TABLE {
            return None;
        }
        Some((address, self.read_file(offset, file_size as usize).ok()?))
    }

    /// All bytes from `address` to the end of its segment in the file.
    pub fn bytes_to_segment_end(&self, address: u64) -> Option<Vec<u8>> {
        let offset = self.file_offset(address)?;
        let segment = self
            .segments
            .iter()
            .find(|segment| address.checked_sub(segment.address).is_some_and(|into| into < segment.file_size))?;
        let length = segment.offset.checked_add(segment.file_size)?.checked_sub(offset)?;
        (length <= MAX_TABLE).then(|| self.read_file(offset, length as usize).ok())?
    }

    /// The file's bytes from `address` (in the target) on, as many as there are up to `length`.
    pub fn bytes_at(&self, address: u64, length: usize) -> Option<Vec<u8>> {
        let offset = self.file_offset(address)?;
        let mut bytes = vec![0; length];
        let got = self.file.read_at(&mut bytes, offset).ok()?;
        bytes.truncate(got);
        Some(bytes)
    }

    fn read_file(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        if offset.saturating_add(length as u64) > self.file.metadata()?.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

fn text_at(strings: &[u8], at: usize) -> &[u8] {
    let rest = strings.get(at..).unwrap_or_default();
    &rest[..rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len())]
}

fn open_mapped(pid: u32, mapping: &Mapping) -> io::Result<(File, PathBuf)> {
    let by_map = mapping.map_file(pid);
    if let Ok(file) = File::open(&by_map) {
        return Ok((file, by_map));
    }
    let by_root = PathBuf::from(format!("/proc/{pid}/root{}", mapping.path));
    let opened = target_file::open(pid, &mapping.path).map(|file| (file, by_root));
    let by_exe = PathBuf::from(format!("/proc/{pid}/exe"));
    match opened {
        Err(_) if std::fs::read_link(&by_exe).is_ok_and(|exe| exe == Path::new(&mapping.path)) => {
            File::open(&by_exe).map(|file| (file, by_exe))
        }
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_lines() {
        let line = "7f00a000-7f00b000 r-xp 00001000 fe:01 1234                       /usr/lib/a b.so (deleted)";
        let mapping = parse_mapping(line).unwrap();
        assert_eq!((mapping.start, mapping.end, mapping.offset), (0x7f00_a000, 0x7f00_b000, 0x1000));
        assert!(mapping.executable && mapping.contains(0x7f00_afff) && !mapping.contains(0x7f00_b000));
        assert_eq!(mapping.path, "/usr/lib/a b.so (deleted)");
        for line in ["", "7f00a000-7f00b000 rw-p 00000000 00:00 0 ", "7ffd-7fff rw-p 0 00:00 0    [stack]", "x y z"] {
            assert_eq!(parse_mapping(line), None);
        }
    }

    #[test]
    fn finds_itself() {
        let pid = std::process::id();
        let mappings = mappings(pid).unwrap();
        let exe = std::fs::read_link("/proc/self/exe").unwrap();
        let image = Image::open(pid, exe.to_str().unwrap(), &mappings).unwrap();
        let here = finds_itself as *const () as u64;
        let code = mappings.iter().find(|mapping| mapping.contains(here)).unwrap();
        assert_eq!(image.file_offset(here), Some(here - code.start + code.offset));
        let (text, bytes) = image.section_bytes(".text").unwrap();
        assert!((text..text + bytes.len() as u64).contains(&here));
        let [main, missing] = image.symbols(["main", "no such symbol"]);
        assert!(main.is_some() && missing.is_none());
    }

    #[test]
    fn a_file_that_is_no_elf_is_an_error() {
        let path = std::env::temp_dir().join(format!("loopguard-elf-{}", std::process::id()));
        for bytes in [&b""[..], b"#!/bin/sh\n", b"\x7fELF\x02\x01\x01\0garbage", &[0x7f; 4096]] {
            std::fs::write(&path, bytes).unwrap();
            assert!(Image::parse(File::open(&path).unwrap(), path.clone()).is_err());
        }
        std::fs::remove_file(&path).unwrap();
    }
}
