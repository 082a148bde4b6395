//! Turns registers and a copy of a stack into the chain of calls that led there, by call frame information, and where a
//! file has none for its innermost function by that function's code.
//!
//! Frame pointers are never guessed at: where nothing says how to go on, the stack ends and says why.

use std::sync::Arc;

use gimli::{EndianSlice, Evaluation, EvaluationResult, LittleEndian, Location, Value};
use loopguard_common::records::{REGISTER_IP, REGISTER_SP, REGISTERS};

use super::cfi::{Cfa, NoRow, Row, Rule};

/// Native frames of one stack; beyond that it is taken for a recursion without end.
pub const MAX_FRAMES: usize = 1024;
/// Operations of one expression; real ones have about ten.
const MAX_OPERATIONS: u32 = 1000;
/// The red zone: what a function may use below its stack pointer.
const RED_ZONE: u64 = 128;

/// A thread's registers and the top of its stack at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StackCopy {
    /// By DWARF number, the instruction pointer last; those that are known.
    pub registers: [Option<u64>; REGISTERS],
    /// Address of the first byte.
    pub start: u64,
    pub bytes: Vec<u8>,
}

impl StackCopy {
    fn word(&self, address: u64) -> Option<u64> {
        let at = usize::try_from(address.checked_sub(self.start)?).ok()?;
        Some(u64::from_le_bytes(*self.bytes.get(at..)?.first_chunk()?))
    }

    fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes.len() as u64)
    }
}

/// One call, innermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The instruction it is at: in the innermost the next one, in the others the one that called.
    pub address: u64,
    /// The stack pointer there, and before the function was called.
    pub sp: u64,
    pub cfa: u64,
}

/// Why a stack ends where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At the thread's start.
    Complete,
    /// The code there belongs to no file.
    NoModule,
    /// The file says nothing about how to unwind the code there.
    NoInformation,
    /// What it says makes no sense.
    BadInformation,
    /// The stack is larger than what was copied of it.
    BeyondCopy,
    TooDeep,
}

impl End {
    pub fn reason(self) -> Option<&'static str> {
        match self {
            Self::Complete => None,
            Self::NoModule => Some("the stack leads into code that belongs to no file"),
            Self::NoInformation => Some("a file on the stack has no unwind information for its code"),
            Self::BadInformation => Some("the unwind information of a file on the stack makes no sense"),
            Self::BeyondCopy => Some("the stack is larger than what was copied of it (--stack-size)"),
            Self::TooDeep => Some("the native stack is deeper than loopguard unwinds"),
        }
    }
}

/// Finds the rules at an address.
pub trait FindRow {
    fn row(&mut self, address: u64) -> Result<Arc<Row>, Missing>;

    /// The rules at the instruction of the last call of [`row`](Self::row), by its code: no table covers it. Only asked
    /// for the innermost function.
    fn row_by_code(&mut self) -> Result<Arc<Row>, Missing> {
        Err(Missing::Row(NoRow::Uncovered))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    Module,
    Row(NoRow),
}

/// The calls on `stack`, innermost first, and why there are no more.
pub fn unwind(stack: &StackCopy, find: &mut impl FindRow) -> (Vec<Call>, End) {
    let mut registers = stack.registers;
    let mut calls: Vec<Call> = Vec::with_capacity(64);
    // The innermost instruction has not run yet; a return address stands after the call that is meant.
    let mut is_return = false;
    loop {
        let (Some(ip), Some(sp)) = (registers[REGISTER_IP], registers[REGISTER_SP]) else {
            return (calls, End::Complete);
        };
        if ip == 0 {
            return (calls, End::Complete);
        }
        let address = ip.wrapping_sub(u64::from(is_return));
        let mut call = Call { address, sp, cfa: sp };
        let found = match find.row(address) {
            Err(Missing::Row(NoRow::Uncovered)) if calls.is_empty() => find.row_by_code(),
            found => found,
        };
        let row = match found {
            Ok(row) => row,
            Err(missing) => {
                // What leads to no code at all was no return address.
                if missing != Missing::Module || calls.is_empty() {
                    calls.push(call);
                }
                let end = match missing {
                    Missing::Module => End::NoModule,
                    Missing::Row(NoRow::Uncovered) => End::NoInformation,
                    Missing::Row(NoRow::Malformed) => End::BadInformation,
                };
                return (calls, end);
            }
        };
        let stepped = step(&row, &registers, stack);
        if let Ok((_, cfa)) = stepped {
            call.cfa = cfa;
        }
        calls.push(call);
        match stepped {
            Ok((caller, cfa)) => {
                // A signal may have been handled on a stack of its own; any other call moved the stack pointer down.
                if !row.is_signal && cfa <= sp {
                    return (calls, End::BadInformation);
                }
                registers = caller;
            }
            Err(end) => return (calls, end),
        }
        if calls.len() == MAX_FRAMES {
            return (calls, End::TooDeep);
        }
        is_return = !row.is_signal;
    }
}

type Registers = [Option<u64>; REGISTERS];

fn step(row: &Row, registers: &Registers, stack: &StackCopy) -> Result<(Registers, u64), End> {
    let machine = Machine { row, registers, stack };
    let cfa = match &row.cfa {
        Cfa::Register { number, offset } => {
            machine.register(*number).ok_or(End::BadInformation)?.wrapping_add_signed(*offset)
        }
        Cfa::Expression(code) => machine.evaluate(code, None)?,
    };
    let mut caller = *registers;
    caller[REGISTER_SP] = Some(cfa);
    caller[REGISTER_IP] = None;
    for (number, rule) in &row.registers {
        let Some(value) = caller.get_mut(usize::from(*number)) else { continue };
        let found = match rule {
            Rule::Undefined => Ok(None),
            Rule::SameValue => Ok(machine.register(*number)),
            Rule::At(offset) => machine.load(cfa.wrapping_add_signed(*offset)).map(Some),
            Rule::Is(offset) => Ok(Some(cfa.wrapping_add_signed(*offset))),
            Rule::Register(other) => Ok(machine.register(*other)),
            Rule::AtExpression(code) => {
                machine.evaluate(code, Some(cfa)).and_then(|address| machine.load(address)).map(Some)
            }
            Rule::IsExpression(code) => machine.evaluate(code, Some(cfa)).map(Some),
        };
        *value = match found {
            Ok(found) => found,
            // Only the way back must be known: what was popped already may stand below the stack pointer.
            Err(end) if usize::from(*number) == REGISTER_IP => return Err(end),
            Err(_) => None,
        };
    }
    let back = row.registers.iter().find(|(number, _)| usize::from(*number) == REGISTER_IP);
    match (caller[REGISTER_IP], back) {
        // Said to have no caller: where threads start.
        (None, Some((_, Rule::Undefined))) | (Some(_), _) => Ok((caller, cfa)),
        (None, _) => Err(End::BadInformation),
    }
}

struct Machine<'a> {
    row: &'a Row,
    registers: &'a Registers,
    stack: &'a StackCopy,
}

impl Machine<'_> {
    fn register(&self, number: u16) -> Option<u64> {
        *self.registers.get(usize::from(number))?
    }

    fn load(&self, address: u64) -> Result<u64, End> {
        self.stack.word(address).ok_or_else(|| {
            let sp = self.registers[REGISTER_SP].unwrap_or(0);
            let above = address >= sp.saturating_sub(RED_ZONE) && address.saturating_add(8) > self.stack.end();
            if above { End::BeyondCopy } else { End::BadInformation }
        })
    }

    /// `initial`: what the stack of operations begins with (DWARF 5, 6.4.2: the frame address, for registers).
    fn evaluate(&self, code: &[u8], initial: Option<u64>) -> Result<u64, End> {
        const BAD: End = End::BadInformation;
        let mut evaluation = Evaluation::new(EndianSlice::new(code, LittleEndian), self.row.encoding);
        evaluation.set_max_iterations(MAX_OPERATIONS);
        if let Some(initial) = initial {
            evaluation.set_initial_value(initial);
        }
        let mut state = evaluation.evaluate().map_err(|_| BAD)?;
        // Each request is an operation, so the bound on those ends this too.
        loop {
            state = match state {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, .. } => {
                    let value = self.register(register.0).ok_or(BAD)?;
                    evaluation.resume_with_register(Value::Generic(value)).map_err(|_| BAD)?
                }
                EvaluationResult::RequiresMemory { address, size, .. } => {
                    let word = self.load(address)?;
                    let value = if size < 8 { word & ((1 << (u32::from(size) * 8)) - 1) } else { word };
                    evaluation.resume_with_memory(Value::Generic(value)).map_err(|_| BAD)?
                }
                _ => return Err(BAD),
            };
        }
        match evaluation.as_result() {
            [piece] => match piece.location {
                Location::Address { address } => Ok(address),
                _ => Err(BAD),
            },
            _ => Err(BAD),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use proptest::prelude::*;

    use super::super::cfi::{Index, Section, Tables};
    use super::*;
    use crate::runtime::elf::Image;

    /// A process that maps one file, at its own addresses.
    struct OneFile {
        tables: Tables,
        index: Index,
    }

    impl OneFile {
        fn new(tables: Tables) -> Self {
            Self { index: tables.index(), tables }
        }
    }

    impl FindRow for OneFile {
        fn row(&mut self, address: u64) -> Result<Arc<Row>, Missing> {
            self.tables.row(&self.index, address).map(Arc::new).map_err(Missing::Row)
        }
    }

    /// The same row everywhere.
    struct Always(Row);

    impl FindRow for Always {
        fn row(&mut self, _address: u64) -> Result<Arc<Row>, Missing> {
            Ok(Arc::new(self.0.clone()))
        }
    }

    const ENCODING: gimli::Encoding = gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 4 };
    const SP: u64 = 0x7ffd_0000_1000;
    const IP: u16 = REGISTER_IP as u16;

    fn stack(words: &[u64]) -> StackCopy {
        let mut registers = [Some(0); REGISTERS];
        registers[REGISTER_SP] = Some(SP);
        registers[REGISTER_IP] = Some(0x1000);
        StackCopy { registers, start: SP, bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect() }
    }

    fn row(cfa: Cfa, registers: Vec<(u16, Rule)>) -> Always {
        Always(Row { cfa, registers, is_signal: false, encoding: ENCODING })
    }

    fn above(offset: i64) -> Cfa {
        Cfa::Register { number: REGISTER_SP as u16, offset }
    }

    #[test]
    fn calls_are_followed_to_the_end_of_the_stack() {
        let mut find = row(above(16), vec![(IP, Rule::At(-8))]);
        let (calls, end) = unwind(&stack(&[7, 0x2000, 7, 0x3000, 7, 0]), &mut find);
        assert_eq!(end, End::Complete);
        // Return addresses are looked up one byte before, in the call itself.
        assert_eq!(calls.iter().map(|call| call.address).collect::<Vec<_>>(), [0x1000, 0x1fff, 0x2fff]);
        assert_eq!((calls[1].sp, calls[1].cfa), (SP + 16, SP + 32));
    }

    #[test]
    fn a_stack_that_cannot_be_finished_says_why() {
        let mut find = row(above(16), vec![(IP, Rule::At(-8))]);
        let (calls, end) = unwind(&stack(&[7, 0x2000, 7, 0x3000]), &mut find);
        assert_eq!((calls.len(), end), (3, End::BeyondCopy));
        let ends_at = |find: &mut dyn FnMut() -> Always, words: &[u64]| unwind(&stack(words), &mut find()).1;
        assert_eq!(ends_at(&mut || row(above(16), vec![(IP, Rule::Undefined)]), &[1; 9]), End::Complete);
        assert_eq!(ends_at(&mut || row(above(16), vec![]), &[1; 9]), End::BadInformation);
        assert_eq!(ends_at(&mut || row(above(-16), vec![(IP, Rule::At(-8))]), &[1; 9]), End::BadInformation);
    }

    #[test]
    fn tables_that_run_in_circles_end() {
        // No call leaves the stack pointer where it was.
        let mut stuck = row(above(0), vec![(IP, Rule::At(0))]);
        assert_eq!(unwind(&stack(&[0x1001; 64]), &mut stuck).1, End::BadInformation);
        // Every call returns to itself, on a stack without end.
        let mut endless = row(above(8), vec![(IP, Rule::At(-8))]);
        let (calls, end) = unwind(&stack(&[0x1001; 4096]), &mut endless);
        assert_eq!((calls.len(), end), (MAX_FRAMES, End::TooDeep));
        // A signal's frame may move the stack pointer anywhere, and so back.
        let mut signals = row(above(0), vec![(IP, Rule::At(0))]);
        signals.0.is_signal = true;
        assert_eq!(unwind(&stack(&[0x1001; 64]), &mut signals).1, End::TooDeep);
        // DW_OP_skip to itself.
        let skip = Cfa::Expression([0x2f, 0xfd, 0xff].into());
        assert_eq!(unwind(&stack(&[1; 9]), &mut row(skip, vec![])).1, End::BadInformation);
        // DW_OP_breg7 0, DW_OP_deref, DW_OP_skip to the second.
        let load = Cfa::Expression([0x77, 0, 0x06, 0x2f, 0xfc, 0xff].into());
        assert_eq!(unwind(&stack(&[SP; 9]), &mut row(load, vec![])).1, End::BadInformation);
    }

    #[test]
    fn expressions_read_registers_and_the_stack() {
        // What OpenSSL's assembly says: DW_OP_breg7 (rsp) 24, DW_OP_deref, DW_OP_plus_uconst 8.
        let aligned = Cfa::Expression([0x77, 24, 0x06, 0x23, 8].into());
        let words = [0, 0, 0, SP + 40, 0, 0x2000, 0, 0, 0, 0];
        let (calls, _) = unwind(&stack(&words), &mut row(aligned, vec![(IP, Rule::At(-8))]));
        assert_eq!((calls[0].cfa, calls[1].address), (SP + 48, 0x1fff));
    }

    /// Its own executable's tables, which are large and real.
    fn own_tables() -> Tables {
        let image = Image::of_file(File::open("/proc/self/exe").unwrap()).unwrap();
        let section = |name: &str| {
            let (address, bytes) = image.section_bytes(name).unwrap();
            Some(Section { address, bytes: bytes.into() })
        };
        Tables {
            eh_frame: section(".eh_frame"),
            eh_frame_hdr: section(".eh_frame_hdr"),
            text: image.section(".text").unwrap().address,
            ..Tables::default()
        }
    }

    #[test]
    fn a_table_without_its_sorted_index_gives_the_same_rows() {
        let image = Image::of_file(File::open("/proc/self/exe").unwrap()).unwrap();
        let text = image.section(".text").unwrap();
        let by_header = OneFile::new(own_tables());
        let by_search = OneFile::new(Tables { eh_frame_hdr: None, ..own_tables() });
        let mut found = 0;
        for address in (text.address..text.address + text.size).step_by(40_013) {
            let rows = [&by_header, &by_search].map(|file| file.tables.row(&file.index, address));
            assert_eq!(rows[0], rows[1], "{address:#x}");
            found += u32::from(rows[0].is_ok());
        }
        assert!(found > 20, "{found}");
    }

    fn damaged(section: Option<Section>, damage: &[(usize, u8)], length: usize) -> Option<Section> {
        let Section { address, bytes } = section?;
        let mut bytes = bytes.to_vec();
        for (at, byte) in damage {
            let at = at % bytes.len();
            bytes[at] ^= byte;
        }
        bytes.truncate(length);
        Some(Section { address, bytes: bytes.into() })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

        #[test]
        fn no_tables_break_it(
            eh_frame in proptest::collection::vec(any::<u8>(), 0..400),
            header in proptest::collection::vec(any::<u8>(), 0..200),
            debug_frame in proptest::collection::vec(any::<u8>(), 0..400),
            words in proptest::collection::vec(prop_oneof![any::<u64>(), 0u64..500, SP..SP + 500], 0..64),
            address in 0u64..600,
        ) {
            let section = |bytes: Vec<u8>| Some(Section { address: 0x40, bytes: bytes.into() });
            let mut file = OneFile::new(Tables {
                eh_frame: section(eh_frame),
                eh_frame_hdr: section(header),
                debug_frame: section(debug_frame),
                ..Tables::default()
            });
            let mut stack = stack(&words);
            stack.registers[REGISTER_IP] = Some(address);
            let (calls, _) = unwind(&stack, &mut file);
            prop_assert!(calls.len() <= MAX_FRAMES);
        }

        #[test]
        fn no_expressions_break_it(
            cfa in proptest::collection::vec(any::<u8>(), 0..40),
            ip in proptest::collection::vec(any::<u8>(), 0..40),
            words in proptest::collection::vec(prop_oneof![any::<u64>(), SP..SP + 500], 0..64),
            is_signal: bool,
        ) {
            let cfa = Cfa::Expression(cfa.into());
            let mut find = row(cfa, vec![(IP, Rule::AtExpression(ip.into()))]);
            find.0.is_signal = is_signal;
            let (calls, _) = unwind(&stack(&words), &mut find);
            prop_assert!(calls.len() <= MAX_FRAMES);
        }
    }

    proptest! {
        // Each has a table of megabytes to look through.
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn damaged_tables_are_harmless(
            damage in proptest::collection::vec((any::<usize>(), 1u8..), 0..3000),
            header_damage in proptest::collection::vec((any::<usize>(), 1u8..), 0..300),
            keep in 0.0f64..1.2,
            with_header: bool,
            words in proptest::collection::vec(any::<u32>(), 64),
        ) {
            let own = own_tables();
            let (text, length) = (own.text, own.eh_frame.as_ref().map_or(0, |section| section.bytes.len()));
            let eh_frame = damaged(own.eh_frame, &damage, (length as f64 * keep) as usize);
            let eh_frame_hdr = damaged(own.eh_frame_hdr, &header_damage, usize::MAX).filter(|_| with_header);
            let mut file = OneFile::new(Tables { eh_frame, eh_frame_hdr, text, ..Tables::default() });
            // Every word might be a return address.
            let words: Vec<u64> = words.iter().map(|word| text + u64::from(word % 3_000_000)).collect();
            for address in &words {
                let mut stack = stack(&words);
                stack.registers[REGISTER_IP] = Some(*address);
                let (calls, _) = unwind(&stack, &mut file);
                prop_assert!(calls.len() <= MAX_FRAMES);
            }
        }
    }
}
