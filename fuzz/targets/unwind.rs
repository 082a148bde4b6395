//! Unwind tables and stacks.
//!
//! An input holds three sections (`.eh_frame_hdr`, `.eh_frame`, `.debug_frame`), each with its address and its length
//! before it; then the instruction pointer and the stack.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use loopguard::symbol::{
    cfi::{Index, Row, Section, Tables},
    unwind::{FindRow, Missing, StackCopy, unwind},
};
use loopguard_common::records::{REGISTER_IP, REGISTER_SP, REGISTERS};

const STACK: u64 = 0x7fff_0000_1000;

struct Lookup<'a>(&'a Tables, &'a Index);

impl FindRow for Lookup<'_> {
    fn row(&mut self, address: u64) -> Result<Arc<Row>, Missing> {
        self.0.row(self.1, address).map(Arc::new).map_err(Missing::Row)
    }
}

fn section(input: &mut &[u8]) -> Option<Section> {
    let (address, rest) = input.split_first_chunk::<4>()?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let length = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (bytes, rest) = rest.split_at(length);
    *input = rest;
    (length > 0).then(|| Section { address: u32::from_le_bytes(*address).into(), bytes: bytes.into() })
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = bytes;
    let eh_frame_hdr = section(&mut input);
    let eh_frame = section(&mut input);
    let debug_frame = section(&mut input);
    let tables = Tables { eh_frame, eh_frame_hdr, debug_frame, text: 0x1000, got: 0x4000 };
    let index = tables.index();
    let mut registers = [Some(0x1000); REGISTERS];
    registers[REGISTER_IP] = input.split_off(..8).map(|ip| u64::from_le_bytes(ip.try_into().unwrap()));
    registers[REGISTER_SP] = Some(STACK);
    let stack = StackCopy { registers, start: STACK, bytes: input.to_vec() };
    unwind(&stack, &mut Lookup(&tables, &index));
    for address in [0, 0x1000, 0x1010, u64::MAX] {
        let _ = tables.row(&index, address);
    }
});
