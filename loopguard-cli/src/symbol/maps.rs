//! Turns `/proc/PID/maps` into the places where a process has code.

use std::{fs, io, path::PathBuf};

/// Mappings that are looked at; the kernel allows 65530 by default.
const MAX_MAPPINGS: usize = 131_072;

/// Which file: the same one under whatever name, in whatever mount namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileKey {
    /// As `maps` writes it (`fe:01`), as one number.
    pub device: u64,
    pub inode: u64,
}

/// An executable mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeMapping {
    pub start: u64,
    pub end: u64,
    /// Offset of `start` in the file, in bytes.
    pub offset: u64,
    pub backing: Backing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// `path` is the target's own name for it, ` (deleted)` included.
    File {
        key: FileKey,
        path: String,
    },
    Vdso,
    /// Code that a program made for itself at run time.
    Anonymous,
}

impl CodeMapping {
    pub fn contains(&self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// Names the mapping's file in every mount namespace, deleted or not.
    pub fn map_file(&self, pid: u32) -> PathBuf {
        format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end).into()
    }
}

/// The executable mappings of a process, in address order.
pub fn code_mappings(pid: u32) -> io::Result<Vec<CodeMapping>> {
    // A path may hold any bytes but NUL and (escaped) newline.
    let maps = fs::read(format!("/proc/{pid}/maps"))?;
    let lines = maps.split(|&byte| byte == b'\n').take(MAX_MAPPINGS);
    Ok(lines.filter_map(|line| parse(&String::from_utf8_lossy(line))).collect())
}

/// `7f00a000-7f00b000 r-xp 00001000 fe:01 1234     /usr/lib/a b.so (deleted)`
fn parse(line: &str) -> Option<CodeMapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode: u64 = fields.next()?.parse().ok()?;
    let path = fields.next().unwrap_or_default().trim_start();
    if !permissions.contains('x') {
        return None;
    }
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let backing = match path {
        "[vdso]" => Backing::Vdso,
        _ if path.starts_with('/') && inode != 0 => {
            Backing::File { key: FileKey { device: hex(major)? << 32 | hex(minor)?, inode }, path: path.to_owned() }
        }
        _ => Backing::Anonymous,
    };
    Some(CodeMapping { start: hex(start)?, end: hex(end)?, offset, backing })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let file =
            parse("7f00a000-7f00b000 r-xp 00001000 fe:01 1234                  /usr/lib/a b.so (deleted)").unwrap();
        assert_eq!((file.start, file.end, file.offset), (0x7f00_a000, 0x7f00_b000, 0x1000));
        let key = FileKey { device: 0xfe << 32 | 1, inode: 1234 };
        assert_eq!(file.backing, Backing::File { key, path: "/usr/lib/a b.so (deleted)".to_owned() });
        assert!(file.contains(0x7f00_afff) && !file.contains(0x7f00_b000));
        let backing = |line: &str| parse(line).map(|mapping| mapping.backing);
        assert_eq!(backing("7ffd-7fff r-xp 00000000 00:00 0                   [vdso]"), Some(Backing::Vdso));
        assert_eq!(backing("7f00a000-7f00b000 rwxp 00000000 00:00 0 "), Some(Backing::Anonymous));
        for line in ["", "7f00a000-7f00b000 rw-p 00000000 00:00 0 ", "x y z", "7f00a000-7f00b000 r-xp 0 fe 1 /a"] {
            assert_eq!(parse(line), None);
        }
    }
}
