//! Finds the word in which tokio counts its task ids, where no symbol says which it is.
//!
//! `tokio::runtime::task::Id::next` (1.x) adds one to a static that begins with one, again and again until the result is
//! not zero: few other counters are used like that, and [`counters`] finds those that are. Which of them is the one shows
//! in the ids that tasks turn out to have ([`IdCounter`]).

use std::{collections::BTreeSet, ops::Range};

use crate::runtime::{
    elf::Image,
    memory::{ProcessMemory, TargetMemory as _},
};

/// More counters than a program has of that form.
const MAX_COUNTERS: usize = 16;
/// New ids that have to fit until a counter is believed.
const ENOUGH: u32 = 2;

/// Of several counters, the one whose values the ids of new tasks are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdCounter {
    candidates: Vec<Candidate>,
    highest_id: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    address: u64,
    value: u64,
    /// New ids that it counted between two looks.
    fits: u32,
}

impl IdCounter {
    /// Of counters at these addresses.
    pub fn among(addresses: impl IntoIterator<Item = u64>) -> Self {
        // Nothing is between the largest value and the next one: the first look only finds out where each counter is.
        let candidate = |address| Candidate { address, value: u64::MAX, fits: 0 };
        Self { candidates: addresses.into_iter().map(candidate).collect(), highest_id: 0 }
    }

    /// Whether there is anything left to find out.
    pub fn is_open(&self) -> bool {
        !self.candidates.is_empty()
    }

    /// Looks at the counters, after `ids` of tasks were seen. Returns the address of the one that counts ids once that
    /// is beyond doubt.
    pub fn look(&mut self, ids: impl IntoIterator<Item = u64>, value_at: impl Fn(u64) -> Option<u64>) -> Option<u64> {
        let highest = ids.into_iter().fold(self.highest_id, u64::max);
        let is_new = highest > self.highest_id;
        self.highest_id = highest;
        self.candidates.retain_mut(|candidate| {
            let Some(value) = value_at(candidate.address) else { return false };
            if is_new && (candidate.value..value).contains(&highest) {
                candidate.fits += 1;
            }
            candidate.value = value;
            // The next id is none that a task has already.
            value > highest
        });
        let mut fitting = self.candidates.iter().filter(|candidate| candidate.fits > 0);
        let (first, other) = (fitting.next()?, fitting.next());
        (other.is_none() && first.fits >= ENOUGH).then_some(first.address)
    }
}

/// The addresses of counters in `image` that are used as `Id::next` uses its own. `functions` are where its functions
/// start, sorted.
pub fn counters(image: &Image, functions: &[u64], memory: &ProcessMemory) -> BTreeSet<u64> {
    let Some((start, code)) = image.section_bytes(".text") else { return BTreeSet::new() };
    let Some(data) = image.section(".data").map(|data| data.address..data.address.saturating_add(data.size)) else {
        return BTreeSet::new();
    };
    let begins_with_one = |address: u64| {
        let first = image.bytes_at(address, 8).and_then(|bytes| bytes.try_into().ok());
        data.contains(&address) && address.is_multiple_of(8) && first.map(u64::from_le_bytes) == Some(1)
    };
    places(&code, start, functions)
        .filter_map(|place| match place {
            Place::At(address) => Some(address),
            Place::AddressAt(slot) => memory.u64(slot).ok(),
        })
        .filter(|address| begins_with_one(*address))
        .take(MAX_COUNTERS)
        .collect()
}

/// Where a counter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    At(u64),
    /// Where its address stands at this one.
    AddressAt(u64),
}

/// The counters that the code of all functions counts up until they are not zero.
fn places<'a>(code: &'a [u8], start: u64, functions: &'a [u64]) -> impl Iterator<Item = Place> + 'a {
    let mut done = 0;
    additions(code)
        .filter_map(move |at| {
            // The functions around are decoded once, not once for each addition in them.
            if at < done {
                return None;
            }
            let function = function_around(functions, start, at, code.len());
            done = function.end;
            Some(in_function(&code[function.clone()], start.wrapping_add(function.start as u64)))
        })
        .flatten()
}

/// The function around the byte `at` of code that begins at `start`, by its bytes.
fn function_around(functions: &[u64], start: u64, at: usize, length: usize) -> Range<usize> {
    let next = functions.partition_point(|function| *function <= start.saturating_add(at as u64));
    let into =
        |function: Option<&u64>| function.and_then(|function| usize::try_from(function.checked_sub(start)?).ok());
    let begins = next.checked_sub(1).and_then(|last| into(functions.get(last))).unwrap_or(0);
    let ends = into(functions.get(next)).unwrap_or(length);
    begins..ends.clamp(at + 1, length)
}

/// Where bytes stand that can be a `lock xadd` of 64 bits.
fn additions(code: &[u8]) -> impl Iterator<Item = usize> + '_ {
    let can_be = |bytes: &[u8]| bytes[0] == 0xf0 && bytes[1] & 0xf8 == 0x48 && bytes[2] == 0x0f && bytes[3] == 0xc1;
    code.windows(4).enumerate().filter_map(move |(at, bytes)| can_be(bytes).then_some(at))
}

#[cfg(target_arch = "x86_64")]
fn in_function(code: &[u8], entry: u64) -> Vec<Place> {
    use iced_x86::{
        Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess, Register,
    };

    // System V ABI, x86-64: what is still there after a call.
    const KEPT: [Register; 6] =
        [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];
    let mut factory = InstructionInfoFactory::new();
    // What registers were loaded with, in the order of the code.
    let mut loaded: Vec<(Register, Place)> = Vec::new();
    let mut last: [Instruction; 3] = Default::default();
    let mut found = Vec::new();
    for instruction in Decoder::with_ip(64, code, entry, DecoderOptions::NONE).iter() {
        let [one, addition, test] = last;
        last = [addition, test, instruction];
        let counts_until_not_zero = matches!(one.code(), Code::Mov_r32_imm32)
            && one.immediate(1) == 1
            && addition.code() == Code::Xadd_rm64_r64
            && addition.has_lock_prefix()
            && addition.op1_register() == one.op0_register().full_register()
            && test.code() == Code::Test_rm64_r64
            && test.op0_register() == addition.op1_register()
            && test.op1_register() == addition.op1_register()
            && matches!(instruction.code(), Code::Je_rel8_64 | Code::Je_rel32_64)
            && instruction.near_branch_target() == one.ip();
        if counts_until_not_zero {
            let base = addition.memory_base().full_register();
            if addition.is_ip_rel_memory_operand() || base == Register::None {
                found.push(Place::At(addition.memory_displacement64()));
            } else if addition.memory_displacement64() == 0 && addition.memory_index() == Register::None {
                found.extend(loaded.iter().find(|(register, _)| *register == base).map(|(_, place)| *place));
            }
        }
        for used in factory.info(&instruction).used_registers() {
            if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess) {
                loaded.retain(|(register, _)| *register != used.register().full_register());
            }
        }
        if matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall) {
            loaded.retain(|(register, _)| KEPT.contains(register));
        }
        if instruction.is_ip_rel_memory_operand() {
            let at = instruction.ip_rel_memory_address();
            match instruction.code() {
                Code::Mov_r64_rm64 => loaded.push((instruction.op0_register(), Place::AddressAt(at))),
                Code::Lea_r64_m => loaded.push((instruction.op0_register(), Place::At(at))),
                _ => {}
            }
        }
    }
    found
}

#[cfg(not(target_arch = "x86_64"))]
fn in_function(_code: &[u8], _entry: u64) -> Vec<Place> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One look a line: the ids of tasks seen, then the values of the counters. What it comes to.
    fn check(looks: &[(&[u64], &[u64])], expected: Option<usize>) {
        let mut counter = IdCounter::among(0..looks[0].1.len() as u64);
        let mut found = None;
        for (ids, values) in looks {
            found = counter.look(ids.iter().copied(), |at| values.get(at as usize).copied());
        }
        assert_eq!(found.map(|at| at as usize), expected);
    }

    #[test]
    fn the_counter_that_new_ids_come_from_is_found() {
        check(&[(&[5], &[9, 2]), (&[9], &[10, 2]), (&[4, 10], &[12, 2])], Some(0));
        // One new id can fit by chance.
        check(&[(&[5], &[9, 2]), (&[9], &[10, 2])], None);
        // Ids that are no news say nothing.
        check(&[(&[5], &[9, 2]), (&[9], &[10, 2]), (&[9, 3], &[12, 2]), (&[], &[12, 2])], None);
    }

    #[test]
    fn what_does_not_count_ids_is_not_believed() {
        // Behind the ids, or far ahead of them.
        check(&[(&[5], &[4]), (&[9], &[10]), (&[10], &[12])], None);
        check(&[(&[5], &[100]), (&[9], &[200]), (&[15], &[300])], None);
        // A second one that goes along with them.
        check(&[(&[5], &[9, 9]), (&[9], &[10, 10]), (&[10], &[12, 12])], None);
        check(&[(&[], &[])], None);
    }

    #[test]
    fn a_counter_that_cannot_be_read_is_none() {
        let mut counter = IdCounter::among([7]);
        assert!(counter.is_open());
        assert_eq!(counter.look([1], |_| None), None);
        assert!(!counter.is_open());
    }

    #[cfg(target_arch = "x86_64")]
    mod code {
        use super::*;
        use proptest::prelude::*;

        const START: u64 = 0x1000;
        /// mov ecx, 1
        const ONE: [u8; 5] = [0xb9, 1, 0, 0, 0];
        /// lock xadd [rip+0x100], rcx
        const ADD: [u8; 9] = [0xf0, 0x48, 0x0f, 0xc1, 0x0d, 0, 1, 0, 0];
        /// lock xadd [rax], rcx
        const ADD_THROUGH_RAX: [u8; 5] = [0xf0, 0x48, 0x0f, 0xc1, 0x08];
        /// test rcx, rcx
        const TEST: [u8; 3] = [0x48, 0x85, 0xc9];

        fn check(code: &[&[u8]], expected: &[Place]) {
            assert_eq!(places(&code.concat(), START, &[START]).collect::<Vec<_>>(), expected);
        }

        #[test]
        fn a_counter_is_counted_up_until_it_is_not_zero() {
            // Back to the first of these.
            let again = [0x74, (-19_i8) as u8];
            check(&[&ONE, &ADD, &TEST, &again], &[Place::At(START + 14 + 0x100)]);
            let long = [0x0f, 0x84, (-23_i8) as u8, 0xff, 0xff, 0xff];
            check(&[&ONE, &ADD, &TEST, &long], &[Place::At(START + 14 + 0x100)]);
            check(&[&ONE, &ADD, &TEST, &[0x74, 0]], &[]);
            check(&[&ONE, &ADD, &TEST, &[0x75, (-19_i8) as u8]], &[]);
            check(&[&[0xb9, 2, 0, 0, 0], &ADD, &TEST, &again], &[]);
            check(&[&ONE, &ADD, &[0xc3]], &[]);
        }

        #[test]
        fn its_address_may_come_from_a_table() {
            // mov rax, [rip+0x20]; lea rax, [rip+0x20]; call
            let (load, lea, call) =
                ([0x48, 0x8b, 0x05, 0x20, 0, 0, 0], [0x48, 0x8d, 0x05, 0x20, 0, 0, 0], [0xff, 0xd0]);
            let again = [0x74, (-15_i8) as u8];
            let counts = [&ONE[..], &ADD_THROUGH_RAX, &TEST, &again].concat();
            check(&[&load, &counts], &[Place::AddressAt(START + 7 + 0x20)]);
            check(&[&lea, &counts], &[Place::At(START + 7 + 0x20)]);
            // xor eax, eax
            check(&[&load, &[0x31, 0xc0], &counts], &[]);
            check(&[&load, &call, &counts], &[]);
            check(&[&counts], &[]);
        }

        proptest! {
            #[test]
            fn any_code_is_harmless(code in proptest::collection::vec(any::<u8>(), 0..200), starts in any::<[u64; 3]>()) {
                let mut functions = starts.to_vec();
                functions.sort_unstable();
                let code = [&code[..], &ADD, &code].concat();
                let _ = places(&code, u64::MAX / 2, &functions).count();
                let _ = places(&code, START, &[START + 3, START + 70]).count();
            }
        }
    }
}
