//! Turns raw Python objects into strings, dict entries and attributes.
//!
//! A `str`'s state is a bit field whose `interned` part has 2 bits in most builds and 8 or 16 in others, so where the
//! kind starts is learnt from strings that are known to be ASCII (the names of loaded modules).

use super::offsets::InstanceDict;
use super::{Fault, Interpreter};
use crate::runtime::memory::TargetMemory;

/// The kind is in the three bits from here on, then one bit each for compact and ASCII; with 2 bits of `interned`.
const USUAL_SHIFT: u32 = 2;
const SHIFTS: [u32; 3] = [USUAL_SHIFT, 8, 16];
/// Kind 1, compact, ASCII.
const ASCII_STATE: u32 = 0b11001;
/// More entries than this in one dict are not looked at.
const MAX_ENTRIES: u64 = 1 << 16;
/// A name that is looked for is shorter than this.
const MAX_NAME: usize = 64;

/// `dk_kind` of a dict's keys (`pycore_dict.h`).
const KEYS_GENERAL: u8 = 0;
const KEYS_SPLIT: u8 = 2;

/// `PyTypeObject` (`cpython/object.h`); the same in all supported versions.
const TYPE_NAME: u64 = 24;
const TYPE_BASIC_SIZE: u64 = 32;
const TYPE_FLAGS: u64 = 168;
const TYPE_MEMBERS: u64 = 240;
const TYPE_BASE: u64 = 256;
const TYPE_DICT: u64 = 264;
const TYPE_DICT_OFFSET: u64 = 288;
/// Bytes of a `PyMemberDef`, and the type of one that is a slot (`Py_T_OBJECT_EX`).
const MEMBER_DEF: u64 = 40;
const MEMBER_OBJECT: u64 = 16;
const MAX_MEMBERS: u64 = 64;
const MAX_BASES: usize = 8;
const FLAG_INLINE_VALUES: u64 = 1 << 2;
const FLAG_MANAGED_DICT: u64 = 1 << 4;
const FLAG_TUPLE: u64 = 1 << 26;

/// How a build keeps `str` and `bytes` objects.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text {
    pub str_type: u64,
    pub bytes_type: u64,
    pub length: usize,
    pub state: usize,
    pub shift: u32,
    pub ascii_data: usize,
    pub compact_data: usize,
    pub bytes_data: usize,
}

/// Where a string's characters are.
struct Characters {
    count: usize,
    width: usize,
    start: usize,
}

impl Text {
    fn characters(&self, object: &[u8]) -> Option<Characters> {
        if word(object, 8)? != self.str_type {
            return None;
        }
        let count = usize::try_from(word(object, self.length)?).ok()?;
        let state = u32::try_from(word(object, self.state)? & 0xffff_ffff).ok()? >> self.shift;
        let (width, compact, ascii) = ((state & 7) as usize, state >> 3 & 1 == 1, state >> 4 & 1 == 1);
        if !compact || !matches!(width, 1 | 2 | 4) {
            return None;
        }
        Some(Characters { count, width, start: if ascii { self.ascii_data } else { self.compact_data } })
    }

    /// The text of a `str` object of which `object` is the beginning, as far as that goes; `None`: not a `str`.
    pub fn decode_str(&self, object: &[u8]) -> Option<String> {
        let characters = self.characters(object)?;
        let end = characters.count.saturating_mul(characters.width).saturating_add(characters.start).min(object.len());
        Some(repair(object.get(characters.start..end)?, characters.width))
    }

    /// The same for a `bytes` object, UTF-8-repaired.
    pub fn decode_bytes(&self, object: &[u8]) -> Option<String> {
        if word(object, 8)? != self.bytes_type {
            return None;
        }
        let length = usize::try_from(word(object, 16)?).ok()?;
        let end = length.saturating_add(self.bytes_data).min(object.len());
        Some(String::from_utf8_lossy(object.get(self.bytes_data..end)?).into_owned())
    }
}

/// Characters of `width` bytes each; lone surrogates become U+FFFD.
fn repair(bytes: &[u8], width: usize) -> String {
    let character = |code: u32| char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER);
    match width {
        1 => bytes.iter().map(|&byte| char::from(byte)).collect(),
        2 => bytes.as_chunks::<2>().0.iter().map(|unit| character(u16::from_le_bytes(*unit).into())).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|unit| character(u32::from_le_bytes(*unit))).collect(),
    }
}

pub(super) fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

impl Interpreter {
    /// How this interpreter keeps text.
    pub(super) fn text(&self) -> Text {
        Text {
            str_type: self.anchors.str_type,
            bytes_type: self.anchors.bytes_type,
            length: self.offsets.layout.str_length.into(),
            state: self.offsets.str_state as usize,
            shift: self.str_shift(),
            ascii_data: self.offsets.layout.str_ascii_data.into(),
            compact_data: self.offsets.str_compact_data as usize,
            bytes_data: self.offsets.layout.bytes_data.into(),
        }
    }

    fn str_shift(&self) -> u32 {
        if let Some(shift) = self.str_shift.get() {
            return *shift;
        }
        match self.learn_str_shift() {
            Some(shift) => *self.str_shift.get_or_init(|| shift),
            // Too early in the interpreter's life; the next call tries again.
            None => USUAL_SHIFT,
        }
    }

    fn learn_str_shift(&self) -> Option<u32> {
        let interpreter = self.memory.field(self.anchors.runtime, self.offsets.interpreters_head).ok()?;
        let modules = self.memory.field(interpreter, self.offsets.modules).ok()?;
        let (mut votes, mut names) = ([0; SHIFTS.len()], 0);
        for (name, _) in self.dict_entries(modules).ok()?.into_iter().take(8) {
            let state = self.memory.u32(name.wrapping_add(self.offsets.str_state)).ok()?;
            names += 1;
            for (vote, shift) in votes.iter_mut().zip(SHIFTS) {
                *vote += usize::from(state >> shift & 0b11111 == ASCII_STATE);
            }
        }
        (0..SHIFTS.len()).find(|&n| names > 0 && votes[n] == names).map(|n| SHIFTS[n])
    }

    /// The `str` at `address`, its characters cut at `limit`.
    pub(super) fn str(&self, address: u64, limit: usize) -> Result<String, Fault> {
        let text = self.text();
        let header = self.memory.bytes(address, text.ascii_data)?;
        let characters = text.characters(&header).ok_or(Fault::Unexpected { address, expected: "a str" })?;
        let length = characters.count.min(limit) * characters.width;
        let bytes = self.memory.bytes(address.wrapping_add(characters.start as u64), length)?;
        Ok(repair(&bytes, characters.width))
    }

    /// The `bytes` at `address`, cut at `limit`.
    pub(super) fn bytes(&self, address: u64, limit: usize) -> Result<Vec<u8>, Fault> {
        if self.type_of(address)? != self.anchors.bytes_type {
            return Err(Fault::Unexpected { address, expected: "bytes" });
        }
        let length = self.memory.field(address, self.offsets.layout.var_size)?.min(limit as u64);
        self.memory.bytes(address.wrapping_add(self.offsets.layout.bytes_data.into()), length as usize)
    }

    fn is_str(&self, address: u64, expected: &str) -> bool {
        // One read decides about most strings: those of another length.
        self.memory.field(address, self.offsets.layout.str_length) == Ok(expected.len() as u64)
            && self.str(address, MAX_NAME).is_ok_and(|text| text == expected)
    }

    pub(super) fn type_of(&self, object: u64) -> Result<u64, Fault> {
        self.memory.field(object, self.offsets.layout.ob_type)
    }

    /// The last part of its type's name: `Task` of `_asyncio.Task`.
    pub(super) fn type_name(&self, object: u64) -> Result<String, Fault> {
        let name = self.memory.field(self.type_of(object)?, TYPE_NAME)?;
        let name = self.memory.c_string(name, 128)?;
        Ok(name.rsplit('.').next().unwrap_or_default().to_owned())
    }

    /// A class's name and the module that it says to be of, each cut at `limit`; of a class that Python code made.
    pub(super) fn class_name(&self, class: u64, limit: usize) -> Result<(String, String), Fault> {
        let name = self.memory.c_string(self.memory.field(class, TYPE_NAME)?, limit)?;
        let module = self.dict_get(self.memory.field(class, TYPE_DICT)?, "__module__")?;
        Ok((name, module.map_or(Ok(String::new()), |module| self.str(module, limit))?))
    }

    /// What a class derives from first; 0: nothing.
    pub(super) fn base(&self, class: u64) -> Result<u64, Fault> {
        self.memory.field(class, TYPE_BASE)
    }

    pub(super) fn is_tuple(&self, object: u64) -> Result<bool, Fault> {
        Ok(self.memory.field(self.type_of(object)?, TYPE_FLAGS)? & FLAG_TUPLE != 0)
    }

    /// Keys and values of a dict.
    pub(super) fn dict_entries(&self, dict: u64) -> Result<Vec<(u64, u64)>, Fault> {
        let keys = self.memory.field(dict, self.offsets.layout.dict_keys)?;
        let values = self.memory.field(dict, self.offsets.dict_values)?;
        self.entries(keys, values)
    }

    /// Entries of a `PyDictKeysObject`, with `values` (a `PyDictValues`) when it is shared by several instances.
    fn entries(&self, keys: u64, values: u64) -> Result<Vec<(u64, u64)>, Fault> {
        let unexpected = Fault::Unexpected { address: keys, expected: "a dict's keys" };
        let header = self.memory.bytes(keys, 32)?;
        let (log2_index_bytes, kind) = (header[9], header[10]);
        let count = word(&header, 24).filter(|&count| count <= MAX_ENTRIES).ok_or(unexpected)?;
        if log2_index_bytes > 31 || kind > KEYS_SPLIT {
            return Err(unexpected);
        }
        let start = keys.wrapping_add(32 + (1 << log2_index_bytes));
        let (stride, first) = if kind == KEYS_GENERAL { (3, 1) } else { (2, 0) };
        let mut words = Vec::new();
        for at in (0..count * stride).step_by(1 << 14) {
            words.extend(self.memory.words(start.wrapping_add(at * 8), (count * stride - at).min(1 << 14) as usize)?);
        }
        let mut entries: Vec<(u64, u64)> =
            words.chunks_exact(stride as usize).map(|entry| (entry[first], entry[first + 1])).collect();
        if kind == KEYS_SPLIT && values != 0 {
            let values = self.memory.words(values.wrapping_add(self.offsets.values_start), count as usize)?;
            for (entry, value) in entries.iter_mut().zip(values) {
                entry.1 = value;
            }
        }
        entries.retain(|(key, value)| *key != 0 && *value != 0);
        Ok(entries)
    }

    /// The value under a `str` key.
    pub(super) fn dict_get(&self, dict: u64, name: &str) -> Result<Option<u64>, Fault> {
        if self.type_of(dict)? != self.anchors.dict_type {
            return Err(Fault::Unexpected { address: dict, expected: "a dict" });
        }
        Ok(self.named(&self.dict_entries(dict)?, name))
    }

    fn named(&self, entries: &[(u64, u64)], name: &str) -> Option<u64> {
        entries.iter().find(|(key, _)| self.is_str(*key, name)).map(|(_, value)| *value)
    }

    /// An attribute that the instance itself holds, in its dict or a slot: nothing of its class, and nothing computed.
    pub(super) fn attribute(&self, object: u64, name: &str) -> Result<Option<u64>, Fault> {
        match self.dict_attribute(object, name)? {
            None => self.slot(object, name),
            value => Ok(value),
        }
    }

    /// The value in one of the type's or its bases' `__slots__`.
    fn slot(&self, object: u64, name: &str) -> Result<Option<u64>, Fault> {
        let mut of_type = self.type_of(object)?;
        for _ in 0..MAX_BASES {
            if of_type == 0 {
                break;
            }
            let members = self.memory.field(of_type, TYPE_MEMBERS)?;
            for n in 0..MAX_MEMBERS {
                if members == 0 {
                    break;
                }
                // Name, type, offset: the start of a `PyMemberDef` (`descrobject.h`).
                let member = self.memory.words(members.wrapping_add(n * MEMBER_DEF), 3)?;
                match member[0] {
                    0 => break,
                    of if self.memory.c_string(of, MAX_NAME)? != name => {}
                    _ if member[1] & 0xffff_ffff != MEMBER_OBJECT => return Ok(None),
                    _ => return Ok(Some(self.memory.field(object, member[2])?).filter(|&value| value != 0)),
                }
            }
            of_type = self.base(of_type)?;
        }
        Ok(None)
    }

    fn dict_attribute(&self, object: u64, name: &str) -> Result<Option<u64>, Fault> {
        let of_type = self.type_of(object)?;
        let flags = self.memory.field(of_type, TYPE_FLAGS)?;
        if flags & FLAG_MANAGED_DICT == 0 {
            let offset = self.memory.field(of_type, TYPE_DICT_OFFSET)?;
            // Negative: counted from the end, as only ints and tuples do.
            if offset == 0 || offset >= 1 << 16 {
                return Ok(None);
            }
            let dict = self.memory.field(object, offset)?;
            return if dict == 0 { Ok(None) } else { self.dict_get(dict, name) };
        }
        let values_of_instance = |values: u64| {
            let keys = self.memory.field(of_type, self.offsets.cached_keys)?;
            Ok(self.named(&self.entries(keys, values)?, name))
        };
        let before = |distance: u64| self.memory.u64(object.wrapping_sub(distance));
        let dict = match self.offsets.instance_dict {
            InstanceDict::ValuesOrDict => match before(32)? {
                0 => before(24)?,
                values => return values_of_instance(values),
            },
            InstanceDict::Tagged => match before(24)? {
                tagged if tagged & 1 == 1 => return values_of_instance(tagged.wrapping_add(1)),
                dict => dict,
            },
            InstanceDict::Inline => match before(24)? {
                0 if flags & FLAG_INLINE_VALUES != 0 => {
                    return values_of_instance(object.wrapping_add(self.memory.field(of_type, TYPE_BASIC_SIZE)?));
                }
                dict => dict,
            },
        };
        if dict == 0 { Ok(None) } else { self.dict_get(dict, name) }
    }

    /// The items of a tuple, at most `limit`.
    pub(super) fn tuple(&self, tuple: u64, limit: usize) -> Result<Vec<u64>, Fault> {
        let count = self.memory.field(tuple, self.offsets.layout.var_size)?;
        self.memory.words(tuple.wrapping_add(self.offsets.layout.tuple_items.into()), count.min(limit as u64) as usize)
    }

    /// The object in a cell; 0: empty.
    pub(super) fn cell(&self, cell: u64) -> u64 {
        self.memory.field(cell, self.offsets.layout.cell_ref).unwrap_or(0)
    }

    /// What is in `object` if that is a cell, else `object`; `None`: nothing, or no object at all.
    pub(super) fn behind_cell(&self, mut object: u64) -> Result<Option<u64>, Fault> {
        if object >= 4096 && self.type_of(object)? == self.anchors.cell_type {
            object = self.cell(object);
        }
        Ok(Some(object).filter(|&object| object >= 4096))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STR_TYPE: u64 = 0x1000;
    const BYTES_TYPE: u64 = 0x2000;

    fn text(shift: u32) -> Text {
        Text {
            str_type: STR_TYPE,
            bytes_type: BYTES_TYPE,
            length: 16,
            state: 32,
            shift,
            ascii_data: 40,
            compact_data: 56,
            bytes_data: 32,
        }
    }

    fn object(of_type: u64, length: u64, state: u64, data: (usize, &[u8])) -> Vec<u8> {
        let mut object = Vec::new();
        for word in [1, of_type, length, 0, state] {
            object.extend_from_slice(&u64::to_le_bytes(word));
        }
        object.resize(data.0, 0);
        object.extend_from_slice(data.1);
        object
    }

    #[test]
    fn strings_of_every_kind() {
        let check = |state: u64, length, data, expected: &str| {
            for shift in SHIFTS {
                let object = object(STR_TYPE, length, state << shift | 1, data);
                assert_eq!(text(shift).decode_str(&object).as_deref(), Some(expected));
            }
        };
        check(0b11001, 3, (40, b"abcd"), "abc");
        check(0b01001, 2, (56, b"\xe9\xff"), "éÿ");
        check(0b01010, 2, (56, b"\xac\x20\x00\xd8"), "€\u{fffd}");
        check(0b01100, 2, (56, b"\x00\xf6\x01\0\0\xd8\0\0"), "😀\u{fffd}");
        // Only the head was copied.
        check(0b11001, 300, (40, b"/long"), "/long");
        check(0b11001, u64::MAX >> 1, (40, b""), "");
    }

    #[test]
    fn what_is_no_string_is_none() {
        let text = text(2);
        assert_eq!(text.decode_str(&[0; 320]), None);
        assert_eq!(text.decode_bytes(&[0; 168]), None);
        assert_eq!(text.decode_str(&object(BYTES_TYPE, 1, 0b11001 << 2, (40, b"a"))), None);
        // Neither compact, nor of a known width.
        assert_eq!(text.decode_str(&object(STR_TYPE, 1, 0b10001 << 2, (40, b"a"))), None);
        assert_eq!(text.decode_str(&object(STR_TYPE, 1, 0b11011 << 2, (40, b"a"))), None);
    }

    #[test]
    fn bytes_are_repaired() {
        let object = object(BYTES_TYPE, 4, u64::from_le_bytes(*b"a\xffbcdefg"), (40, b"xyz"));
        assert_eq!(text(2).decode_bytes(&object).as_deref(), Some("a\u{fffd}bc"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_harmless(mut object in proptest::collection::vec(any::<u8>(), 0..400), typed: bool) {
            if typed && object.len() >= 16 {
                object[8..16].copy_from_slice(&STR_TYPE.to_le_bytes());
            }
            for shift in SHIFTS {
                text(shift).decode_str(&object);
                text(shift).decode_bytes(&object);
            }
        }
    }
}
