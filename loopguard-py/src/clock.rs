//! Reads the clock that loopguard's own records use.

/// `CLOCK_MONOTONIC` in nanoseconds, as `time.monotonic_ns` reads it.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// For an interval in Python's usual unit here.
pub fn milliseconds(ns: u64) -> f64 {
    ns as f64 / 1e6
}
