//! Names of the system calls that loops wait in.

use loopguard_common::records::{SYSCALL_NONE, SYSCALL_OTHER};

/// Whether a call's first argument is a file descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstArgument {
    Descriptor,
    /// The address of an array of `struct pollfd`.
    PollArray,
    /// The process id of a child, 0 or negative for several.
    Child,
    Other,
}

pub fn name(number: i32) -> String {
    match number {
        SYSCALL_NONE => "page fault".into(),
        SYSCALL_OTHER => "other".into(),
        _ => known(number).map_or_else(|| format!("syscall {number}"), |(name, _)| name.into()),
    }
}

pub fn first_argument(number: i32) -> FirstArgument {
    known(number).map_or(FirstArgument::Other, |(_, argument)| argument)
}

/// asm/unistd_64.h
#[cfg(target_arch = "x86_64")]
fn known(number: i32) -> Option<(&'static str, FirstArgument)> {
    use FirstArgument::{Child, Descriptor as Fd, Other as No, PollArray};
    Some(match number {
        0 => ("read", Fd),
        1 => ("write", Fd),
        2 => ("open", No),
        3 => ("close", Fd),
        4 => ("stat", No),
        5 => ("fstat", Fd),
        6 => ("lstat", No),
        7 => ("poll", PollArray),
        9 => ("mmap", No),
        11 => ("munmap", No),
        16 => ("ioctl", Fd),
        17 => ("pread64", Fd),
        18 => ("pwrite64", Fd),
        19 => ("readv", Fd),
        20 => ("writev", Fd),
        23 => ("select", No),
        24 => ("sched_yield", No),
        26 => ("msync", No),
        35 => ("nanosleep", No),
        40 => ("sendfile", Fd),
        42 => ("connect", Fd),
        43 => ("accept", Fd),
        44 => ("sendto", Fd),
        45 => ("recvfrom", Fd),
        46 => ("sendmsg", Fd),
        47 => ("recvmsg", Fd),
        56 => ("clone", No),
        57 => ("fork", No),
        58 => ("vfork", No),
        59 => ("execve", No),
        61 => ("wait4", Child),
        72 => ("fcntl", Fd),
        73 => ("flock", Fd),
        74 => ("fsync", Fd),
        75 => ("fdatasync", Fd),
        77 => ("ftruncate", Fd),
        82 => ("rename", No),
        83 => ("mkdir", No),
        87 => ("unlink", No),
        186 => ("gettid", No),
        202 => ("futex", No),
        217 => ("getdents64", Fd),
        230 => ("clock_nanosleep", No),
        232 => ("epoll_wait", Fd),
        247 => ("waitid", No),
        257 => ("openat", No),
        262 => ("newfstatat", No),
        263 => ("unlinkat", No),
        270 => ("pselect6", No),
        271 => ("ppoll", PollArray),
        281 => ("epoll_pwait", Fd),
        285 => ("fallocate", Fd),
        288 => ("accept4", Fd),
        299 => ("recvmmsg", Fd),
        306 => ("syncfs", Fd),
        326 => ("copy_file_range", Fd),
        426 => ("io_uring_enter", Fd),
        435 => ("clone3", No),
        441 => ("epoll_pwait2", Fd),
        449 => ("futex_waitv", No),
        _ => return None,
    })
}

/// asm-generic/unistd.h
#[cfg(target_arch = "aarch64")]
fn known(number: i32) -> Option<(&'static str, FirstArgument)> {
    use FirstArgument::{Child, Descriptor as Fd, Other as No, PollArray};
    Some(match number {
        22 => ("epoll_pwait", Fd),
        63 => ("read", Fd),
        64 => ("write", Fd),
        73 => ("ppoll", PollArray),
        82 => ("fsync", Fd),
        83 => ("fdatasync", Fd),
        98 => ("futex", No),
        101 => ("nanosleep", No),
        115 => ("clock_nanosleep", No),
        203 => ("connect", Fd),
        206 => ("sendto", Fd),
        207 => ("recvfrom", Fd),
        211 => ("sendmsg", Fd),
        212 => ("recvmsg", Fd),
        260 => ("wait4", Child),
        441 => ("epoll_pwait2", Fd),
        _ => return None,
    })
}

/// Whether the call is one of the polls that mark ticks.
pub fn is_epoll(number: i64) -> bool {
    i32::try_from(number).ok().and_then(known).is_some_and(|(name, _)| name.starts_with("epoll_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_numbers_of_this_machine() {
        assert_eq!(name(libc::SYS_recvfrom as i32), "recvfrom");
        assert_eq!(name(libc::SYS_futex as i32), "futex");
        assert_eq!(name(libc::SYS_clock_nanosleep as i32), "clock_nanosleep");
        assert_eq!(name(SYSCALL_NONE), "page fault");
        assert_eq!(name(9999), "syscall 9999");
        assert!(is_epoll(libc::SYS_epoll_pwait));
        assert!(!is_epoll(libc::SYS_ppoll));
    }
}
