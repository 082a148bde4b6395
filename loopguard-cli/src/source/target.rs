//! Says in one sentence why a process cannot be watched, before anything is attached to it.

use std::{fs, io, path::Path};

use anyhow::{Result, bail};

/// Refuses what can never work: no such process, a kernel thread, another architecture's program.
pub fn check(pid: u32) -> Result<()> {
    let proc = Path::new("/proc").join(pid.to_string());
    let status = match fs::read_to_string(proc.join("status")) {
        Ok(status) => status,
        Err(_) => bail!("there is no process {pid}"),
    };
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    if let Some(leader) = field("Tgid:")
        && leader != pid.to_string()
    {
        bail!("{pid} is a thread of process {leader}; use --pid {leader}");
    }
    if field("State:").is_some_and(|state| state.starts_with('Z')) {
        bail!("process {pid} has ended and waits for its parent to collect it");
    }
    // Kernel threads have no memory of their own.
    if field("VmSize:").is_none() {
        bail!("{pid} is a kernel thread: there is no program to watch");
    }
    match read_elf_identity(&proc.join("exe")) {
        Ok(identity) => check_architecture(pid, identity),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            bail!("not permitted to look into process {pid}: run loopguard as root")
        }
        // Deleted or unreadable for another reason: its memory will tell.
        Err(_) => Ok(()),
    }
}

/// The class (32 or 64 bits) and the machine of an ELF file.
fn read_elf_identity(path: &Path) -> io::Result<(u8, u16)> {
    use std::io::Read as _;
    let mut header = [0; 20];
    fs::File::open(path)?.read_exact(&mut header)?;
    Ok((header[4], u16::from_le_bytes([header[18], header[19]])))
}

fn check_architecture(pid: u32, (class, machine): (u8, u16)) -> Result<()> {
    const CLASS_64: u8 = 2;
    // elf.h: EM_X86_64, EM_AARCH64
    const OURS: u16 = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
    if class != CLASS_64 {
        bail!("process {pid} is a 32-bit program; loopguard reads 64-bit programs only");
    }
    if machine != OURS {
        bail!("process {pid} is a program for another processor architecture, run through an emulator");
    }
    Ok(())
}

/// capabilities(7): what attaching needs, besides being root.
const NEEDED: [(u32, &str); 3] = [(39, "CAP_BPF"), (38, "CAP_PERFMON"), (19, "CAP_SYS_PTRACE")];

/// Each needed capability and whether this process has it.
pub fn privileges() -> Vec<(&'static str, bool)> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    NEEDED.iter().map(|(bit, name)| (*name, effective >> bit & 1 != 0)).collect()
}

pub fn check_privileges() -> Result<()> {
    let missing: Vec<_> = privileges().into_iter().filter(|(_, held)| !held).map(|(name, _)| name).collect();
    if !missing.is_empty() {
        bail!("not permitted: run loopguard as root (sudo), or give it the missing {}", missing.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_can_be_watched() {
        check(std::process::id()).unwrap();
    }

    #[test]
    fn what_can_never_work_is_said_plainly() {
        let said = |pid| check(pid).unwrap_err().to_string();
        assert_eq!(said(u32::MAX), "there is no process 4294967295");
        assert_eq!(
            check_architecture(7, (1, 3)).unwrap_err().to_string().split(';').next(),
            Some("process 7 is a 32-bit program")
        );
        assert!(check_architecture(7, (2, 8)).is_err());
    }
}
