//! Turns the notes of a mapped file into probe sites: where each stands in the file, and where its arguments are.
//!
//! A site's note holds addresses as the linker knew them. If the file was prelinked since, its base section moved with
//! everything else, and says by how much.

mod argument;
mod note;

use std::path::PathBuf;

use object::elf::{EM_AARCH64, EM_X86_64};

pub use argument::{Operand, Unreadable, parse};
pub use note::{BrokenNote, Note, notes};

use super::elf::Image;
use loopguard_common::request::{
    ArgumentPlace, MAX_ARGUMENTS, NO_REGISTER, PLACE_CONSTANT, PLACE_MEMORY, PLACE_REGISTERS, ProbeArguments,
};

/// The provider whose probes tell of requests.
pub const PROVIDER: &str = "loopguard";
/// Where SystemTap's notes are.
const NOTES: &str = ".note.stapsdt";
const BASE: &str = ".stapsdt.base";
/// Sites that are taken of one file; a copy of the provider has five.
const MAX_SITES: usize = 64;

/// The probes of a server's requests. Each is the probe `request__` and its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RequestProbe {
    Start,
    Route,
    Enter,
    Exit,
    End,
}

impl RequestProbe {
    pub const ALL: [Self; 5] = [Self::Start, Self::Route, Self::Enter, Self::Exit, Self::End];

    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "request__start",
            Self::Route => "request__route",
            Self::Enter => "request__enter",
            Self::Exit => "request__exit",
            Self::End => "request__end",
        }
    }

    /// How many arguments it has by contract.
    fn arguments(self) -> usize {
        match self {
            Self::Start => 7,
            Self::Route => 3,
            Self::Enter | Self::Exit => 1,
            Self::End => 2,
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|probe| probe.name() == name)
    }
}

/// A place in a file where a probe can be hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    pub probe: RequestProbe,
    pub file: PathBuf,
    /// Of the instruction, in the file.
    pub offset: u64,
    pub arguments: ProbeArguments,
}

/// What was found in one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sites {
    pub usable: Vec<Site>,
    /// Sites of the provider that cannot be used, and the reason of the last one.
    pub unusable: usize,
    pub reason: Option<String>,
}

/// The sites of the provider in `image`. A file without notes, or with notes of others, has none; one whose notes make
/// no sense has unusable ones.
pub fn sites(image: &Image) -> Sites {
    match image.section_bytes(NOTES) {
        Some((_, bytes)) => of_notes(image, notes(&bytes)),
        None => Sites::default(),
    }
}

fn of_notes(image: &Image, notes: impl Iterator<Item = Result<Note, BrokenNote>>) -> Sites {
    let mut sites = Sites::default();
    for note in notes {
        let site = match note {
            // The linker dropped the code that the probe was in, and kept its note.
            Ok(note) if note.provider == PROVIDER && note.site == 0 => continue,
            Ok(note) if note.provider == PROVIDER => site(image, &note),
            Ok(_) => continue,
            Err(error) => Err(error.to_string()),
        };
        match site {
            Ok(site) if sites.usable.len() < MAX_SITES => sites.usable.push(site),
            Ok(_) => {
                sites.unusable += 1;
                sites.reason = Some(format!("more than {MAX_SITES} sites in one file"));
            }
            Err(reason) => {
                sites.unusable += 1;
                sites.reason = Some(reason);
            }
        }
    }
    sites
}

fn site(image: &Image, note: &Note) -> Result<Site, String> {
    let probe = RequestProbe::named(&note.probe).ok_or_else(|| format!("no probe is called {:?}", note.probe))?;
    let arguments = arguments(probe, &note.arguments, image).map_err(|error| format!("{}: {error}", probe.name()))?;
    // What has to be added to the note's addresses in this process: where the base section is now tells it, or else
    // where the file was mapped.
    let moved = match image.section(BASE) {
        Some(base) if note.base != 0 => base.address.wrapping_sub(note.base),
        _ => image.bias(),
    };
    let offset = image
        .file_offset(note.site.wrapping_add(moved))
        .ok_or_else(|| format!("{}: its address lies outside the file", probe.name()))?;
    Ok(Site { probe, file: image.opened.clone(), offset, arguments })
}

fn arguments(probe: RequestProbe, text: &str, image: &Image) -> Result<ProbeArguments, Unreadable> {
    let parsed = match image.machine() {
        EM_X86_64 => parse::<argument::X86>(text)?,
        EM_AARCH64 => parse::<argument::Aarch64>(text)?,
        _ => return Err(Unreadable::Machine),
    };
    if parsed.len() != probe.arguments() {
        return Err(Unreadable::Count { expected: probe.arguments(), found: parsed.len() });
    }
    let mut places = [ArgumentPlace::default(); MAX_ARGUMENTS];
    for (place, argument) in places.iter_mut().zip(&parsed) {
        let symbol = |name: &str| {
            let [symbol] = image.symbols([name]);
            symbol.map(|symbol| symbol.address)
        };
        *place = argument.place(symbol).ok_or(Unreadable::Symbol)?;
    }
    Ok(ProbeArguments { places, count: parsed.len() as u64 })
}

impl argument::Argument {
    /// For the kernel programs. `symbol` gives a symbol's address in the target.
    fn place(&self, symbol: impl Fn(&str) -> Option<u64>) -> Option<ArgumentPlace> {
        let none = ArgumentPlace {
            offset: 0,
            base: NO_REGISTER,
            index: NO_REGISTER,
            kind: PLACE_CONSTANT,
            scale: 0,
            shift: 0,
            size: self.size,
        };
        Some(match &self.operand {
            Operand::Constant(value) => ArgumentPlace { offset: *value, ..none },
            Operand::Register { register, shift } => {
                ArgumentPlace { kind: PLACE_REGISTERS, base: *register, shift: *shift, ..none }
            }
            Operand::Memory { base, index, offset } => ArgumentPlace {
                kind: PLACE_MEMORY,
                base: base.unwrap_or(NO_REGISTER),
                index: index.map_or(NO_REGISTER, |(register, _)| register),
                scale: index.map_or(0, |(_, scale)| scale),
                offset: *offset,
                ..none
            },
            Operand::Symbol { name, offset } => {
                ArgumentPlace { kind: PLACE_MEMORY, offset: (symbol(name)? as i64).wrapping_add(*offset), ..none }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::elf::mappings;

    #[test]
    fn this_program_has_no_provider() {
        let pid = std::process::id();
        let exe = std::fs::read_link("/proc/self/exe").unwrap();
        let image = Image::open(pid, exe.to_str().unwrap(), &mappings(pid).unwrap()).unwrap();
        assert_eq!(sites(&image), Sites::default());
    }

    #[test]
    fn a_probe_whose_code_was_dropped_is_none() {
        let pid = std::process::id();
        let exe = std::fs::read_link("/proc/self/exe").unwrap();
        let image = Image::open(pid, exe.to_str().unwrap(), &mappings(pid).unwrap()).unwrap();
        let note = |site| Note {
            site,
            base: 0,
            semaphore: 0,
            provider: PROVIDER.to_owned(),
            probe: RequestProbe::ALL[0].name().to_owned(),
            arguments: "nonsense".to_owned(),
        };
        let found = |note| of_notes(&image, [Ok(note)].into_iter());
        assert_eq!(found(note(0)), Sites::default());
        assert_eq!(found(note(16)).unusable, 1);
    }

    #[test]
    fn the_kernel_is_told_where_arguments_are() {
        let parsed = parse::<argument::X86>("-4@$-3 8@%rdi 1@%ah 8@-16(%rbp,%rax,8) 4@counter+8(%rip)").unwrap();
        let place = |index: usize| parsed[index].place(|name| (name == "counter").then_some(0x5000)).unwrap();
        assert_eq!((place(0).kind, place(0).offset, place(0).size), (PLACE_CONSTANT, -3, -4));
        assert_eq!((place(1).kind, place(1).base, place(1).index), (PLACE_REGISTERS, 112, NO_REGISTER));
        assert_eq!((place(2).base, place(2).shift, place(2).size), (80, 8, 1));
        let memory = place(3);
        assert_eq!((memory.kind, memory.base, memory.index), (PLACE_MEMORY, 32, 80));
        assert_eq!((memory.scale, memory.offset), (3, -16));
        assert_eq!((place(4).kind, place(4).base, place(4).offset), (PLACE_MEMORY, NO_REGISTER, 0x5008));
        assert_eq!(parsed[4].place(|_| None), None);
    }
}
