//! Compares stacks of a process's main thread with gdb's, frame by frame. The process is stopped for each.
//!
//! usage: beside_gdb PID TIMES
//! Prints one JSON object a stack; `frames` and `same` count calls, without those that were inlined.

use std::{process::Command, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use loopguard::{
    runtime::memory::{ProcessMemory, TargetMemory as _},
    symbol::{
        RawStack, Stacks,
        unwind::{End, StackCopy},
    },
};
use loopguard_common::records::{REGISTER_IP, REGISTER_SP, REGISTERS, STACK_PAGE};
use serde_json::json;

/// In the order of their DWARF numbers.
const NAMES: [&str; REGISTERS] = [
    "rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
];
const STACK_BYTES: usize = 1 << 20;
const SCRIPT: &str = "\
import gdb
for name in 'rax rdx rcx rbx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip'.split():
    print('REGISTER', name, int(gdb.newest_frame().read_register(name)) & (2**64 - 1))
frame = gdb.newest_frame()
while frame:
    if frame.type() != gdb.INLINE_FRAME:
        print('FRAME', frame.pc(), frame.name())
    frame = frame.older()
";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, pid, times] = &arguments[..] else { anyhow::bail!("usage: beside_gdb PID TIMES") };
    let (pid, times): (u32, u64) = (pid.parse()?, times.parse()?);
    let script = std::env::temp_dir().join(format!("beside-gdb-{}.py", std::process::id()));
    std::fs::write(&script, SCRIPT)?;
    let mut stacks = Stacks::default();
    for n in 0..times {
        // Anywhere in what it does.
        thread::sleep(Duration::from_millis(20 + n * 37 % 90));
        send(pid, libc::SIGSTOP)?;
        let compared = compare(pid, &script, &mut stacks);
        send(pid, libc::SIGCONT)?;
        println!("{}", compared?);
    }
    Ok(std::fs::remove_file(script)?)
}

fn send(pid: u32, signal: i32) -> Result<()> {
    // SAFETY: a plain system call.
    ensure!(unsafe { libc::kill(pid.cast_signed(), signal) } == 0, "process {pid} is gone");
    Ok(())
}

fn compare(pid: u32, script: &std::path::Path, stacks: &mut Stacks) -> Result<serde_json::Value> {
    let output = Command::new("gdb")
        // The process may have a root of its own, and gdb looks for its libraries under gdb's.
        .args(["-nx", "-batch", "-iex", &format!("set sysroot /proc/{pid}/root")])
        .args([&format!("/proc/{pid}/exe"), "-p", &pid.to_string(), "-ex", "set backtrace past-main on"])
        .args(["-ex", "set backtrace past-entry on", "-ex", &format!("source {}", script.display())])
        .output()
        .context("run gdb")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut registers = [None; REGISTERS];
    let mut theirs: Vec<(u64, &str)> = Vec::new();
    for line in text.lines() {
        let mut words = line.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("REGISTER"), Some(name), Some(value)) => {
                let number = NAMES.iter().position(|known| *known == name).context("an unknown register")?;
                registers[number] = Some(value.parse()?);
            }
            (Some("FRAME"), Some(pc), Some(name)) => theirs.push((pc.parse()?, name)),
            _ => {}
        }
    }
    let sp =
        registers[REGISTER_SP].with_context(|| format!("gdb says: {}", String::from_utf8_lossy(&output.stderr)))?;
    let start = sp & !(STACK_PAGE as u64 - 1);
    let mut bytes = Vec::new();
    while bytes.len() < STACK_BYTES
        && let Ok(page) = (ProcessMemory { pid }).bytes(start + bytes.len() as u64, STACK_PAGE)
    {
        bytes.extend(page);
    }
    let named = stacks.name(&RawStack { pid, copy: StackCopy { registers, start, bytes }, ..RawStack::default() });
    // A call's address is one byte before where it returns to.
    let ours: Vec<u64> = (named.calls.iter().enumerate())
        .map(|(depth, call)| if depth == 0 { registers[REGISTER_IP].unwrap_or(0) } else { call.address + 1 })
        .collect();
    let same = ours.iter().zip(&theirs).take_while(|(ours, (theirs, _))| **ours == *theirs).count();
    Ok(json!({
        "frames": ours.len(),
        "gdb": theirs.len(),
        "same": same,
        "complete": named.end == Some(End::Complete),
        "end": named.end.and_then(End::reason),
        "differs_at": theirs.get(same).map(|(_, name)| *name),
        "innermost": theirs.first().map(|(_, name)| *name),
    }))
}
