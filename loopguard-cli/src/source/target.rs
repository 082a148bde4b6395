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

/// A capability (capabilities(7)) that is needed, besides being root, and what for.
struct Needed {
    bit: u32,
    name: &'static str,
    /// What cannot be done without it.
    missing: &'static str,
}

const NEEDED: [Needed; 3] = [
    Needed { bit: 39, name: "CAP_BPF", missing: "no kernel program can be loaded" },
    Needed { bit: 38, name: "CAP_PERFMON", missing: "kernel programs may not watch other processes" },
    Needed { bit: 19, name: "CAP_SYS_PTRACE", missing: "the memory of another user's process cannot be read" },
];

/// The capabilities that are kept, where they are held: those that are needed, and what makes more work. Files of targets
/// that only their owners may read (CAP_DAC_READ_SEARCH), files that are deleted by now (CAP_CHECKPOINT_RESTORE), and
/// loopguard's own cost in the kernel (CAP_SYS_ADMIN: the kernel measures it for nobody else).
const KEPT: [u32; 6] = [39, 38, 19, 2, 40, 21];

fn effective() -> u64 {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Each needed capability and whether this process has it.
pub fn privileges() -> Vec<(&'static str, bool)> {
    let effective = effective();
    NEEDED.iter().map(|needed| (needed.name, effective >> needed.bit & 1 != 0)).collect()
}

pub fn check_privileges() -> Result<()> {
    let effective = effective();
    let missing: Vec<_> = NEEDED.iter().filter(|needed| effective >> needed.bit & 1 == 0).collect();
    match &missing[..] {
        [] => Ok(()),
        [one] => bail!("not permitted: without {} {}; give it that, or run loopguard as root", one.name, one.missing),
        several => {
            let names: Vec<_> = several.iter().map(|needed| needed.name).collect();
            bail!("not permitted: run loopguard as root (sudo), or give it the missing {}", names.join(", "))
        }
    }
}

/// Gives up every privilege that is not needed any more, for good: of this thread and of those that it starts. Call it
/// once tracefs is there.
///
/// # Errors
/// The kernel refuses, which it never does for fewer privileges.
pub fn drop_privileges() -> io::Result<()> {
    keep_only(KEPT.iter().fold(0, |mask, bit| mask | 1 << bit))
}

/// The same for a thread that needs none.
///
/// # Errors
/// As above.
pub fn drop_all_privileges() -> io::Result<()> {
    keep_only(0)
}

/// `wanted`: a bit for each capability.
fn keep_only(wanted: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Half {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    // linux/capability.h
    const VERSION_3: u32 = 0x2008_0522;
    let kept = wanted & effective();
    let half = |bits: u64| Half { effective: bits as u32, permitted: bits as u32, inheritable: 0 };
    let (header, sets) = (Header { version: VERSION_3, pid: 0 }, [half(kept), half(kept >> 32)]);
    // SAFETY: both structures are as the call expects them; it only reads them.
    if unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // What loopguard might run can gain nothing either.
    // SAFETY: a plain system call.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
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
