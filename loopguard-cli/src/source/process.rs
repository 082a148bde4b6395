//! Reads what /proc says of a target: its threads, their names, and what its descriptors lead to.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use crate::core::event::Tid;

/// The thread's id in the innermost pid namespace it lives in: what the target itself sees.
pub fn innermost_tid(pid: u32, tid: Tid) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    Ok(ids.and_then(|ids| ids.split_whitespace().next_back()?.parse().ok()).unwrap_or(u64::from(tid)))
}

/// The thread of process `pid` that the target knows by `id`.
pub fn tid_of_innermost(pid: u32, id: u64) -> Option<Tid> {
    let same = u32::try_from(id).ok().filter(|&tid| innermost_tid(pid, tid).is_ok_and(|innermost| innermost == id));
    same.or_else(|| threads(pid).ok()?.into_iter().find(|&tid| innermost_tid(pid, tid).is_ok_and(|own| own == id)))
}

/// Children that are named when any of several is waited for.
const MAX_CHILDREN: usize = 3;

/// The commands of a process's children, or of the one that the target knows by `wanted`.
pub fn children(pid: u32, wanted: Option<u32>) -> Option<String> {
    let is_named = |child: u32, wanted: u32| innermost_tid(child, child).is_ok_and(|own| own == u64::from(wanted));
    let is_wanted = |child: u32| wanted.is_none_or(|wanted| is_named(child, wanted));
    let is_child = |child: u32| parent(child) == Some(pid);
    // The same number, unless the target lives in a pid namespace of its own.
    let found: Vec<u32> = match wanted.filter(|&child| is_child(child) && is_wanted(child)) {
        Some(child) => vec![child],
        None => {
            let processes = fs::read_dir("/proc").ok()?;
            let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
            pids.filter(|&child| is_child(child) && is_wanted(child)).collect()
        }
    };
    let named = found.iter().take(MAX_CHILDREN).map(|&child| format!("{} (pid {child})", thread_name(child, child)));
    let names = named.collect::<Vec<_>>().join(", ");
    let more = if found.len() > MAX_CHILDREN { ", ..." } else { "" };
    (!found.is_empty()).then(|| format!("child {names}{more}"))
}

pub fn threads(pid: u32) -> io::Result<Vec<Tid>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

pub fn thread_name(pid: u32, tid: Tid) -> String {
    let name = fs::read(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end_matches('\n').to_owned()
}

/// What tells one program from another: the device and the inode of its file.
pub type Program = (u64, u64);

/// `None`: the process is gone, or not to be looked into.
pub fn program(pid: u32) -> Option<Program> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(format!("/proc/{pid}/exe")).ok().map(|file| (file.dev(), file.ino()))
}

/// The command line, arguments separated by spaces, bounded.
pub fn command_line(pid: u32) -> String {
    let mut bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes.truncate(300);
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').replace('\0', " ")
}

/// The system call a thread sleeps in, with its first argument; `None` while it runs or cannot be read.
pub fn current_syscall(pid: u32, tid: Tid) -> Option<(i64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    let mut fields = text.split_whitespace();
    let number = fields.next()?.parse().ok()?;
    let argument = u64::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok()?;
    Some((number, argument))
}

/// The process's epoll descriptors.
pub fn epoll_descriptors(pid: u32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            is_epoll(&entry.path()).then(|| entry.file_name().to_str()?.parse().ok())?
        })
        .collect()
}

/// Whether the process surely has no epoll descriptor.
pub fn has_no_epoll_descriptor(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .is_ok_and(|mut entries| entries.all(|entry| entry.is_ok_and(|entry| !is_epoll(&entry.path()))))
}

pub fn is_epoll_descriptor(pid: u32, fd: i32) -> bool {
    is_epoll(Path::new(&format!("/proc/{pid}/fd/{fd}")))
}

fn is_epoll(descriptor: &Path) -> bool {
    fs::read_link(descriptor).is_ok_and(|to| to.as_os_str() == "anon_inode:[eventpoll]")
}

/// What a descriptor leads to: a peer's address for a connected socket, a path for a file.
pub fn descriptor(pid: u32, fd: i32) -> Option<String> {
    let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let target = target.to_string_lossy();
    let Some(inode) = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) else {
        return Some(target.into_owned());
    };
    Some(socket_peer(pid, inode).unwrap_or_else(|| "socket".to_owned()))
}

/// Looks an inode up in the target's own socket tables (proc(5), /proc/pid/net).
fn socket_peer(pid: u32, inode: &str) -> Option<String> {
    for protocol in ["tcp", "tcp6", "udp", "udp6"] {
        let Ok(table) = fs::read_to_string(format!("/proc/{pid}/net/{protocol}")) else { continue };
        let line = table.lines().skip(1).find(|line| line.split_whitespace().nth(9) == Some(inode));
        if let Some(peer) = line.and_then(|line| line.split_whitespace().nth(2)) {
            return parse_address(peer);
        }
    }
    let table = fs::read_to_string(format!("/proc/{pid}/net/unix")).ok()?;
    let line = table.lines().skip(1).find(|line| line.split_whitespace().nth(6) == Some(inode))?;
    Some(line.split_whitespace().nth(7).map_or_else(|| "unix socket".to_owned(), |path| format!("unix:{path}")))
}

/// `0100007F:1F90`: words in host byte order, then the port.
fn parse_address(text: &str) -> Option<String> {
    let (host, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(host.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    match host.len() {
        8 => Some(format!("{}:{port}", Ipv4Addr::from(word(0)?))),
        32 => {
            let mut octets = [0; 16];
            for i in 0..4 {
                octets[i * 4..i * 4 + 4].copy_from_slice(&word(i * 8)?);
            }
            let address = Ipv6Addr::from(octets);
            Some(match address.to_ipv4_mapped() {
                Some(v4) => format!("{v4}:{port}"),
                None => format!("[{address}]:{port}"),
            })
        }
        _ => None,
    }
}

/// One process for ever: ids are used again, a handle and the start time are not.
#[derive(Debug)]
pub struct Identity {
    pub pid: u32,
    pub pidfd: OwnedFd,
    /// In clock ticks of [`TICK_NS`], on the clock that goes on while the machine sleeps.
    pub start_ticks: u64,
}

/// The unit of times in /proc/PID/stat: USER_HZ is 100 on every architecture that matters here (proc(5)).
pub const TICK_NS: u64 = 10_000_000;

impl Identity {
    pub fn of(pid: u32) -> io::Result<Self> {
        let pidfd = pidfd(pid)?;
        let start_ticks = stat(pid)?.start_ticks;
        // Read while the handle's process lived: it is that process's.
        if has_ended(&pidfd) { Err(io::ErrorKind::NotFound.into()) } else { Ok(Self { pid, pidfd, start_ticks }) }
    }

    /// Whether it is the process that was made at this moment.
    pub fn is_process_of(&self, start_boottime_ns: u64) -> bool {
        self.start_ticks == start_boottime_ns / TICK_NS
    }
}

/// What /proc/PID/stat says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    pub parent: u32,
    /// CPU time of all its threads, those that have ended included.
    pub cpu: Duration,
    pub start_ticks: u64,
}

pub fn stat(pid: u32) -> io::Result<Stat> {
    parse_stat(&fs::read(format!("/proc/{pid}/stat"))?).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_stat(line: &[u8]) -> Option<Stat> {
    // The name may hold anything, parentheses too.
    let after_name = line.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(&line[after_name + 1..]).ok()?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Stat {
        parent: number(4)? as u32,
        cpu: Duration::from_nanos((number(14)? + number(15)?).saturating_mul(TICK_NS)),
        start_ticks: number(22)?,
    })
}

pub fn parent(pid: u32) -> Option<u32> {
    stat(pid).ok().map(|stat| stat.parent)
}

/// Every process there is, in the order of their ids.
pub fn all() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids
}

/// Every process with its parent.
pub fn parents() -> Vec<(u32, u32)> {
    all().into_iter().filter_map(|pid| Some((pid, parent(pid)?))).collect()
}

/// A handle that becomes readable when the process ends, and never means another one.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether the process behind the handle has ended.
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 }
}

/// Whether uvloop's extension module is mapped into the process.
pub fn uses_uvloop(pid: u32) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mut paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    paths.any(|path| {
        path.components().any(|part| part.as_os_str() == "uvloop")
            && path.extension().is_some_and(|extension| extension == "so")
    })
}

/// CPU time of this process so far.
pub fn own_cpu() -> Duration {
    // SAFETY: a plain struct, filled by the call.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// The clock of every record.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid place for the result; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_addresses() {
        assert_eq!(parse_address("0100007F:1F90").as_deref(), Some("127.0.0.1:8080"));
        assert_eq!(parse_address("00000000000000000000000001000000:0050").as_deref(), Some("[::1]:80"));
        assert_eq!(parse_address("0000000000000000FFFF00000100007F:0050").as_deref(), Some("127.0.0.1:80"));
        assert_eq!(parse_address("0100:1"), None);
        assert_eq!(parse_address("zz"), None);
    }

    #[test]
    fn a_process_may_be_called_anything() {
        let line = b"7 (a) b (c)) S 3 7 7 0 -1 4194304 1 0 0 0 150 50 0 0 20 0 1 0 12345 1 1";
        let stat = Stat { parent: 3, cpu: Duration::from_secs(2), start_ticks: 12345 };
        assert_eq!(parse_stat(line), Some(stat));
        for end in 0..line.len() - 10 {
            assert_eq!(parse_stat(&line[..end]), None, "cut at {end}");
        }
    }

    #[test]
    fn a_process_is_told_from_a_later_one_with_its_id() {
        let identity = Identity::of(std::process::id()).unwrap();
        let start_ns = identity.start_ticks * TICK_NS;
        assert!(identity.is_process_of(start_ns) && identity.is_process_of(start_ns + TICK_NS - 1));
        assert!(!identity.is_process_of(start_ns + TICK_NS) && !identity.is_process_of(start_ns - 1));
        assert!(parents().iter().any(|(pid, _)| *pid == identity.pid));
    }

    #[test]
    fn sees_itself() {
        let pid = std::process::id();
        assert!(threads(pid).unwrap().contains(&pid));
        assert_eq!(innermost_tid(pid, pid).unwrap(), u64::from(pid));
        assert!(!has_ended(&pidfd(pid).unwrap()));
    }
}
