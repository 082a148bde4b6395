//! loopguard on a FastAPI server with the middleware of the Python package: a record for every request of every kind,
//! and every block with the request whose step it was.

mod support;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use support::{Events, PATIENCE, Watching, alone, can_trace, free_port, line_of, pythons, request, wait_until_up};

/// Long enough that nothing a healthy server does comes near it, on any machine.
const BLOCK_MS: u32 = 300;
const THRESHOLD: &str = "150ms";

struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(python: &Path, event_loop: &str) -> Self {
        let port = free_port();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fastapi_emit");
        let child = Command::new(python)
            .args(["-m", "uvicorn", "app:app", "--log-level=critical", "--app-dir"])
            .arg(folder)
            .args([format!("--port={port}"), format!("--loop={event_loop}")])
            // Every answer is the application's own.
            .env("ENFORCEMENT", "log")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Self { child, port };
        wait_until_up(&mut server.child, port);
        // Imports that the first requests bring are no blocks of theirs.
        for path in ["/items/1", "/reports/1?ms=0", "/totals/1?ms=0", "/events", "/broken", "/health"] {
            server.get(path, "warm-up");
        }
        server.chat("warm-up");
        server
    }

    fn get(&self, path: &str, id: &str) -> String {
        request(
            self.port,
            &format!("GET {path} HTTP/1.1\r\nhost: test\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n"),
        )
    }

    /// A websocket, to its end.
    fn chat(&self, id: &str) -> Vec<u8> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let upgrade = format!(
            "GET /chat/blue HTTP/1.1\r\nhost: test\r\nx-request-id: {id}\r\nconnection: upgrade\r\n\
             upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        stream.write_all(upgrade.as_bytes()).unwrap();
        let (mut answer, mut part) = (Vec::new(), [0; 1024]);
        while let Ok(length @ 1..) = stream.read(&mut part) {
            answer.extend_from_slice(&part[..length]);
            // The server's close frame: the client answers with its own, masked and empty.
            if answer.windows(4).any(|frame| frame[..2] == [0x88, 2]) {
                let _ = stream.write_all(&[0x88, 0x80, 0, 0, 0, 0]);
            }
        }
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn records<'a>(events: &'a Events, id: &'a str) -> Vec<&'a Value> {
    events.of_type("request").filter(|record| record["id"] == id).collect()
}

/// The only record of a request.
fn record<'a>(events: &'a Events, id: &'a str) -> &'a Value {
    let found = records(events, id);
    assert_eq!(found.len(), 1, "{id}: {found:?}");
    found[0]
}

#[test]
fn every_kind_of_request_has_one_record() {
    let _alone = alone();
    if !can_trace() {
        return;
    }
    let Some(python) = pythons().pop() else { return };
    for event_loop in ["uvloop", "asyncio"] {
        let server = Server::start(&python, event_loop);
        let watching = Watching::start(server.child.id(), &["--threshold", THRESHOLD]);
        server.get("/items/7", "plain");
        server.get(&format!("/reports/7?ms={BLOCK_MS}"), "blocks");
        server.get(&format!("/totals/7?ms={BLOCK_MS}"), "child-blocks");
        server.get("/broken", "raises");
        server.get("/patience", "cancelled");
        server.get("/events", "stream");
        let chat = server.chat("websocket");
        server.get("/health", "excluded");
        server.get("/items/8", "last");
        let events = watching.stop();

        assert!(String::from_utf8_lossy(&chat).contains("blue"), "the websocket said nothing");
        let expected = [
            ("plain", "GET", "/items/7", "/items/{item}", 200),
            ("blocks", "GET", "/reports/7", "/reports/{day}", 200),
            ("child-blocks", "GET", "/totals/7", "/totals/{day}", 200),
            ("raises", "GET", "/broken", "/broken", 500),
            ("cancelled", "GET", "/patience", "/patience", 0),
            ("stream", "GET", "/events", "/events", 200),
            ("websocket", "WEBSOCKET", "/chat/blue", "/chat/{room}", 101),
            ("last", "GET", "/items/8", "/items/{item}", 200),
        ];
        for (id, method, path, route, status) in expected {
            let record = record(&events, id);
            assert_eq!(record["method"], method, "{record}");
            assert_eq!(record["path"], path, "{record}");
            assert_eq!(record["route"], route, "{record}");
            // Nothing was answered: there is no status.
            assert_eq!(record["status"].as_u64().unwrap_or(0), status, "{record}");
            assert!(record["steps"].as_u64().unwrap() >= 1, "{record}");
        }
        // The lifespan, which lasts all the time, is none.
        assert_eq!(events.of_type("request").count(), expected.len(), "{:?}", events.lines);
        for (id, function) in [("blocks", "report"), ("child-blocks", "totals.<locals>.add_up")] {
            let blocks: Vec<_> = events.blocks_of(id).collect();
            assert_eq!(blocks.len(), 1, "{id} on {event_loop}: {:?}", events.lines);
            assert_eq!((&blocks[0]["how"], &blocks[0]["attribution"]), (&"usdt".into(), &"exact".into()), "{blocks:?}");
            assert_eq!(line_of(blocks[0], function), Some(line_marked(function)), "{blocks:?}");
            assert!(record(&events, id)["blocked_ms"].as_f64().unwrap() >= f64::from(BLOCK_MS), "{id}");
        }
        events.assert_parts_add_up();
    }
}

/// The line of the application that has `# line: FUNCTION`, without the functions around it.
fn line_marked(function: &str) -> u64 {
    let function = function.rsplit('.').next().unwrap_or(function);
    let app = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fastapi_emit/app.py");
    let text = fs::read_to_string(app).unwrap();
    let mark = format!("# line: {function}");
    text.lines().position(|line| line.ends_with(&mark)).expect("the line is marked") as u64 + 1
}
