//! Opens files by names that a target chose: only regular ones, and no link leads out of the target's own root.

use std::ffi::CString;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};
use std::path::PathBuf;

/// The target's own file of that name, opened for reading.
pub fn open(pid: u32, path: &str) -> io::Result<File> {
    // A relative path is relative to where the process was started: mostly where it still is.
    let from = if path.starts_with('/') { "root" } else { "cwd" };
    open_if(&format!("/proc/{pid}/{from}"), path, |_| true)
}

/// A file as the process with the root folder `root` sees it, opened for reading if it is a regular one and `is_wanted`.
pub fn open_if(root: &str, path: &str, is_wanted: impl FnOnce(&Metadata) -> bool) -> io::Result<File> {
    let found = open_inside(&open_folder(root)?, path)?;
    // Opening a pipe or a device can have effects, so it is looked at first (O_PATH opens nothing).
    let metadata = File::from(found.try_clone()?).metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if !is_wanted(&metadata) {
        return Err(io::ErrorKind::NotFound.into());
    }
    File::open(own_path(&found))
}

/// A path of ours that leads to an open file, for as long as it is open.
pub fn own_path(file: &impl AsRawFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fn open_folder(path: &str) -> io::Result<OwnedFd> {
    let path = CString::new(path)?;
    // SAFETY: a path that ends in a nul byte; the result is checked.
    owned(unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC) }.into())
}

/// As if `folder` were the root: neither `..` nor a link leads out of it (openat2(2)).
fn open_inside(folder: &OwnedFd, path: &str) -> io::Result<OwnedFd> {
    let path = CString::new(path)?;
    // SAFETY: a struct of integers, for which all zero is a value.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_PATH | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    let (folder, size) = (folder.as_raw_fd(), size_of::<libc::open_how>());
    // SAFETY: valid pointers to a path and a struct of the size that is given; the result is checked.
    owned(unsafe { libc::syscall(libc::SYS_openat2, folder, path.as_ptr(), &how, size) })
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: a new descriptor that nothing else owns.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn links_do_not_lead_out_and_pipes_are_not_opened() {
        let folder = std::env::temp_dir().join(format!("loopguard-target-file-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let root = folder.to_str().unwrap();
        fs::write(folder.join("app.py"), "x").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.join("out.py")).unwrap();
        std::os::unix::fs::symlink("/app.py", folder.join("in.py")).unwrap();
        let pipe = CString::new(folder.join("pipe.py").to_str().unwrap()).unwrap();
        // SAFETY: a path that ends in a nul byte.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        let opens = |path: &str| open_if(root, path, |_| true);
        let opened = ["in.py", "../../app.py", "out.py", "../../../etc/passwd"].map(|path| opens(path).is_ok());
        let said = ["pipe.py", "/"].map(|path| opens(path).unwrap_err().to_string());
        let inode = fs::metadata(folder.join("app.py")).unwrap().ino();
        let by_inode = [inode, inode + 1].map(|wanted| open_if(root, "/in.py", |file| file.ino() == wanted).is_ok());
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(opened, [true, true, false, false]);
        assert_eq!(said, ["not a regular file", "not a regular file"]);
        assert_eq!(by_inode, [true, false]);
    }
}
