//! A timer that is set again and again, by `timerfd_create(2)`.
//!
//! tokio's own timers end on whole milliseconds, and one that comes before all others has tokio interrupt its own sleep:
//! two system calls each time.

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use tokio::io::unix::AsyncFd;

#[derive(Debug)]
pub struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    /// One that rings at once.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a plain system call.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the descriptor is owned by what is registered, and closed after it.
        let alarm = Self(unsafe { AsyncFd::register(fd) }?);
        alarm.set(Duration::ZERO)?;
        Ok(alarm)
    }

    /// Has it ring `after` from now, whether or not it rang before.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        // Zero would take it away.
        let after = after.max(Duration::from_nanos(1));
        let value = libc::timespec {
            tv_sec: after.as_secs().cast_signed(),
            tv_nsec: libc::c_long::from(after.subsec_nanos().cast_signed()),
        };
        let once = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // SAFETY: `once` is a timer's setting, and nobody asks for the one before.
        let set = unsafe { libc::timerfd_settime(self.0.as_raw_fd(), 0, &once, std::ptr::null_mut()) };
        if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Waits until it rings. Nothing is read of it: setting it again takes back that it rang.
    pub async fn rings(&self) -> io::Result<()> {
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rings_once_each_time_it_is_set() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let alarm = Alarm::new().expect("timers");
            alarm.rings().await.expect("it rings at once");
            for after in [Duration::ZERO, Duration::from_micros(300), Duration::from_millis(2)] {
                alarm.set(after).expect("it can be set");
                let set = std::time::Instant::now();
                alarm.rings().await.expect("it rings");
                assert!(set.elapsed() + Duration::from_micros(100) >= after, "{:?} of {after:?}", set.elapsed());
            }
            let again = tokio::time::timeout(Duration::from_millis(20), alarm.rings()).await;
            assert!(again.is_err(), "it rang without being set");
        });
    }
}
