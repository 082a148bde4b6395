//! A program that runs beside a chore and never outlives it.

use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How long a companion may take to end when asked.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);

pub struct Companion {
    child: Child,
}

impl Companion {
    /// Apart from the terminal's Ctrl-C: it ends when we say so, or with us.
    pub fn start(command: &mut Command) -> Result<Self> {
        command.process_group(0);
        let child =
            ends_with_us(command).spawn().with_context(|| format!("start {}", command.get_program().display()))?;
        Ok(Self { child })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The other end of its standard input, where that is a pipe.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// Its status, if it has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        if self.ended().is_some() {
            return;
        }
        // SAFETY: our own child and not waited for yet, so the id is still its.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        let asked = Instant::now();
        while self.ended().is_none() {
            if asked.elapsed() > PATIENCE {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            thread::sleep(POLL);
        }
    }
}

/// Has the kernel end the program when this one ends, however that happens.
pub fn ends_with_us(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only this one system call is made.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        })
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C does not end this program: the one in the foreground decides what it means, and then
/// [`interrupted`] is true.
pub fn outlive_interrupts() {
    extern "C" fn note(_: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    // SAFETY: the handler only stores an atomic. A handler, unlike SIG_IGN, is not inherited by what we start.
    unsafe { libc::signal(libc::SIGINT, note as extern "C" fn(libc::c_int) as libc::sighandler_t) };
}

pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Whether somebody listens on a port. Who connects to a free one may be given that very port to connect from, and so
/// meet itself.
pub fn listens(port: u16) -> bool {
    let met = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .and_then(|stream| Ok((stream.local_addr()?, stream.peer_addr()?)));
    met.is_ok_and(|(own, peer)| own != peer)
}
