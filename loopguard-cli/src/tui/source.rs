//! Reads the few lines around a place in a target's source file, as the target sees its files.
//!
//! The path comes from the target, and so may the file system: little is read, and a file system that never answers holds
//! up a thread of its own and not the screen.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::state::{Source, SourceAt};
use crate::runtime::target_file;

/// Lines shown before and after.
const AROUND: u32 = 3;
/// A line further into its file than this is not looked for.
const MAX_FILE: u64 = 4 << 20;
const MAX_LINE: usize = 400;

/// Reads one place at a time, apart from the screen.
pub struct SourceReader {
    done: UnboundedSender<(SourceAt, Source)>,
    read: UnboundedReceiver<(SourceAt, Source)>,
    is_busy: Arc<AtomicBool>,
}

impl Default for SourceReader {
    fn default() -> Self {
        let (done, read) = unbounded_channel();
        Self { done, read, is_busy: Arc::default() }
    }
}

impl SourceReader {
    /// Does nothing while another place is being read: what is still wanted then is asked for again.
    pub fn start(&self, at: SourceAt) {
        if self.is_busy.swap(true, Ordering::Relaxed) {
            return;
        }
        let (done, is_busy) = (self.done.clone(), Arc::clone(&self.is_busy));
        let reads = move || {
            let source = excerpt(&at);
            is_busy.store(false, Ordering::Relaxed);
            // The screen may be gone by now.
            let _ = done.send((at, source));
        };
        if thread::Builder::new().name("source".to_owned()).spawn(reads).is_err() {
            self.is_busy.store(false, Ordering::Relaxed);
        }
    }

    /// Waits until a place was read.
    pub async fn read(&mut self) -> (SourceAt, Source) {
        match self.read.recv().await {
            Some(read) => read,
            // Never: a sender is kept here.
            None => std::future::pending().await,
        }
    }
}

fn excerpt(at: &SourceAt) -> Source {
    if at.file.starts_with('<') {
        return Source::Unreadable("made at run time: there is no source file".to_owned());
    }
    match read(at) {
        Ok((lines, _)) if lines.is_empty() => Source::Unreadable("the file has no such line".to_owned()),
        Ok((lines, is_newer)) => Source::Lines { lines, is_newer },
        Err(error) => {
            Source::Unreadable(format!("source not readable: {}", crate::sink::escape::plain(&error.to_string())))
        }
    }
}

fn read(at: &SourceAt) -> io::Result<(Vec<(u32, String)>, bool)> {
    let file = target_file::open(at.pid, &at.file)?;
    let modified = file.metadata()?.modified()?;
    let is_newer = started(at.pid).is_some_and(|started| modified > started);
    let (first, last) = (at.line.saturating_sub(AROUND).max(1), at.line.saturating_add(AROUND));
    let mut lines = Vec::new();
    let pieces = BufReader::new(file.take(MAX_FILE)).split(b'\n').take(last as usize);
    for (number, line) in (1..).zip(pieces) {
        let mut line = line?;
        if number >= first {
            line.truncate(MAX_LINE);
            lines.push((number, String::from_utf8_lossy(&line).trim_end().to_owned()));
        }
    }
    // A file that ends before is not the one.
    let reaches = lines.last().is_some_and(|(number, _)| *number >= at.line);
    Ok((if reaches { lines } else { Vec::new() }, is_newer))
}

/// When a process was started, to a tick of the clock (proc(5): field 22 of stat, btime).
fn started(pid: u32) -> Option<SystemTime> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may hold anything, also blanks and brackets.
    let ticks: u64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let boot: u64 = fs::read_to_string("/proc/stat")
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())?;
    // SAFETY: reads one number.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as u64;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(boot) + Duration::from_millis(ticks * 1000 / per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(file: &str, line: u32) -> Source {
        excerpt(&SourceAt { pid: std::process::id(), file: file.to_owned(), line })
    }

    fn lines(source: Source) -> Vec<(u32, String)> {
        match source {
            Source::Lines { lines, .. } => lines,
            Source::Unreadable(why) => panic!("{why}"),
        }
    }

    fn why(source: Source) -> String {
        match source {
            Source::Lines { lines, .. } => panic!("{lines:?}"),
            Source::Unreadable(why) => why,
        }
    }

    #[test]
    fn the_lines_around_are_read() {
        let this = format!("{}/src/tui/source.rs", env!("CARGO_MANIFEST_DIR"));
        let text: Vec<_> = include_str!("source.rs").lines().collect();
        let numbers = |line| lines(of(&this, line)).iter().map(|(number, _)| *number).collect::<Vec<_>>();
        assert_eq!(numbers(10), (7..=13).collect::<Vec<_>>());
        assert_eq!(numbers(1), (1..=4).collect::<Vec<_>>());
        assert_eq!(lines(of(&this, 10))[3], (10, text[9].to_owned()));
        // Relative to where this process is, which is where cargo starts it.
        assert_eq!(lines(of("src/tui/source.rs", 1))[0], (1, text[0].to_owned()));
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        assert_eq!(why(of("/nowhere/at/all.py", 1)), "source not readable: No such file or directory");
        assert_eq!(why(of("<frozen runpy>", 1)), "made at run time: there is no source file");
        assert_eq!(why(of("/proc/self/comm", 77)), "the file has no such line");
        assert_eq!(why(of("/", 1)), "source not readable: not a regular file");
        assert_eq!(why(of("/dev/zero", 1)), "source not readable: not a regular file");
    }

    #[test]
    fn a_process_started_after_the_clock_and_before_now() {
        let started = started(std::process::id()).unwrap();
        let ago = SystemTime::now().duration_since(started).unwrap_or_default();
        assert!(ago < Duration::from_secs(24 * 3600), "{ago:?}");
    }
}
