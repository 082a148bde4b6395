//! Turns the code of a function into the rules that undo its call, where the file has no call frame information for it.
//!
//! Hand-written kernels (OpenBLAS's) have none. But a function has to find its caller itself, at its end: so its code is
//! followed from an instruction to the returns, and what the instructions on the way do to the stack pointer and to the
//! registers that belong to the caller says where the return address and those registers are now. All paths have to say
//! the same, and none may call anything; otherwise there is no answer. Only for the innermost function, whose instruction
//! pointer is exact.

use std::collections::{HashMap, hash_map::Entry};

use gimli::{Encoding, Format};
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};
use loopguard_common::records::{REGISTER_IP, REGISTER_SP};

use super::cfi::{Cfa, Row, Rule};

/// Bytes of code before and behind an instruction that are looked at.
pub const WINDOW: u64 = 32 << 10;
/// Instructions followed for one answer.
const MAX_INSTRUCTIONS: usize = 8192;

/// Registers that belong to the caller (psABI, "Registers"), with their DWARF numbers.
const SAVED: [(Register, u16); 6] = [
    (Register::RBX, 3),
    (Register::RBP, 6),
    (Register::R12, 12),
    (Register::R13, 13),
    (Register::R14, 14),
    (Register::R15, 15),
];

/// The rules at `address`, of which and around which `code` has the bytes from `start` on; `None`: the code doesn't say.
pub fn row(code: &[u8], start: u64, address: u64) -> Option<Row> {
    let mut paths = vec![(address, State::default())];
    let mut seen: HashMap<u64, Place> = HashMap::new();
    let mut answer: Option<State> = None;
    let mut facts = InstructionInfoFactory::new();
    let mut instruction = Instruction::default();
    while let Some((at, mut state)) = paths.pop() {
        // Elsewhere: what is there can't be followed, and other paths may end here.
        let Some(bytes) = at.checked_sub(start).and_then(|into| code.get(usize::try_from(into).ok()?..)) else {
            continue;
        };
        let mut decoder = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE);
        while decoder.can_decode() {
            match seen.entry(decoder.ip()) {
                Entry::Vacant(new) => new.insert(state.stack),
                // Whichever way the code came here, the stack is the same, or it is not what we take it for.
                Entry::Occupied(known) if *known.get() != state.stack => return None,
                Entry::Occupied(_) => break,
            };
            if seen.len() > MAX_INSTRUCTIONS {
                return None;
            }
            decoder.decode_out(&mut instruction);
            match instruction.flow_control() {
                FlowControl::Return => {
                    answer = Some(match answer {
                        None => state,
                        Some(known) => known.agreed(&state)?,
                    });
                    break;
                }
                FlowControl::UnconditionalBranch => {
                    paths.push((instruction.near_branch_target(), state));
                    break;
                }
                FlowControl::ConditionalBranch => paths.push((instruction.near_branch_target(), state.clone())),
                FlowControl::Next => {
                    if !state.apply(&instruction, &mut facts) {
                        return None;
                    }
                }
                // What is called may not come back, and what stands behind the call belong to other code.
                FlowControl::Call | FlowControl::IndirectCall => return None,
                // Leads out of what can be seen, or nowhere.
                _ => break,
            }
        }
    }
    answer?.row()
}

/// Where something is: so far from what a register held at the instruction asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    base: Register,
    offset: i64,
}

#[derive(Clone, Debug)]
struct State {
    /// The stack pointer.
    stack: Place,
    /// Registers that do not hold what they held, and where what they hold now was loaded from, if it was.
    changed: HashMap<Register, Option<Place>>,
}

impl Default for State {
    fn default() -> Self {
        Self { stack: Place { base: Register::RSP, offset: 0 }, changed: HashMap::new() }
    }
}

impl State {
    /// `false`: the stack pointer is lost.
    fn apply(&mut self, instruction: &Instruction, facts: &mut InstructionInfoFactory) -> bool {
        match instruction.mnemonic() {
            Mnemonic::Push => {
                self.stack.offset -= 8;
                // Pushing two bytes is nothing that a function does.
                return instruction.stack_pointer_increment() == -8;
            }
            Mnemonic::Pop if instruction.op0_kind() == OpKind::Register => {
                let from = self.stack;
                self.stack.offset += 8;
                self.load(instruction.op0_register(), Some(from));
                return instruction.stack_pointer_increment() == 8 && instruction.op0_register() != Register::RSP;
            }
            Mnemonic::Leave => {
                let Some(base) = self.place_in(Register::RBP) else { return false };
                self.stack = Place { offset: base.offset + 8, ..base };
                self.load(Register::RBP, Some(base));
                return true;
            }
            Mnemonic::Mov if instruction.op0_kind() == OpKind::Register => {
                let (to, from) = (instruction.op0_register(), instruction.op1_register());
                if to == Register::RSP {
                    let Some(place) = self.place_in(from) else { return false };
                    self.stack = place;
                    return true;
                }
                if instruction.code() == Code::Mov_r64_rm64 && instruction.op1_kind() == OpKind::Memory {
                    self.load(to, self.place_of_memory(instruction));
                    return true;
                }
            }
            Mnemonic::Lea if instruction.op0_register() == Register::RSP => {
                let Some(place) = self.place_of_memory(instruction) else { return false };
                self.stack = place;
                return true;
            }
            Mnemonic::Add | Mnemonic::Sub if instruction.op0_register() == Register::RSP => {
                let is_number = matches!(instruction.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64);
                let by = instruction.immediate(if is_number { 1 } else { return false }) as i64;
                let by = if instruction.mnemonic() == Mnemonic::Add { by } else { -by };
                self.stack.offset = self.stack.offset.wrapping_add(by);
                return true;
            }
            _ => {}
        }
        for used in facts.info(instruction).used_registers() {
            let register = used.register().full_register();
            if !matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            ) {
                continue;
            }
            if register == Register::RSP {
                return false;
            }
            if register.is_gpr() {
                self.changed.insert(register, None);
            }
        }
        true
    }

    fn load(&mut self, register: Register, from: Option<Place>) {
        self.changed.insert(register.full_register(), from);
    }

    /// A place on the stack that an instruction names by one register and a distance.
    fn place_of_memory(&self, instruction: &Instruction) -> Option<Place> {
        let is_plain = instruction.memory_index() == Register::None && instruction.segment_prefix() == Register::None;
        let base = self.place_in(instruction.memory_base()).filter(|_| is_plain)?;
        Some(Place { offset: base.offset.wrapping_add(instruction.memory_displacement64() as i64), ..base })
    }

    /// What a register holds, in terms of the registers at the start.
    fn place_in(&self, register: Register) -> Option<Place> {
        match register {
            Register::RSP => Some(self.stack),
            _ if register.is_gpr64() && !self.changed.contains_key(&register) => {
                Some(Place { base: register, offset: 0 })
            }
            _ => None,
        }
    }

    /// What two returns agree on; `None` if not even on where they return to.
    fn agreed(mut self, other: &Self) -> Option<Self> {
        if self.stack != other.stack {
            return None;
        }
        for (register, _) in SAVED {
            if self.changed.get(&register) != other.changed.get(&register) {
                self.changed.insert(register, None);
            }
        }
        Some(self)
    }

    fn row(&self) -> Option<Row> {
        let number = dwarf_number(self.stack.base)?;
        // The return address is popped last.
        let cfa = Cfa::Register { number, offset: self.stack.offset.checked_add(8)? };
        let mut registers = vec![(REGISTER_IP as u16, Rule::At(-8))];
        for (register, number) in SAVED {
            let rule = match self.changed.get(&register) {
                None => continue,
                Some(Some(place)) if place.base == self.stack.base => {
                    Rule::At(place.offset.checked_sub(self.stack.offset)?.checked_sub(8)?)
                }
                Some(_) => Rule::Undefined,
            };
            registers.push((number, rule));
        }
        let encoding = Encoding { address_size: 8, format: Format::Dwarf32, version: 1 };
        Some(Row { cfa, registers, is_signal: false, encoding })
    }
}

/// The psABI's numbers for DWARF.
fn dwarf_number(register: Register) -> Option<u16> {
    const ORDER: [Register; 16] = [
        Register::RAX,
        Register::RDX,
        Register::RCX,
        Register::RBX,
        Register::RSI,
        Register::RDI,
        Register::RBP,
        Register::RSP,
        Register::R8,
        Register::R9,
        Register::R10,
        Register::R11,
        Register::R12,
        Register::R13,
        Register::R14,
        Register::R15,
    ];
    const _: () = assert!(matches!(ORDER[REGISTER_SP], Register::RSP));
    ORDER.iter().position(|&known| known == register).map(|at| at as u16)
}

#[cfg(test)]
mod tests {
    use std::{fs, fs::File};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        runtime::{elf::Image, probe_site::function_starts},
        symbol::object::tables,
    };

    const AT: u64 = 0x1000;

    fn rules(code: &[u8]) -> Option<(Cfa, Vec<(u16, Rule)>)> {
        row(code, AT, AT).map(|row| (row.cfa, row.registers))
    }

    #[test]
    fn saved_registers_are_where_the_end_loads_them_from() {
        // mov rbx, [rsp]; mov rbp, [rsp+8]; add rsp, 0x50; ret
        let code = [0x48, 0x8b, 0x1c, 0x24, 0x48, 0x8b, 0x6c, 0x24, 8, 0x48, 0x83, 0xc4, 0x50, 0xc3];
        let expected = vec![(16, Rule::At(-8)), (3, Rule::At(-0x58)), (6, Rule::At(-0x50))];
        assert_eq!(rules(&code), Some((Cfa::Register { number: 7, offset: 0x58 }, expected)));
        // pop rbx; pop r12; ret
        let expected = vec![(16, Rule::At(-8)), (3, Rule::At(-24)), (12, Rule::At(-16))];
        assert_eq!(rules(&[0x5b, 0x41, 0x5c, 0xc3]), Some((Cfa::Register { number: 7, offset: 24 }, expected)));
    }

    #[test]
    fn frames_by_another_register() {
        // lea rsp, [rbp-8]; pop rbx; pop rbp; ret
        let expected = vec![(16, Rule::At(-8)), (3, Rule::At(-24)), (6, Rule::At(-16))];
        let by_rbp = Some((Cfa::Register { number: 6, offset: 16 }, expected));
        assert_eq!(rules(&[0x48, 0x8d, 0x65, 0xf8, 0x5b, 0x5d, 0xc3]), by_rbp);
        // leave; ret
        let expected = vec![(16, Rule::At(-8)), (6, Rule::At(-16))];
        assert_eq!(rules(&[0xc9, 0xc3]), Some((Cfa::Register { number: 6, offset: 16 }, expected)));
        // xor ebp, ebp; leave; ret
        assert_eq!(rules(&[0x31, 0xed, 0xc9, 0xc3]), None);
    }

    #[test]
    fn loops_and_branches_agree_or_there_is_no_answer() {
        // 1: dec rax; jne 1b; ret
        let back = Some((Cfa::Register { number: 7, offset: 8 }, vec![(16, Rule::At(-8))]));
        assert_eq!(rules(&[0x48, 0xff, 0xc8, 0x75, 0xfb, 0xc3]), back);
        // 1: push rax; jne 1b; ret
        assert_eq!(rules(&[0x50, 0x75, 0xfd, 0xc3]), None);
        // je 1f; pop rbx; ret; 1: ret
        assert_eq!(rules(&[0x74, 2, 0x5b, 0xc3, 0xc3]), None);
        // and rsp, -32; ret
        assert_eq!(rules(&[0x48, 0x83, 0xe4, 0xe0, 0xc3]), None);
        // No end: nop, jmp to itself, ud2.
        assert_eq!((rules(&[0x90]), rules(&[0xeb, 0xfe]), rules(&[0x0f, 0x0b])), (None, None, None));
    }

    /// Wherever the C library's tables say how to go on, its code says the same or nothing; but for a few places in its
    /// long arithmetic, hand-written as well, whose tables keep quiet about two pushes.
    #[test]
    fn code_agrees_with_the_tables_of_the_c_library() {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let path = maps.lines().filter_map(|line| line.split(' ').next_back()).find(|path| path.contains("/libc.so"));
        let Some(path) = path else { return };
        let image = Image::of_file(File::open(path).unwrap()).unwrap();
        let tables = tables(&image);
        let index = tables.index();
        let (mut agreed, mut asked, mut wrong) = (0, 0, Vec::new());
        for &function in function_starts(&image).unwrap().iter().step_by(5) {
            let start = function.saturating_sub(WINDOW);
            let Some(code) = image.bytes_at(start, 2 * WINDOW as usize) else { continue };
            let into = (function - start) as usize;
            let decoder = Decoder::with_ip(64, &code[into..], function, DecoderOptions::NONE);
            for instruction in decoder.into_iter().take(40).step_by(7) {
                let Ok(by_table) = tables.row(&index, instruction.ip()) else { break };
                // Between functions, and behind their ends, stand no-ops that nothing runs.
                if instruction.mnemonic() == Mnemonic::Nop
                    || by_table.is_signal
                    || !matches!(by_table.cfa, Cfa::Register { number: 7, .. })
                {
                    continue;
                }
                asked += 1;
                match row(&code, start, instruction.ip()) {
                    Some(by_code) if by_code.cfa == by_table.cfa => agreed += 1,
                    Some(by_code) => wrong.push((instruction.ip(), by_code.cfa, by_table.cfa)),
                    None => {}
                }
            }
        }
        assert!(wrong.len() * 200 < asked, "{} of {asked}: {wrong:#x?}", wrong.len());
        assert!(agreed * 5 > asked, "{agreed} of {asked}");
    }

    proptest! {
        #[test]
        fn any_code_is_harmless(code in proptest::collection::vec(any::<u8>(), 0..2000), at in 0u64..2000) {
            row(&code, AT, AT.wrapping_add(at));
        }
    }
}
