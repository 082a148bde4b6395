//! What a task's connection read and wrote last: enough to tell which request it works on.
//!
//! Nothing is parsed here. The kernel programs keep the first bytes since the last answer began, from the start of a
//! request on; user space reads them when a step was long.

/// What is kept of it; the first half can be filled by one read at any place.
pub const TRAIL_READ: usize = 2048;
pub const TRAIL_ANSWER: usize = 256;
/// As much as is copied at a time.
pub const TRAIL_PIECE: usize = TRAIL_READ / 2;
/// As many bytes are looked at to tell a request or an answer.
pub const TRAIL_START: usize = 16;

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trail {
    pub fd: i32,
    /// Answers that began since the first byte kept.
    pub answers: u32,
    /// Bytes read since, kept or not.
    pub read_length: u64,
    /// Bytes written of the last answer.
    pub answer_length: u64,
    pub kept: u32,
    pub answer_kept: u32,
    /// It is that of the task that spawned this one.
    pub inherited: u32,
    pub _pad: u32,
    pub read: [u8; TRAIL_READ],
    pub answer: [u8; TRAIL_ANSWER],
}

const _: () = assert!(size_of::<Trail>() == 40 + TRAIL_READ + TRAIL_ANSWER);

/// Whose trail it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskKey {
    pub task_id: u64,
    pub tgid: u32,
    pub _pad: u32,
}

/// What bytes that were just read mean for the trail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// Not of this connection, or nobody knows what of.
    Ignore,
    /// A request begins.
    Begin,
    /// The one being read goes on, or another one follows it before it is answered.
    GoOn,
}

impl Trail {
    /// `start`: the first bytes of what was read, `got` many in all.
    #[inline(always)]
    pub fn read(&self, fd: i32, start: &[u8; TRAIL_START], got: u64) -> Read {
        if self.inherited != 0 {
            return Self::first_read(start, got);
        }
        if fd != self.fd {
            Read::Ignore
        } else if self.answers != 0 && is_request(start, got) {
            Read::Begin
        } else {
            Read::GoOn
        }
    }

    /// Of a task that has no trail yet.
    #[inline(always)]
    pub fn first_read(start: &[u8; TRAIL_START], got: u64) -> Read {
        if is_request(start, got) { Read::Begin } else { Read::Ignore }
    }

    #[inline(always)]
    pub fn begin(&mut self, fd: i32) {
        self.fd = fd;
        self.answers = 0;
        self.read_length = 0;
        self.answer_length = 0;
        self.kept = 0;
        self.answer_kept = 0;
        self.inherited = 0;
    }
}

/// Whether bytes can be the start of a request: a method in capital letters, then a path or a URL. Protocols that user
/// space has an answer to (the preface of HTTP/2, a TLS handshake) are let through as well.
#[inline(always)]
fn is_request(start: &[u8; TRAIL_START], got: u64) -> bool {
    if start[0] == 0x16 && start[1] == 0x03 {
        return true;
    }
    let mut i = 0;
    while i < 10 {
        // So short a read ends within the method.
        if i as u64 >= got {
            return i > 0;
        }
        let byte = start[i];
        if byte == b' ' {
            return i > 1 && (i as u64 + 1 >= got || matches!(start[i + 1], b'/' | b'h' | b'*'));
        }
        if !byte.is_ascii_uppercase() {
            return false;
        }
        i += 1;
    }
    false
}

/// Whether bytes are the start of an answer that is no interim one (1xx).
#[inline(always)]
pub fn is_answer(start: &[u8; TRAIL_START]) -> bool {
    start[0] == b'H'
        && start[1] == b'T'
        && start[2] == b'T'
        && start[3] == b'P'
        && start[4] == b'/'
        && start[5] == b'1'
        && start[8] == b' '
        && start[9] != b'1'
}

#[cfg(feature = "user")]
// SAFETY: plain integers without padding bytes.
unsafe impl aya::Pod for Trail {}
#[cfg(feature = "user")]
// SAFETY: as above.
unsafe impl aya::Pod for TaskKey {}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(text: &[u8]) -> [u8; TRAIL_START] {
        let mut start = [0xff; TRAIL_START];
        let length = text.len().min(TRAIL_START);
        start[..length].copy_from_slice(&text[..length]);
        start
    }

    fn request(text: &[u8]) -> bool {
        is_request(&start(text), text.len() as u64)
    }

    #[test]
    fn requests_are_told_from_other_bytes() {
        for yes in
            [&b"GET / HTTP/1.1"[..], b"OPTIONS * HTTP/1.1", b"PRI * HTTP/2.0", b"POST", b"G", b"PUT ", b"\x16\x03\x01"]
        {
            assert!(request(yes), "{yes:?}");
        }
        for no in
            [&b"HTTP/1.1 200 OK"[..], b"{\"a\": 1}", b"get / ", b"GET  ", b" GET /", b"ABCDEFGHIJKL", b"GET index", b""]
        {
            assert!(!request(no), "{no:?}");
        }
    }

    #[test]
    fn answers_are_told_from_bodies() {
        assert!(is_answer(&start(b"HTTP/1.1 200 OK\r\n")));
        assert!(is_answer(&start(b"HTTP/1.0 404 Not")));
        for no in [&b"HTTP/1.1 100 Continue"[..], b"hello HTTP/1.1 200", b"HTTP/2.0 200 OK"] {
            assert!(!is_answer(&start(no)), "{no:?}");
        }
    }

    #[test]
    fn a_request_begins_only_after_an_answer() {
        // SAFETY: integers, for which all zero is a value.
        let mut trail: Trail = unsafe { core::mem::zeroed() };
        let get = start(b"GET / HTTP/1.1");
        assert_eq!(Trail::first_read(&get, 14), Read::Begin);
        assert_eq!(Trail::first_read(&start(b"HTTP/1.1 200"), 14), Read::Ignore);
        trail.begin(7);
        // A body that looks like a request, and one that was sent before the answer.
        assert_eq!(trail.read(7, &get, 14), Read::GoOn);
        // Of an upstream server.
        assert_eq!(trail.read(8, &get, 14), Read::Ignore);
        trail.answers = 1;
        assert_eq!(trail.read(7, &get, 14), Read::Begin);
        assert_eq!(trail.read(7, &start(b"rest of a body"), 14), Read::GoOn);
        trail.inherited = 1;
        assert_eq!(trail.read(9, &get, 14), Read::Begin);
        assert_eq!(trail.read(7, &start(b"rest of a body"), 14), Read::Ignore);
    }
}
