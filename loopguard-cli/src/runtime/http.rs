//! Turns what a connection has read into the HTTP/1 request it works on.
//!
//! Of each of tokio's tasks the kernel keeps what it has read since its last answer began, and how the last answer went
//! out. From that follows which of the requests is being worked on; where two could be, none is named.

/// Headers and paths are cut at this many bytes.
const MAX_TEXT: usize = 256;
const MAX_METHOD: usize = 16;

/// What the kernel kept of a task's connection.
#[derive(Clone, Copy, Debug)]
pub struct Trail<'a> {
    /// The first bytes read since the last answer began, from the start of a request on.
    pub read: &'a [u8],
    /// How many there were in all.
    pub read_length: u64,
    /// How many answers began since.
    pub answers: u32,
    /// The first bytes of the last answer, and how many were written of it in all.
    pub answer: &'a [u8],
    pub answer_length: u64,
}

/// A request as its head says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub method: String,
    /// Without the query.
    pub path: String,
    /// `x-request-id`.
    pub request_id: Option<String>,
    /// From `traceparent`.
    pub trace_id: Option<String>,
}

/// Why no request is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotHttp {
    /// Nothing was read that looks like one.
    NothingRead,
    Tls,
    Http2,
    /// Something else, or the start is missing.
    OtherBytes,
    /// Several requests came at once, and it can't be told which of two is being worked on.
    Several,
}

impl NotHttp {
    pub fn reason(self) -> &'static str {
        match self {
            Self::NothingRead => "the task has read no request since loopguard came",
            Self::Tls => "the connection is encrypted (TLS): requests need the probes of loopguard-emit",
            Self::Http2 => "the connection speaks HTTP/2: requests need the probes of loopguard-emit",
            Self::OtherBytes => "what the task has read is no HTTP/1 request",
            Self::Several => "several requests came at once on the connection",
        }
    }
}

/// The head that these bytes begin with, or as much of it as is there: its first line at least.
pub fn head(bytes: &[u8]) -> Option<Head> {
    Some(parse(bytes)?.head)
}

/// The request that a task works on.
pub fn current(trail: &Trail) -> Result<Head, NotHttp> {
    let mut requests = Vec::new();
    let mut rest = trail.read;
    // How far the bytes go that are known to be whole requests.
    let end = loop {
        let Some(request) = parse(rest) else { break rest };
        let length = request.length;
        requests.push(request.head);
        match length.and_then(|length| rest.get(length..)) {
            Some(next) if !next.is_empty() => rest = next,
            Some(_) => break &[],
            // Its head or body goes on behind what was kept.
            None => break &[],
        }
    };
    if requests.is_empty() {
        return Err(refuse(trail.read));
    }
    let answered = trail.answers as usize;
    let cut = trail.read_length > trail.read.len() as u64;
    // More came than was kept: a later request may stand in what is missing.
    let more_may_follow = !end.is_empty() || (cut && answered > 0);
    let last = requests.len() - 1;
    if answered == 0 {
        return Ok(requests.swap_remove(0));
    }
    if answered > last + 1 || (answered == last + 1 && more_may_follow) {
        return Err(NotHttp::Several);
    }
    if answered == last + 1 {
        // All are answered: what goes on is the end of the last one.
        return Ok(requests.swap_remove(last));
    }
    // The next one begins once the answer before it is complete.
    if answer_is_complete(trail.answer, trail.answer_length) {
        Ok(requests.swap_remove(answered))
    } else {
        Err(NotHttp::Several)
    }
}

fn refuse(read: &[u8]) -> NotHttp {
    if read.is_empty() {
        NotHttp::NothingRead
    } else if read.starts_with(b"PRI * HTTP/2") {
        NotHttp::Http2
    } else if read.starts_with(&[0x16, 0x03]) {
        NotHttp::Tls
    } else {
        NotHttp::OtherBytes
    }
}

struct Request {
    head: Head,
    /// Head and body, when the head is whole and says it.
    length: Option<usize>,
}

/// A request whose first line is whole.
fn parse(bytes: &[u8]) -> Option<Request> {
    let line_end = find(bytes, b"\r\n")?;
    let mut words = bytes[..line_end].split(|&byte| byte == b' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let is_method = (1..=MAX_METHOD).contains(&method.len()) && method.iter().all(u8::is_ascii_uppercase);
    if !is_method || words.next().is_some() || !version.starts_with(b"HTTP/1.") {
        return None;
    }
    let path = path_of(target)?;
    let head_end = find(bytes, b"\r\n\r\n").map(|at| at + 4);
    let fields = Fields(bytes.get(line_end + 2..head_end.unwrap_or(bytes.len())).unwrap_or_default());
    // A header that is cut off is not the header.
    let whole = |name| fields.get(name);
    let head = Head {
        method: text(method),
        path,
        request_id: whole("x-request-id").map(text),
        trace_id: whole("traceparent").and_then(|header| trace_id(&text(header))),
    };
    let length = head_end.and_then(|head_end| {
        if whole("transfer-encoding").is_some() || whole("upgrade").is_some() {
            return None;
        }
        let body = match whole("content-length") {
            Some(length) => std::str::from_utf8(length).ok()?.parse::<usize>().ok()?,
            None => 0,
        };
        head_end.checked_add(body)
    });
    Some(Request { head, length })
}

/// `/a/b` of `/a/b?c`, or of `http://host/a/b?c`.
pub fn path_of(target: &[u8]) -> Option<String> {
    let path = match target {
        [b'/', ..] => target,
        b"*" => target,
        _ => {
            let host = find(target, b"://")? + 3;
            let slash = target[host..].iter().position(|&byte| byte == b'/')?;
            &target[host + slash..]
        }
    };
    let end = path.iter().position(|&byte| byte == b'?').unwrap_or(path.len());
    Some(text(&path[..end]))
}

/// Header lines, each ended by CR LF.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a [u8]> {
        let mut rest = self.0;
        while let Some(end) = find(rest, b"\r\n") {
            let line = &rest[..end];
            rest = &rest[end + 2..];
            let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
            if line[..colon].eq_ignore_ascii_case(name.as_bytes()) {
                return Some(line[colon + 1..].trim_ascii());
            }
        }
        None
    }
}

/// The trace id of a `traceparent` header (W3C Trace Context: `version-trace_id-parent_id-flags`).
pub fn trace_id(header: &str) -> Option<String> {
    let mut fields = header.trim().split('-');
    let mut hex = |length: usize| {
        fields.next().filter(|field| field.len() == length && field.bytes().all(|byte| byte.is_ascii_hexdigit()))
    };
    let (version, trace, _parent, _flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    let valid = !version.eq_ignore_ascii_case("ff") && trace.bytes().any(|byte| byte != b'0');
    valid.then(|| trace.to_ascii_lowercase())
}

/// Whether all of an answer was written: its head says how long it is.
fn answer_is_complete(answer: &[u8], written: u64) -> bool {
    let Some(line_end) = find(answer, b"\r\n") else { return false };
    let Some(head_end) = find(answer, b"\r\n\r\n").map(|at| at + 4) else { return false };
    let fields = Fields(&answer[line_end + 2..head_end]);
    let length = fields.get("content-length").and_then(|length| std::str::from_utf8(length).ok()?.parse::<u64>().ok());
    // Those have no body, whatever they say (RFC 9112, 6.3).
    let status = answer.get(9..12).unwrap_or_default();
    match length {
        _ if matches!(status, b"204" | b"304") => true,
        Some(length) => written.checked_sub(head_end as u64).is_some_and(|body| body >= length),
        None => false,
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_TEXT)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GET: &str = "GET /a/7?x=1 HTTP/1.1\r\nHost: h\r\nX-Request-ID: id-1\r\n\r\n";
    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";

    fn trail<'a>(read: &'a str, answers: u32, answer: &'a str) -> Trail<'a> {
        Trail {
            read: read.as_bytes(),
            read_length: read.len() as u64,
            answers,
            answer: answer.as_bytes(),
            answer_length: answer.len() as u64,
        }
    }

    fn check(trail: Trail, expected: Result<&str, NotHttp>) {
        let found = current(&trail).map(|head| match head.request_id {
            Some(id) => format!("{} {} {id}", head.method, head.path),
            None => format!("{} {}", head.method, head.path),
        });
        assert_eq!(found, expected.map(str::to_owned));
    }

    #[test]
    fn a_request_and_its_headers() {
        check(trail(GET, 0, ""), Ok("GET /a/7 id-1"));
        check(trail("GET http://host:80/b HTTP/1.0\r\n\r\n", 0, ""), Ok("GET /b"));
        check(trail("OPTIONS * HTTP/1.1\r\n\r\n", 0, ""), Ok("OPTIONS *"));
        let parent = "0af7651916cd43dd8448eb211c80319c";
        let traced = format!("GET / HTTP/1.1\r\ntraceparent: 00-{parent}-b7ad6b7169203331-01\r\n\r\n");
        assert_eq!(current(&trail(&traced, 0, "")).unwrap().trace_id.as_deref(), Some(parent));
    }

    #[test]
    fn trace_ids() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(trace_id(&format!("00-{id}-00f067aa0ba902b7-01")).as_deref(), Some(id));
        assert_eq!(trace_id(&format!(" 00-{}-00f067aa0ba902b7-01 ", id.to_uppercase())).as_deref(), Some(id));
        // A later version may add fields.
        assert_eq!(trace_id(&format!("01-{id}-00f067aa0ba902b7-01-more")).as_deref(), Some(id));
        for header in [
            "",
            "00",
            id,
            &format!("00-{id}"),
            &format!("ff-{id}-00f067aa0ba902b7-01"),
            &format!("00-{id}0-00f067aa0ba902b7-01"),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
        ] {
            assert_eq!(trace_id(header), None, "{header}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_harmless(header: String) {
            trace_id(&header);
        }
    }

    #[test]
    fn a_head_that_is_not_whole() {
        // Its line is enough; a header is not read before its end.
        check(trail("GET /a HTTP/1.1\r\nx-request-id: cut", 0, ""), Ok("GET /a"));
        check(trail("GET /a HTTP", 0, ""), Err(NotHttp::OtherBytes));
    }

    #[test]
    fn what_is_no_request() {
        check(trail("", 0, ""), Err(NotHttp::NothingRead));
        check(trail("\u{16}\u{3}\u{1}", 0, ""), Err(NotHttp::Tls));
        check(trail("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0, ""), Err(NotHttp::Http2));
        for bytes in ["HTTP/1.1 200 OK\r\n\r\n", "get / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1 x\r\n\r\n", "GET /\r\n\r\n"]
        {
            check(trail(bytes, 0, ""), Err(NotHttp::OtherBytes));
        }
    }

    #[test]
    fn a_body_is_no_request() {
        let body = GET.repeat(3);
        let post = format!("POST /up HTTP/1.1\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        check(trail(&post, 0, ""), Ok("POST /up"));
        check(trail(&post, 1, OK), Ok("POST /up"));
        // Behind it comes another one.
        check(trail(&format!("{post}GET /next HTTP/1.1\r\n\r\n"), 1, OK), Ok("GET /next"));
        // Where a body ends that does not say so, nobody knows.
        let chunked = format!("POST /c HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n9\r\n{GET}");
        check(trail(&chunked, 0, ""), Ok("POST /c"));
        check(trail(&chunked, 2, OK), Err(NotHttp::Several));
    }

    #[test]
    fn pipelined_requests_are_told_by_the_answers() {
        let three = "GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\n\r\nGET /3 HTTP/1.1\r\n\r\n";
        check(trail(three, 0, ""), Ok("GET /1"));
        check(trail(three, 1, OK), Ok("GET /2"));
        check(trail(three, 2, OK), Ok("GET /3"));
        check(trail(three, 3, OK), Ok("GET /3"));
        check(trail(three, 4, OK), Err(NotHttp::Several));
        check(trail(three, 1, "HTTP/1.1 204 No Content\r\n\r\n"), Ok("GET /2"));
        // The first answer may still be under way.
        check(trail(three, 1, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"), Err(NotHttp::Several));
        check(trail(three, 1, "HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\nhello"), Err(NotHttp::Several));
        check(trail(three, 1, "HTTP/1.1 200 OK\r\ncontent-le"), Err(NotHttp::Several));
        // The third is not whole yet, or was not kept.
        check(trail(&three[..three.len() - 12], 2, OK), Err(NotHttp::Several));
        check(Trail { read_length: 4000, ..trail(&three[..38], 2, OK) }, Err(NotHttp::Several));
    }

    proptest! {
        #[test]
        fn any_bytes_are_harmless(
            read in proptest::collection::vec(any::<u8>(), 0..300),
            answer in proptest::collection::vec(any::<u8>(), 0..100),
            answers in 0u32..5,
        ) {
            let _ = current(&Trail { read: &read, read_length: 300, answers, answer: &answer, answer_length: 7 });
        }
    }
}
