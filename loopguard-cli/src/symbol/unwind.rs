//! Turns registers and a copy of a stack into the chain of calls that led there, by call frame information alone.
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
        let row = match find.row(address) {
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
