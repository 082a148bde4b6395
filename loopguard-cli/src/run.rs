//! `loopguard run`: starts a command, attached before its first instruction, and ends as it ends.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, IsTerminal as _, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    process::{Child, Command, ExitStatus},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::sink::escape::printable;

/// A process that waits to become the command.
pub struct Held {
    pub pid: u32,
    name: String,
    go: File,
    /// The standard library's own `spawn` returns once the command runs.
    spawned: JoinHandle<io::Result<Child>>,
}

/// The command, running.
pub struct Started {
    child: Child,
    name: String,
    was_told: bool,
}

/// What a command can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Interrupt,
    Terminate,
}

impl Held {
    /// Starts a process that does nothing before [`go`](Self::go).
    pub fn start(command: &[OsString]) -> Result<Self> {
        let [program, arguments @ ..] = command else { bail!("give the command to run behind --") };
        let (pid_read, pid_write) = pipe()?;
        let (go_read, go_write) = pipe()?;
        let mut command = Command::new(program);
        command.args(arguments);
        let our_end = go_write.as_raw_fd();
        // SAFETY: between fork and exec only calls that are safe there: close, getpid, write and read. The descriptor
        // that is closed is the child's copy of ours.
        unsafe {
            command.pre_exec(move || {
                libc::close(our_end);
                let pid = libc::getpid().to_ne_bytes();
                if libc::write(pid_write.as_raw_fd(), pid.as_ptr().cast(), pid.len()) != pid.len() as isize {
                    return Err(io::Error::last_os_error());
                }
                let mut go = [0u8];
                loop {
                    match libc::read(go_read.as_raw_fd(), go.as_mut_ptr().cast(), 1) {
                        1 => return Ok(()),
                        // Nobody will say go any more: loopguard could not attach, or has died.
                        0 => return Err(io::ErrorKind::ConnectionAborted.into()),
                        _ if *libc::__errno_location() == libc::EINTR => {}
                        _ => return Err(io::Error::last_os_error()),
                    }
                }
            });
        }
        let name = printable(&program.to_string_lossy()).to_string();
        let spawned = thread::spawn(move || command.spawn());
        let mut pid = [0; 4];
        let mut pid_read = File::from(pid_read);
        if pid_read.read_exact(&mut pid).is_err() {
            // It ended before it could say anything: the reason is what `spawn` says.
            let reason = spawned.join().map_err(|_| anyhow!("starting {name} failed"))?;
            bail!("{name} cannot be started: {}", reason.err().map_or_else(String::new, |error| reason_of(&error)));
        }
        Ok(Self { pid: u32::from_ne_bytes(pid), name, go: File::from(go_write), spawned })
    }

    /// Lets it become the command.
    pub fn go(mut self) -> Result<Started> {
        self.go.write_all(b"g").with_context(|| format!("{} ended before it began", self.name))?;
        let name = self.name;
        match self.spawned.join().map_err(|_| anyhow!("starting {name} failed"))? {
            Ok(child) => Ok(Started { child, name, was_told: false }),
            Err(error) => bail!("{name} cannot be started: {}", reason_of(&error)),
        }
    }
}

impl Started {
    /// Passes a signal on that loopguard got.
    pub fn tell(&mut self, signal: Signal) {
        self.was_told = true;
        let number = match signal {
            // From the terminal it went to the command as well.
            Signal::Interrupt if io::stdin().is_terminal() => return,
            Signal::Interrupt => libc::SIGINT,
            Signal::Terminate => libc::SIGTERM,
        };
        // SAFETY: a child that was not waited for yet, so the id is still its own.
        unsafe { libc::kill(self.child.id() as i32, number) };
    }

    /// Whether it got a signal through us already.
    pub fn was_told(&self) -> bool {
        self.was_told
    }

    /// Waits for its end. The code is the one a shell would have: 128 and the signal's number, if one ended it.
    pub fn code(mut self) -> Result<u8> {
        let status = self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(shell_code(status))
    }
}

fn shell_code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128u8.wrapping_add(signal as u8),
        (None, None) => 255,
    }
}

/// Closed on exec, both ends.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the call fills both.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error()).context("make a pipe");
    }
    // SAFETY: two fresh descriptors that nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

fn reason_of(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such program".to_owned(),
        io::ErrorKind::PermissionDenied => "it is not permitted to run it".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn a_held_command_does_nothing_before_it_may() {
        let path = std::env::temp_dir().join(format!("loopguard-run-{}", std::process::id()));
        let held = Held::start(&command(&["touch", path.to_str().unwrap()])).unwrap();
        // It is there, and it is not the command yet.
        let exe = std::fs::read_link(format!("/proc/{}/exe", held.pid)).unwrap();
        assert_eq!(exe, std::env::current_exe().unwrap());
        assert!(!path.exists());
        assert_eq!(held.go().unwrap().code().unwrap(), 0);
        assert!(path.exists());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn the_end_is_told_as_a_shell_tells_it() {
        let code = |words: &[&str]| Held::start(&command(words)).unwrap().go().unwrap().code().unwrap();
        assert_eq!(code(&["sh", "-c", "exit 7"]), 7);
        assert_eq!(code(&["sh", "-c", "kill -TERM $$"]), 143);
    }

    #[test]
    fn what_cannot_be_started_is_said_plainly() {
        let held = Held::start(&command(&["/nowhere/at/all"])).unwrap();
        let Err(error) = held.go() else { panic!("there is no such program") };
        assert_eq!(error.to_string(), "/nowhere/at/all cannot be started: there is no such program");
    }
}
