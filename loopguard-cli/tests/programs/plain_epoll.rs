//! A server without any runtime that blocks its loop for as many milliseconds as a connection's first byte says, times
//! ten.

use std::{
    io::{self, Read as _, Write as _},
    net::TcpListener,
    os::fd::AsRawFd as _,
    thread,
    time::Duration,
};

// linux/eventpoll.h
const EPOLL_CTL_ADD: i32 = 1;
const EPOLLIN: u32 = 1;

#[cfg_attr(target_arch = "x86_64", repr(C, packed))]
#[cfg_attr(not(target_arch = "x86_64"), repr(C))]
struct Event {
    events: u32,
    data: u64,
}

unsafe extern "C" {
    fn epoll_create1(flags: i32) -> i32;
    fn epoll_ctl(epoll: i32, operation: i32, descriptor: i32, event: *mut Event) -> i32;
    fn epoll_wait(epoll: i32, events: *mut Event, count: i32, timeout_ms: i32) -> i32;
}

fn main() -> io::Result<()> {
    let port: u16 = std::env::args().nth(1).and_then(|text| text.parse().ok()).expect("the port");
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let mut event = Event { events: EPOLLIN, data: 0 };
    // SAFETY: a call without pointers, and one with an event that lives longer than it.
    let (epoll, added) = unsafe {
        let epoll = epoll_create1(0);
        (epoll, epoll_ctl(epoll, EPOLL_CTL_ADD, listener.as_raw_fd(), &mut event))
    };
    assert!(epoll >= 0 && added == 0, "no epoll");
    loop {
        // SAFETY: room for the one event that is asked for.
        if unsafe { epoll_wait(epoll, &mut event, 1, -1) } != 1 {
            continue;
        }
        let (mut stream, _) = listener.accept()?;
        let mut tens = [0];
        if stream.read_exact(&mut tens).is_ok() {
            thread::sleep(Duration::from_millis(u64::from(tens[0]) * 10));
            let _ = stream.write_all(b"done");
        }
    }
}
