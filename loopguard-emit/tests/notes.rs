//! Reads the notes of this test's own executable: the five probes must be there, each on a no-op that can be patched.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use object::{
    Endianness,
    elf::FileHeader64,
    read::elf::{ElfFile, FileHeader as _, SectionHeader as _},
};

/// The type of SystemTap's notes.
const STAPSDT: u32 = 3;

struct Note {
    site: u64,
    base: u64,
    semaphore: u64,
    probe: String,
    arguments: String,
}

/// Every probe once, so that the linker keeps them.
fn fire_all() {
    let id = loopguard_emit::next_id();
    loopguard_emit::start(id, b"GET", b"/", b"");
    loopguard_emit::route(id, b"/");
    loopguard_emit::enter(id);
    loopguard_emit::exit(id);
    loopguard_emit::end(id, 200);
}

fn notes(file: &[u8]) -> Vec<Note> {
    let header = FileHeader64::<Endianness>::parse(file).unwrap();
    let endian = header.endian().unwrap();
    let sections = header.sections(endian, file).unwrap();
    let (_, section) = sections.section_by_name(endian, b".note.stapsdt").expect("a section with notes");
    let mut notes = section.notes(endian, file).unwrap().expect("notes");
    let mut found = Vec::new();
    while let Some(note) = notes.next().unwrap() {
        assert_eq!((note.name(), note.n_type(endian)), (b"stapsdt".as_slice(), STAPSDT));
        let (addresses, strings) = note.desc().split_at(24);
        let address = |index: usize| u64::from_ne_bytes(addresses[index * 8..][..8].try_into().unwrap());
        let mut strings = strings.split(|byte| *byte == 0).map(|part| String::from_utf8(part.to_vec()).unwrap());
        assert_eq!(strings.next().unwrap(), "loopguard");
        found.push(Note {
            site: address(0),
            base: address(1),
            semaphore: address(2),
            probe: strings.next().unwrap(),
            arguments: strings.next().unwrap(),
        });
    }
    found.sort_by(|a, b| a.probe.cmp(&b.probe));
    found
}

#[test]
fn five_probes_with_their_arguments() {
    fire_all();
    let file = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let notes = notes(&file);
    let told: Vec<(&str, usize)> =
        notes.iter().map(|note| (note.probe.as_str(), note.arguments.split(' ').count())).collect();
    let expected = [
        ("request__end", 2),
        ("request__enter", 1),
        ("request__exit", 1),
        ("request__route", 3),
        ("request__start", 7),
    ];
    assert_eq!(told, expected);
    let elf = ElfFile::<FileHeader64<Endianness>>::parse(file.as_slice()).unwrap();
    for note in &notes {
        assert!(note.arguments.split(' ').all(|argument| argument.starts_with("8@")), "{}", note.arguments);
        assert_ne!(note.base, 0, "{}: the base section was left out", note.probe);
        assert_eq!(note.semaphore, 0);
        let code = code_at(&elf, note.site);
        if cfg!(target_arch = "x86_64") {
            assert_eq!(note.site % 8, 0, "{}", note.probe);
            assert_eq!(code[..5], [0x0f, 0x1f, 0x44, 0x00, 0x00], "{}", note.probe);
        } else {
            assert_eq!(code[..4], 0xd503_201f_u32.to_le_bytes(), "{}", note.probe);
        }
    }
}

fn code_at(elf: &ElfFile<'_, FileHeader64<Endianness>>, address: u64) -> Vec<u8> {
    use object::{Object as _, ObjectSection as _};
    let mut sections = elf.sections();
    let code = sections.find_map(|section| section.data_range(address, 5).ok().flatten());
    code.expect("the site lies in a section").to_vec()
}
