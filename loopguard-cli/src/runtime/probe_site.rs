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

    let mut instruction = Instruction::default();
    let Some((site, kind)) = first_emulated(code, entry) else {
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

/// How far behind address `at`, where `code` is, to probe what runs whenever `at` does. Other code may come by there as
/// well: whoever places the probe must be able to tell.
#[cfg(target_arch = "x86_64")]
pub fn straight_line_site(code: &[u8], at: u64) -> Result<(u64, String), String> {
    match first_emulated(code, at) {
        Some((site, kind)) => Ok((site, kind.name().to_owned())),
        None => Err("no instruction that the kernel emulates follows".to_owned()),
    }
}

/// The first instruction of the straight line from `at` on that the kernel emulates.
#[cfg(target_arch = "x86_64")]
fn first_emulated(code: &[u8], at: u64) -> Option<(u64, Emulated)> {
    use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};

    let mut long_nop = None;
    let mut decoder = Decoder::with_ip(64, code, at, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if instruction.is_invalid() {
            break;
        }
        let distance = instruction.ip().wrapping_sub(at);
        let bytes = code.get(distance as usize..distance as usize + instruction.len()).unwrap_or_default();
        match emulated(bytes) {
            Some(Emulated::LongNop) => long_nop = long_nop.or(Some((distance, Emulated::LongNop))),
            Some(kind) => return Some((distance, kind)),
            None => {}
        }
        if instruction.flow_control() != FlowControl::Next {
            break;
        }
    }
    long_nop
}

/// What a stretch of straight-line code does to the registers that a probe behind it looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// How far the stack pointer is below where it was, in bytes; negative: above.
    pub stack_down: i64,
    /// `rdi` still holds what it did.
    pub keeps_first_argument: bool,
}

/// What the first `length` bytes of `code` do; `None` when the stack pointer can't be followed.
#[cfg(target_arch = "x86_64")]
pub fn moved(code: &[u8], length: u64) -> Option<Moved> {
    use iced_x86::{Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess, Register};

    let mut moved = Moved { stack_down: 0, keeps_first_argument: true };
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut factory = InstructionInfoFactory::new();
    while decoder.can_decode() && decoder.ip() < length {
        decoder.decode_out(&mut instruction);
        let written: Vec<Register> = factory
            .info(&instruction)
            .used_registers()
            .iter()
            .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess))
            .map(|used| used.register().full_register())
            .collect();
        moved.keeps_first_argument &= !written.contains(&Register::RDI);
        if !written.contains(&Register::RSP) {
            continue;
        }
        moved.stack_down += match instruction.code() {
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 => instruction.immediate(1) as i64,
            Code::Add_rm64_imm8 | Code::Add_rm64_imm32 => -(instruction.immediate(1) as i64),
            Code::Push_r64 => 8,
            Code::Pop_r64 => -8,
            _ => return None,
        };
    }
    Some(moved)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn straight_line_site(_code: &[u8], _at: u64) -> Result<(u64, String), String> {
    Err("probes are placed on x86_64 only so far".to_owned())
}

#[cfg(not(target_arch = "x86_64"))]
pub fn moved(_code: &[u8], _length: u64) -> Option<Moved> {
    None
}

/// How a function ends. One without any return that jumps nowhere else can only end in calls that do not come back;
/// the code that runs when such a call unwinds has no return either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Returns,
    Diverges,
    /// A jump to a function at this address.
    Jumps(u64),
    /// A jump to the function whose address stands at this one.
    JumpsThrough(u64),
}

#[cfg(target_arch = "x86_64")]
pub fn ending(code: &[u8], entry: u64) -> Ending {
    use iced_x86::{Decoder, DecoderOptions, FlowControl};

    let mut jumps = None;
    let mut calls = false;
    for instruction in Decoder::with_ip(64, code, entry, DecoderOptions::NONE).iter() {
        let inside = |target: u64| target.wrapping_sub(entry) < code.len() as u64;
        let to = match instruction.flow_control() {
            FlowControl::Return => return Ending::Returns,
            FlowControl::Call | FlowControl::IndirectCall | FlowControl::Exception if !instruction.is_invalid() => {
                calls = true;
                continue;
            }
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
                if !inside(instruction.near_branch_target()) =>
            {
                Ending::Jumps(instruction.near_branch_target())
            }
            FlowControl::IndirectBranch if instruction.is_ip_rel_memory_operand() => {
                Ending::JumpsThrough(instruction.ip_rel_memory_address())
            }
            FlowControl::IndirectBranch => return Ending::Returns,
            _ => continue,
        };
        // Two ways out: nothing simple can be said of it.
        if jumps.replace(to).is_some_and(|before| before != to) {
            return Ending::Returns;
        }
    }
    jumps.unwrap_or(if calls { Ending::Diverges } else { Ending::Returns })
}

#[cfg(not(target_arch = "x86_64"))]
pub fn ending(_code: &[u8], _entry: u64) -> Ending {
    Ending::Returns
}

/// The functions that the function `code` at `entry` calls or jumps to by their addresses.
#[cfg(target_arch = "x86_64")]
pub fn callees(code: &[u8], entry: u64) -> Vec<u64> {
    use iced_x86::{Decoder, DecoderOptions, FlowControl};

    Decoder::with_ip(64, code, entry, DecoderOptions::NONE)
        .iter()
        .filter(|instruction| {
            matches!(
                instruction.flow_control(),
                FlowControl::Call | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
            )
        })
        .map(|instruction| instruction.near_branch_target())
        .filter(|&target| target != 0 && target.wrapping_sub(entry) >= code.len() as u64)
        .collect()
}

#[cfg(not(target_arch = "x86_64"))]
pub fn callees(_code: &[u8], _entry: u64) -> Vec<u64> {
    Vec::new()
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

    #[test]
    fn what_code_in_front_of_a_probe_does() {
        let moves = |code: &[u8]| moved(code, code.len() as u64);
        let done = |stack_down, keeps_first_argument| Some(Moved { stack_down, keeps_first_argument });
        assert_eq!(moves(&[]), done(0, true));
        assert_eq!(moves(&[0x53, 0x41, 0x56, 0x48, 0x83, 0xec, 0x18]), done(40, true));
        assert_eq!(moves(&[0x48, 0x83, 0xc4, 0x10, 0x5b]), done(-24, true));
        // mov edi, 1; mov rax, [rdi+16]
        assert_eq!(moves(&[0xbf, 1, 0, 0, 0]), done(0, false));
        assert_eq!(moves(&[0x48, 0x8b, 0x47, 0x10]), done(0, true));
        // and rsp, -32
        assert_eq!(moves(&[0x48, 0x83, 0xe4, 0xe0]), None);
    }

    #[test]
    fn behind_a_call() {
        // cmp qword [r15+8], 0; jne +0xb8
        assert_eq!(
            straight_line_site(&[0x49, 0x83, 0x7f, 0x08, 0, 0x0f, 0x85, 0xb8, 0, 0, 0], 0x4000),
            Ok((5, "jump".to_owned()))
        );
        assert!(straight_line_site(&RET, 0x4000).is_err());
    }

    #[test]
    fn how_functions_end() {
        // push rax; lea rdi, [rip]; call; int3
        let panics = [0x50, 0x48, 0x8d, 0x3d, 0, 0, 0, 0, 0xff, 0x15, 1, 0, 0, 0, 0xcc, 0xcc];
        assert_eq!(ending(&panics, 0x4000), Ending::Diverges);
        assert_eq!(ending(&[0xe8, 0, 0, 0, 0, 0x0f, 0x0b], 0x4000), Ending::Diverges);
        assert_eq!(ending(&[0xe8, 0, 0, 0, 0, 0x58, 0xc3], 0x4000), Ending::Returns);
        assert_eq!(ending(&[0x90, 0xe9, 0xfa, 0xff, 0, 0], 0x4000), Ending::Jumps(0x1_4000));
        assert_eq!(ending(&[0xff, 0x25, 0x10, 0, 0, 0], 0x4000), Ending::JumpsThrough(0x4016));
        // call; jmp +1 (a landing pad); nop; call
        assert_eq!(ending(&[0xe8, 0, 0, 0, 0, 0xeb, 1, 0x90, 0xe8, 0, 0, 0, 0], 0x4000), Ending::Diverges);
        assert_eq!(ending(&[0xff, 0xe0], 0x4000), Ending::Returns);
        assert_eq!(ending(&[0x0f, 0x84, 0, 0x10, 0, 0, 0xe9, 0, 0x20, 0, 0], 0x4000), Ending::Returns);
        assert_eq!(ending(&[], 0x4000), Ending::Returns);
        assert_eq!(callees(&[0xe8, 0xfb, 0x0f, 0, 0, 0xc3], 0x4000), [0x5000]);
    }

    proptest! {
        #[test]
        fn any_code_is_harmless(code in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (moved(&code, 300), ending(&code, u64::MAX / 2), callees(&code, 1), straight_line_site(&code, 7));
            if let Ok((offset, _)) = entry_block_site(&code, u64::MAX - 100) {
                prop_assert!((offset as usize) < code.len());
            }
            let _ = entry_block_site(&code, 0x4000);
        }
    }
}
