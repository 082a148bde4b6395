//! loopguard's kernel programs: they turn poll edges, scheduler switches, step probes and samples into records.
//!
//! They only read, decide by the rules of `loopguard-common`, record, and count what was lost. A program that sees a
//! thread nobody watches leaves after one bit test.
#![no_std]
#![no_main]

mod capture;
mod maps;
mod poll;
mod process;
mod request;
mod sched;
mod send;
mod stack;
mod step;
mod task;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
