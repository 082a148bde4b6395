//! Turns a function's code into a place at which the kernel can probe without single-stepping.
//!
//! The kernel emulates few instructions (`arch/x86/kernel/uprobes.c`); a probe on any other costs a single step, about
//! thirty times as much. So a probe goes on the first one it emulates among those that every call runs exactly once:
//! the function's entry block.

use std::path::PathBuf;

use super::elf::Image;

/// A function of unknown size is looked through this far, or to where `.eh_frame_hdr` says the next one starts.
pub const MAX_FUNCTION: u64 = 4096;

/// Where to put a uprobe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeSite {
    /// A path the kernel can open, in whatever mount namespace the target is.
    pub file: PathBuf,
    /// Offset in that file, in bytes.
    pub offset: u64,
    /// The instruction there, and how far it is into the function.
    pub instruction: String,
}

/// Bytes from `entry` to the start of the next function with unwind information, by the sorted table in `.eh_frame_hdr`
/// (Linux Standard Base, "Exception Frames").
pub fn function_limit(image: &Image, entry: u64) -> u64 {
    next_function(image, entry).map_or(MAX_FUNCTION, |next| next - entry)
}

fn next_function(image: &Image, entry: u64) -> Option<u64> {
    function_starts(image)?.into_iter().filter(|&start| start > entry).min()
}

/// Where functions with unwind information start.
pub fn function_starts(image: &Image) -> Option<Vec<u64>> {
    let (address, bytes) = image.section_bytes(".eh_frame_hdr")?;
    // Version 1, a pointer, a four-byte count, and a table of four-byte pairs relative to this section.
    let [1, pointer, 0x03, 0x3b] = *bytes.first_chunk::<4>()? else { return None };
    if pointer & 0x0f != 0x0b {
        return None;
    }
    let pairs = bytes.get(12..)?.as_chunks::<8>().0;
    let starts = pairs.iter().map(|pair| {
        let [a, b, c, d, ..] = *pair;
        address.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into())
    });
    Some(starts.collect())
}

/// How far into the function `code` (which starts at address `entry`) to probe, and what stands there.
#[cfg(target_arch = "x86_64")]
pub fn entry_block_site(code: &[u8], entry: u64) -> Result<(u64, String), String> {
    use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};

    let mut site: Option<(u64, Emulated)> = None;
    let mut decoder = Decoder::with_ip(64, code, entry, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if instruction.is_invalid() {
            break;
        }
        let at = instruction.ip().wrapping_sub(entry);
        let bytes = code.get(at as usize..at as usize + instruction.len()).unwrap_or_default();
        match (emulated(bytes), &site) {
            (Some(Emulated::LongNop), None) => site = Some((at, Emulated::LongNop)),
            (Some(kind), _) if kind != Emulated::LongNop => {
                site = Some((at, kind));
                break;
            }
            _ => {}
        }
        if instruction.flow_control() != FlowControl::Next {
            break;
        }
    }
    let Some((site, kind)) = site else {
        return Err("its entry block has no instruction that the kernel emulates".to_owned());
    };
    // A loop back to here would be counted as another call.
    let mut decoder = Decoder::with_ip(64, code, entry, DecoderOptions::NONE);
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if instruction.is_invalid() {
            break;
        }
        let branches = matches!(
            instruction.flow_control(),
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::XbeginXabortXend
        );
        let target = instruction.near_branch_target().wrapping_sub(entry);
        if branches && 0 < target && target <= site {
            return Err(format!("its code loops back over the probe's place (to +{target:#x})"));
        }
        // Where the code starts with the probe's place, a jump to its start passes the probe as well.
        if branches && site == 0 && target == 0 && instruction.ip() != entry {
            return Err("its code jumps back to its own start".to_owned());
        }
    }
    Ok((site, kind.name().to_owned()))
}

#[cfg(not(target_arch = "x86_64"))]
pub fn entry_block_site(_code: &[u8], _entry: u64) -> Result<(u64, String), String> {
    Err("step probes are placed on x86_64 only so far".to_owned())
}

/// What the kernel emulates instead of single-stepping it.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Emulated {
    Push,
    Nop,
    /// Only newer kernels emulate it, so it is the second choice.
    LongNop,
    Jump,
    Call,
}

#[cfg(target_arch = "x86_64")]
impl Emulated {
    fn name(self) -> &'static str {
        match self {
            Self::Push => "push",
            Self::Nop => "nop",
            Self::LongNop => "long nop",
            Self::Jump => "jump",
            Self::Call => "call",
        }
    }
}

/// `push_setup_xol_ops` and `branch_setup_xol_ops` of `arch/x86/kernel/uprobes.c`; no prefixes but `push`'s REX.B.
#[cfg(target_arch = "x86_64")]
fn emulated(instruction: &[u8]) -> Option<Emulated> {
    match instruction {
        [0x50..=0x57] | [0x41, 0x50..=0x57] => Some(Emulated::Push),
        [0x90] => Some(Emulated::Nop),
        [0x0f, 0x1f, ..] => Some(Emulated::LongNop),
        [0xeb, _] | [0xe9, _, _, _, _] | [0x70..=0x7f, _] | [0x0f, 0x80..=0x8f, ..] => Some(Emulated::Jump),
        [0xe8, _, _, _, _] => Some(Emulated::Call),
        _ => None,
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(code: &[u8], expected: Result<(u64, &str), &str>) {
        match (entry_block_site(code, 0x4000), expected) {
            (Ok((offset, instruction)), Ok(expected)) => assert_eq!((offset, instruction.as_str()), expected),
            (Err(why), Err(expected)) => assert!(why.contains(expected), "{why}"),
            (got, expected) => panic!("{got:?}, not {expected:?}"),
        }
    }

    const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
    const SUB_RSP: [u8; 4] = [0x48, 0x83, 0xec, 0x18];
    const RET: [u8; 1] = [0xc3];

    #[test]
    fn the_first_emulated_instruction_of_the_entry_block() {
        check(&[0x55, 0x48, 0x89, 0xe5, 0xc3], Ok((0, "push")));
        check(&[&ENDBR64[..], &[0x41, 0x54], &RET].concat(), Ok((4, "push")));
        // test edx, edx; jne +0; ret
        check(&[&ENDBR64[..], &SUB_RSP, &[0x85, 0xd2, 0x75, 0], &RET].concat(), Ok((10, "jump")));
        check(&[&SUB_RSP[..], &[0xe8, 1, 2, 3, 4], &RET].concat(), Ok((4, "call")));
        check(&[&SUB_RSP[..], &[0x0f, 0x84, 0, 0, 0, 0], &RET].concat(), Ok((4, "jump")));
        check(&[0x90, 0xc3], Ok((0, "nop")));
    }

    #[test]
    fn a_long_nop_only_where_there_is_nothing_else() {
        let nop5 = [0x0f, 0x1f, 0x44, 0, 0];
        check(&[&nop5[..], &RET].concat(), Ok((0, "long nop")));
        check(&[&nop5[..], &[0x53], &RET].concat(), Ok((5, "push")));
        // Prefixed ones are not among those every kernel knows.
        check(&[0x66, 0x90, 0xc3], Err("no instruction"));
    }

    #[test]
    fn never_past_the_entry_block() {
        check(&[&SUB_RSP[..], &RET, &[0x55]].concat(), Err("no instruction"));
        // jmp *rax; push rbp
        check(&[0xff, 0xe0, 0x55], Err("no instruction"));
        // call *rax; push rbp
        check(&[0xff, 0xd0, 0x55], Err("no instruction"));
        check(&ENDBR64, Err("no instruction"));
        check(&[], Err("no instruction"));
        check(&[0x06, 0x55], Err("no instruction"));
    }

    #[test]
    fn never_where_a_loop_comes_by_again() {
        // endbr64; push rbx; ... jmp back to the push
        check(&[&ENDBR64[..], &[0x53, 0x85, 0xd2, 0x74, 2, 0xeb, 0xf9], &RET].concat(), Err("loops back"));
        // The same to the instruction after it.
        check(&[&ENDBR64[..], &[0x53, 0x85, 0xd2, 0x74, 2, 0xeb, 0xfa], &RET].concat(), Ok((4, "push")));
        // push rbx; jmp back to the start
        check(&[0x53, 0x85, 0xd2, 0x74, 2, 0xeb, 0xf9, 0xc3], Err("own start"));
    }

    proptest! {
        #[test]
        fn any_code_is_harmless(code in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok((offset, _)) = entry_block_site(&code, u64::MAX - 100) {
                prop_assert!((offset as usize) < code.len());
            }
            let _ = entry_block_site(&code, 0x4000);
        }
    }
}
