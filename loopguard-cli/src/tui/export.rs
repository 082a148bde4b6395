//! Writes the blocks that were selected to a new file, one JSON object a line, as `--format jsonl` does.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::sink::Sink as _;
use crate::sink::jsonl::JsonLines;
use crate::tui::state::Seen;

/// Files of the same second.
const MAX_TRIES: u32 = 100;

/// The file's name, or what went wrong in one sentence.
pub fn write(blocks: &[Arc<Seen>], folder: &Path) -> Result<PathBuf, String> {
    let (name, file) = create(folder, SystemTime::now()).map_err(|error| refused(folder, &error))?;
    let mut out = BufWriter::new(file);
    let mut lines = JsonLines::new(&mut out);
    let told = blocks.iter().try_for_each(|block| lines.update(&block.update()));
    told.and_then(|()| out.flush()).map_err(|error| refused(&name, &error))?;
    Ok(name)
}

fn refused(path: &Path, error: &io::Error) -> String {
    format!("cannot write to {}: {}", path.display(), crate::sink::escape::plain(&error.to_string()))
}

/// Never an existing file, and never what a link leads to.
fn create(folder: &Path, now: SystemTime) -> io::Result<(PathBuf, File)> {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let mut number = 1;
    loop {
        let number_of_second = if number == 1 { String::new() } else { format!("-{number}") };
        let path = folder.join(format!("loopguard-{seconds}{number_of_second}.jsonl"));
        // `create_new` is O_CREAT | O_EXCL: open(2) fails where the name exists, be it as a dangling link.
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < MAX_TRIES => number += 1,
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::tui::state::scripted::block;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("loopguard-export-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn blocks_are_written_one_a_line() {
        let folder = Folder::new("lines");
        let blocks = [block("GET /a", 60), block("GET /b", 70)].map(|block| Arc::new(Seen::Single(block)));
        let names = [write(&blocks, &folder.0).unwrap(), write(&blocks[..1], &folder.0).unwrap()];
        assert_ne!(names[0], names[1]);
        let lines: Vec<serde_json::Value> =
            fs::read_to_string(&names[0]).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!((&lines[1]["type"], &lines[1]["requests"][0]["path"]), (&"block".into(), &"/b".into()));
    }

    #[test]
    fn nothing_is_overwritten_and_no_link_followed() {
        let folder = Folder::new("links");
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(7);
        let elsewhere = folder.0.join("elsewhere");
        std::os::unix::fs::symlink(&elsewhere, folder.0.join("loopguard-7.jsonl")).unwrap();
        fs::write(folder.0.join("loopguard-7-2.jsonl"), "mine").unwrap();
        let (name, _) = create(&folder.0, now).unwrap();
        assert_eq!(name, folder.0.join("loopguard-7-3.jsonl"));
        assert!(!elsewhere.exists());
        assert_eq!(fs::read_to_string(folder.0.join("loopguard-7-2.jsonl")).unwrap(), "mine");
    }

    #[test]
    fn where_nothing_can_be_written_that_is_said() {
        let error = write(&[Arc::new(Seen::Single(block("GET /", 60)))], Path::new("/proc/nowhere")).unwrap_err();
        assert!(error.starts_with("cannot write to /proc/nowhere: ") && !error.contains("os error"), "{error}");
    }
}
