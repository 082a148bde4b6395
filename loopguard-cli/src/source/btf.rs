//! Answers what the kernel looks like inside, from its BTF (Documentation/bpf/btf.rst): where a struct keeps a field,
//! which values an enum has, and what a tracepoint passes.

use std::{fs, io, path::Path};

/// Where the kernel shows its own BTF.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const KIND_POINTER: u32 = 2;
const KIND_STRUCT: u32 = 4;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNCTION_TYPE: u32 = 13;
const KIND_ENUM_64: u32 = 19;
/// Bytes of `struct btf_type`, which a kind's own data follows.
const TYPE_BYTES: usize = 12;

/// The kernel's types.
pub struct KernelTypes {
    btf: Vec<u8>,
    /// Start of the strings.
    strings: usize,
    /// Where each type stands; the type with number 1 is the first.
    types: Vec<u32>,
}

/// What a tracepoint passes at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    Pointer,
    Value,
}

#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    has_bit_fields: bool,
    count: usize,
    /// The type that a pointer, typedef or function type refers to.
    refers_to: u32,
    /// Where its own data starts.
    body: usize,
}

impl KernelTypes {
    /// `None` if this is no BTF, or it is cut off.
    pub fn parse(btf: Vec<u8>) -> Option<Self> {
        let word = |at: usize| word(&btf, at).map(|word| word as usize);
        if u16::from_le_bytes(*btf.first_chunk()?) != MAGIC {
            return None;
        }
        let header = word(4)?;
        let (first, length) = (header.checked_add(word(8)?)?, word(12)?);
        let (strings, end) = (header.checked_add(word(16)?)?, first.checked_add(length)?);
        if btf.get(first..end).is_none() || strings.checked_add(word(20)?)? > btf.len() {
            return None;
        }
        let mut known = Self { btf, strings, types: Vec::new() };
        let mut at = first;
        while at < end {
            known.types.push(u32::try_from(at).ok()?);
            let found = known.type_at(at)?;
            at = found.body.checked_add(found.own_data())?;
        }
        Some(known)
    }

    /// Byte offset of `field`, a direct member of `struct name`.
    pub fn field_offset(&self, name: &str, field: &str) -> Option<u32> {
        self.all(KIND_STRUCT, name).find_map(|found| {
            let member = (0..found.count).map(|i| found.body + i * 12).find(|at| self.is_named_at(*at, field))?;
            let offset = word(&self.btf, member + 8)?;
            // With the kind flag, the top byte is a bit field's size.
            Some(if found.has_bit_fields { offset & 0xff_ffff } else { offset } / 8)
        })
    }

    /// Whether `enum name` has this value.
    pub fn has_enumerator(&self, name: &str, value: &str) -> bool {
        [(KIND_ENUM, 8), (KIND_ENUM_64, 12)].iter().any(|(kind, bytes)| {
            let mut found = self.all(*kind, name);
            found.any(|found| (0..found.count).any(|i| self.is_named_at(found.body + i * bytes, value)))
        })
    }

    /// What a tracepoint passes to BPF programs, in order.
    pub fn tracepoint(&self, name: &str) -> Option<Vec<Argument>> {
        let typedef = self.all(KIND_TYPEDEF, &format!("btf_trace_{name}")).next()?;
        let pointer = self.numbered(typedef.refers_to).filter(|found| found.kind == KIND_POINTER)?;
        let function = self.numbered(pointer.refers_to).filter(|found| found.kind == KIND_FUNCTION_TYPE)?;
        // The first is the tracer's own data, which programs don't get.
        (1..function.count)
            .map(|i| {
                let parameter = self.numbered(word(&self.btf, function.body + i * 8 + 4)?)?;
                Some(if parameter.kind == KIND_POINTER { Argument::Pointer } else { Argument::Value })
            })
            .collect()
    }

    fn all<'a>(&'a self, kind: u32, name: &'a str) -> impl Iterator<Item = Type> + 'a {
        let types = self.types.iter().filter_map(|at| self.type_at(*at as usize));
        types.filter(move |found| found.kind == kind && self.is_named(found.name, name))
    }

    fn numbered(&self, number: u32) -> Option<Type> {
        self.type_at(*self.types.get((number as usize).checked_sub(1)?)? as usize)
    }

    fn type_at(&self, at: usize) -> Option<Type> {
        let (name, info, refers_to) = (word(&self.btf, at)?, word(&self.btf, at + 4)?, word(&self.btf, at + 8)?);
        Some(Type {
            name,
            kind: info >> 24 & 0x1f,
            has_bit_fields: info >> 31 != 0,
            count: (info & 0xffff) as usize,
            refers_to,
            body: at + TYPE_BYTES,
        })
    }

    fn is_named_at(&self, at: usize, wanted: &str) -> bool {
        word(&self.btf, at).is_some_and(|offset| self.is_named(offset, wanted))
    }

    fn is_named(&self, offset: u32, wanted: &str) -> bool {
        let name = self.strings.checked_add(offset as usize).and_then(|start| self.btf.get(start..));
        name.and_then(|name| name.strip_prefix(wanted.as_bytes())).is_some_and(|rest| rest.first() == Some(&0))
    }
}

impl Type {
    /// Bytes that follow `struct btf_type`.
    fn own_data(self) -> usize {
        match self.kind {
            // int, variable, declaration tag
            1 | 14 | 17 => 4,
            // array
            3 => 12,
            // struct, union, data section, 64-bit enum
            4 | 5 | 15 | KIND_ENUM_64 => self.count * 12,
            // enum, function prototype
            KIND_ENUM | KIND_FUNCTION_TYPE => self.count * 8,
            _ => 0,
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The running kernel's BTF.
pub fn read_vmlinux() -> io::Result<Vec<u8>> {
    fs::read(Path::new(VMLINUX))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Builds BTF as the kernel lays it out.
    #[derive(Default)]
    pub struct Writer {
        strings: Vec<u8>,
        types: Vec<u8>,
        count: u32,
    }

    impl Writer {
        fn string(&mut self, text: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            let at = self.strings.len() as u32;
            self.strings.extend(text.bytes().chain([0]));
            at
        }

        /// Its number.
        fn push(&mut self, words: &[u32]) -> u32 {
            words.iter().for_each(|word| self.types.extend(word.to_le_bytes()));
            self.count += 1;
            self.count
        }

        pub fn int(&mut self, name: &str) -> u32 {
            let name = self.string(name);
            self.push(&[name, 1 << 24, 4, 32])
        }

        pub fn pointer(&mut self, to: u32) -> u32 {
            self.push(&[0, KIND_POINTER << 24, to])
        }

        /// Fields of four bytes, one after the other.
        pub fn structure(&mut self, name: &str, fields: &[&str], field_type: u32) -> u32 {
            let mut words = vec![self.string(name), KIND_STRUCT << 24 | fields.len() as u32, 4 * fields.len() as u32];
            for (i, field) in fields.iter().enumerate() {
                words.extend([self.string(field), field_type, 32 * i as u32]);
            }
            self.push(&words)
        }

        pub fn enumeration(&mut self, name: &str, values: &[&str]) -> u32 {
            let mut words = vec![self.string(name), KIND_ENUM << 24 | values.len() as u32, 4];
            for (i, value) in values.iter().enumerate() {
                words.extend([self.string(value), i as u32]);
            }
            self.push(&words)
        }

        pub fn tracepoint(&mut self, name: &str, parameters: &[u32]) {
            let mut words = vec![0, KIND_FUNCTION_TYPE << 24 | (parameters.len() + 1) as u32, 0, 0, 0];
            parameters.iter().for_each(|parameter| words.extend([0, *parameter]));
            let function = self.push(&words);
            let pointer = self.pointer(function);
            let name = self.string(&format!("btf_trace_{name}"));
            self.push(&[name, KIND_TYPEDEF << 24, pointer]);
        }

        pub fn finish(self) -> Vec<u8> {
            let mut btf = Vec::new();
            btf.extend(MAGIC.to_le_bytes());
            btf.extend([1, 0]);
            let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
            [24, 0, types, types, strings].iter().for_each(|word: &u32| btf.extend(word.to_le_bytes()));
            btf.extend(self.types);
            btf.extend(self.strings);
            btf
        }
    }

    fn sample() -> Vec<u8> {
        let mut btf = Writer::default();
        let int = btf.int("int");
        let task = btf.structure("task", &["a", "pid"], int);
        btf.enumeration("bpf_func_id", &["BPF_FUNC_unspec", "BPF_FUNC_x"]);
        let pointer = btf.pointer(task);
        btf.tracepoint("switch", &[int, pointer, pointer]);
        btf.finish()
    }

    #[test]
    fn finds_members_values_and_what_a_tracepoint_passes() {
        let types = KernelTypes::parse(sample()).unwrap();
        assert_eq!(types.field_offset("task", "pid"), Some(4));
        assert_eq!(types.field_offset("task", "pi"), None);
        assert_eq!(types.field_offset("tas", "pid"), None);
        assert!(types.has_enumerator("bpf_func_id", "BPF_FUNC_x"));
        assert!(!types.has_enumerator("bpf_func_id", "BPF_FUNC_y"));
        assert!(!types.has_enumerator("bpf_map_type", "BPF_FUNC_x"));
        assert_eq!(types.tracepoint("switch"), Some(vec![Argument::Value, Argument::Pointer, Argument::Pointer]));
        assert_eq!(types.tracepoint("wakeup"), None);
    }

    #[test]
    fn truncated_input_is_no_answer() {
        let whole = sample();
        for end in 0..whole.len() {
            assert!(KernelTypes::parse(whole[..end].to_vec()).is_none(), "cut at {end}");
        }
    }
}
