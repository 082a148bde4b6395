//! Turns the bytes of a note section into SystemTap's notes.

use object::Endianness;
use object::elf::FileHeader64;
use object::read::elf::NoteIterator;

/// The owner's name and type of such notes (SystemTap's sys/sdt.h, version 3).
const OWNER: &[u8] = b"stapsdt";
const TYPE: u32 = 3;
/// Three addresses before the strings.
const ADDRESSES: usize = 24;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Addresses as they were when the file was linked; `base` is that of the base section.
    pub site: u64,
    pub base: u64,
    /// A counter that has to be above zero for the probe to be hit; 0: it has none.
    pub semaphore: u64,
    pub provider: String,
    pub probe: String,
    pub arguments: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokenNote {
    #[error("its probe notes are cut off or not notes at all")]
    Section,
    #[error("a probe note is cut off")]
    Note,
}

/// The notes in a section. Those of other owners are passed over; after what is no note at all nothing follows.
pub fn notes(bytes: &[u8]) -> impl Iterator<Item = Result<Note, BrokenNote>> + '_ {
    let mut notes = NoteIterator::<FileHeader64<Endianness>>::new(Endianness::Little, 4, bytes);
    let mut is_broken = false;
    std::iter::from_fn(move || {
        let next = match &mut notes {
            _ if is_broken => return None,
            Ok(notes) => notes.next(),
            Err(error) => Err(*error),
        };
        match next {
            Ok(Some(note)) if note.name() == OWNER && note.n_type(Endianness::Little) == TYPE => {
                Some(Some(description(note.desc()).ok_or(BrokenNote::Note)))
            }
            Ok(Some(_)) => Some(None),
            Ok(None) => None,
            Err(_) => {
                is_broken = true;
                Some(Some(Err(BrokenNote::Section)))
            }
        }
    })
    .flatten()
}

fn description(bytes: &[u8]) -> Option<Note> {
    let (addresses, strings) = bytes.split_at_checked(ADDRESSES)?;
    let address = |index: usize| addresses[index * 8..].first_chunk().map(|word| u64::from_le_bytes(*word));
    // Each string ends with a zero byte; padding may follow the last.
    let mut strings = strings.split(|byte| *byte == 0).map(|string| String::from_utf8_lossy(string).into_owned());
    let (provider, probe) = (strings.next()?, strings.next()?);
    let arguments = strings.next()?;
    // What follows the last zero: without it the arguments are cut off.
    strings.next()?;
    Some(Note { site: address(0)?, base: address(1)?, semaphore: address(2)?, provider, probe, arguments })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn note(owner: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
        let padded = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let owner = [owner, b"\0"].concat();
        [
            &(owner.len() as u32).to_le_bytes()[..],
            &(description.len() as u32).to_le_bytes(),
            &kind.to_le_bytes(),
            &padded(&owner),
            &padded(description),
        ]
        .concat()
    }

    fn described(strings: &[u8]) -> Vec<u8> {
        let addresses = [0x1238u64, 0x5000, 0].map(u64::to_le_bytes).concat();
        [&addresses, strings].concat()
    }

    fn good() -> Vec<u8> {
        note(OWNER, TYPE, &described(b"loopguard\0request__exit\x008@%rdi\0"))
    }

    #[test]
    fn a_note_is_three_addresses_and_three_strings() {
        let expected = Note {
            site: 0x1238,
            base: 0x5000,
            semaphore: 0,
            provider: "loopguard".into(),
            probe: "request__exit".into(),
            arguments: "8@%rdi".into(),
        };
        let bytes = [good(), note(b"GNU", 1, &[1; 16]), note(OWNER, 7, &[1; 5]), good()].concat();
        assert_eq!(notes(&bytes).collect::<Vec<_>>(), [Ok(expected.clone()), Ok(expected)]);
        let without_arguments = note(OWNER, TYPE, &described(b"a\0b\0\0"));
        assert_eq!(notes(&without_arguments).next().unwrap().unwrap().arguments, "");
    }

    #[test]
    fn what_is_cut_off_is_said_to_be() {
        for strings in [&b""[..], b"loopguard", b"loopguard\0request__exit\0", b"a\0b\x008@%rdi"] {
            let bytes = [note(OWNER, TYPE, &described(strings)), good()].concat();
            let told: Vec<_> = notes(&bytes).map(|note| note.map(|note| note.probe)).collect();
            assert_eq!(told, [Err(BrokenNote::Note), Ok("request__exit".into())], "{strings:?}");
        }
        let whole = good();
        for length in 1..whole.len() - 4 {
            let told: Vec<_> = notes(&whole[..length]).collect();
            assert_eq!(told, [Err(BrokenNote::Section)], "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            notes(&bytes).for_each(drop);
        }

        #[test]
        fn a_broken_section_is_read_without_a_panic(
            at in 0usize..120, value: u8, keep in 0usize..140, count in 1usize..3,
        ) {
            let mut bytes = good().repeat(count);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            bytes.truncate(keep);
            notes(&bytes).for_each(drop);
        }
    }
}
