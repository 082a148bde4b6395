//! Unmaps the pages of symbol files that naming has walked through; they stay in the page cache, and come back when a
//! name needs them.
//!
//! The tables of one libpython are 30 MB, read once for a handful of names. As long as they are mapped they count as
//! loopguard's own and are the last that the kernel gives up when memory is short. What was made of them is given back too
//! once it is freed.

use std::{collections::HashSet, fs, ops::Range};

/// Lets go of all file pages but those of the program itself and its libraries.
pub fn trim() {
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    for range in symbol_files(&maps) {
        // SAFETY: a mapping of a file that can't be written through it has the same bytes when it is read again.
        unsafe { libc::madvise(range.start as *mut libc::c_void, range.len(), libc::MADV_DONTNEED) };
    }
}

/// Gives memory that is free back to the system: the allocator keeps what lies between what is still used.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks, and touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Mappings of files that are only read. Of a file that is executed as well, what can only be read now may have been
/// written to before: relocated.
fn symbol_files(maps: &str) -> Vec<Range<usize>> {
    let lines = || maps.lines().filter_map(Line::parse);
    let is_read_only = |line: &Line| matches!(line.rights, "r--p" | "r--s");
    let loaded: HashSet<&str> = lines().filter(|line| !is_read_only(line)).map(|line| line.path).collect();
    let is_wanted = |line: &Line| line.path.starts_with('/') && !loaded.contains(line.path);
    lines().filter(is_wanted).map(|line| line.range).collect()
}

/// A line of `/proc/PID/maps` (proc_pid_maps(5)).
struct Line<'a> {
    range: Range<usize>,
    rights: &'a str,
    path: &'a str,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        let rights = fields.next()?;
        Some(Self { range: address(start)?..address(end)?, rights, path: fields.nth(3)?.trim_start() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_merely_read() {
        let maps = "\
            1000-2000 r--p 00000000 08:01 7                          /usr/bin/loopguard\n\
            2000-3000 r-xp 00001000 08:01 7                          /usr/bin/loopguard\n\
            3000-4000 rw-p 00000000 00:00 0 \n\
            4000-6000 r--p 00000000 08:01 8                          /opt/a b/libpython3.12.so.1.0\n\
            6000-7000 r--s 00000000 00:0f 9                          anon_inode:bpf-map\n\
            7000-8000 r--s 00000000 08:01 10                         /usr/lib/debug/x.debug\n\
            8000-9000 r--p 00000000 00:00 0                          [vvar]\n\
            nonsense\n";
        assert_eq!(symbol_files(maps), [0x4000..0x6000, 0x7000..0x8000]);
    }

    /// What is let go is not resident any more, and can be read again.
    #[test]
    fn bytes_come_back() {
        use std::os::fd::AsRawFd as _;
        const SIZE: usize = 1 << 20;
        let path = std::env::temp_dir().join(format!("loopguard-footprint-{}", std::process::id()));
        fs::write(&path, vec![7u8; SIZE]).unwrap();
        let file = fs::File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        // SAFETY: a new mapping, of a file that nobody else has.
        let bytes = unsafe {
            let at = libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0);
            assert_ne!(at, libc::MAP_FAILED);
            std::slice::from_raw_parts(at.cast::<u8>(), SIZE)
        };
        let resident = || {
            let maps = fs::read_to_string("/proc/self/smaps").unwrap();
            let of_file = maps.split_once(&format!("{:x}-", bytes.as_ptr() as usize)).unwrap().1;
            of_file.lines().find(|line| line.starts_with("Rss:")).unwrap().to_owned()
        };
        assert!(bytes.iter().all(|&byte| byte == 7));
        let before = resident();
        trim();
        assert_ne!(before, resident());
        assert!(bytes.iter().all(|&byte| byte == 7));
        // SAFETY: the mapping from above, and its last use.
        unsafe { libc::munmap(bytes.as_ptr().cast_mut().cast(), SIZE) };
    }
}
