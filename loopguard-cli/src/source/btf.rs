//! Finds where the running kernel keeps a struct's field, from its BTF (Documentation/bpf/btf.rst).

use std::{fs, io, path::Path};

/// Where the kernel shows its own BTF.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;

/// Byte offset of `field`, a direct member of `struct name`.
pub fn field_offset(btf: &[u8], name: &str, field: &str) -> Option<u32> {
    let word = |at: usize| Some(u32::from_le_bytes(btf.get(at..at + 4)?.try_into().ok()?));
    if u16::from_le_bytes(btf.get(..2)?.try_into().ok()?) != MAGIC {
        return None;
    }
    let header = word(4)? as usize;
    let types = header + word(8)? as usize;
    let types_end = types + word(12)? as usize;
    let strings = header + word(16)? as usize;
    let is_named = |offset: u32, wanted: &str| {
        let start = strings + offset as usize;
        btf.get(start..start + wanted.len() + 1)
            .is_some_and(|bytes| &bytes[..wanted.len()] == wanted.as_bytes() && bytes[wanted.len()] == 0)
    };
    let mut at = types;
    while at < types_end {
        let (name_offset, info) = (word(at)?, word(at + 4)?);
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        let body = at + 12;
        if kind == KIND_STRUCT && is_named(name_offset, name) {
            for member in (0..count).map(|i| body + i * 12) {
                if is_named(word(member)?, field) {
                    // With the kind flag, the top byte is a bit field's size.
                    let bits = if info >> 31 != 0 { word(member + 8)? & 0xff_ffff } else { word(member + 8)? };
                    return Some(bits / 8);
                }
            }
        }
        at = body
            + match kind {
                // int, variable, declaration tag
                1 | 14 | 17 => 4,
                // array
                3 => 12,
                // struct, union, data section, 64-bit enum
                4 | 5 | 15 | 19 => count * 12,
                // enum, function prototype
                6 | 13 => count * 8,
                _ => 0,
            };
    }
    None
}

/// The running kernel's BTF.
pub fn read_vmlinux() -> io::Result<Vec<u8>> {
    fs::read(Path::new(VMLINUX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The BTF of one `struct task { int a; int pid; }` after an int, as the kernel lays it out.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0task\0a\0pid\0";
        let mut types = Vec::new();
        let mut push = |words: &[u32]| words.iter().for_each(|word| types.extend(word.to_le_bytes()));
        push(&[1, 1 << 24, 4, 32]);
        push(&[5, 4 << 24 | 2, 8, 10, 1, 0, 12, 1, 32]);
        let mut btf = Vec::new();
        btf.extend(MAGIC.to_le_bytes());
        btf.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            btf.extend(u32::to_le_bytes(word));
        }
        btf.extend(types);
        btf.extend(strings);
        btf
    }

    #[test]
    fn finds_a_member() {
        assert_eq!(field_offset(&sample(), "task", "pid"), Some(4));
        assert_eq!(field_offset(&sample(), "task", "pi"), None);
        assert_eq!(field_offset(&sample(), "tas", "pid"), None);
    }

    #[test]
    fn truncated_input_is_no_answer() {
        let whole = sample();
        for end in 0..whole.len() - 4 {
            assert_eq!(field_offset(&whole[..end], "task", "pid"), None, "cut at {end}");
        }
    }
}
