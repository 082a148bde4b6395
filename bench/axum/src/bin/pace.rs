//! A load at a fixed rate: keep-alive connections that take turns at `GET /hello`.
//!
//! usage: bench-axum-pace PORT CONNECTIONS REQUESTS_PER_SECOND SECONDS
//! Prints one JSON object.

use std::{
    io::{self, Read as _, Write as _},
    net::TcpStream,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

const REQUEST: &[u8] = b"GET /hello HTTP/1.1\r\nhost: test\r\n\r\n";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| -> Result<u32> {
        arguments.get(at).and_then(|text| text.parse().ok()).with_context(|| format!("argument {at} is no number"))
    };
    let (port, connections, rate, seconds) = (number(1)? as u16, number(2)?, number(3)?, number(4)?);
    ensure!(connections > 0 && rate > 0, "no connections or no requests");
    let (answered, late) = (AtomicU64::new(0), AtomicU64::new(0));
    let every = Duration::from_secs(1) * connections / rate;
    let start = Instant::now() + Duration::from_millis(50);
    let end = start + Duration::from_secs(seconds.into());
    let send_in_turn = |at: u32| -> io::Result<()> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut due = start + every * at / connections;
        let mut answer = [0; 1024];
        while due < end {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if due.elapsed() > every {
                late.fetch_add(1, Ordering::Relaxed);
            }
            stream.write_all(REQUEST)?;
            if stream.read(&mut answer)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            answered.fetch_add(1, Ordering::Relaxed);
            due += every;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let send_in_turn = &send_in_turn;
        let clients: Vec<_> = (0..connections).map(|at| scope.spawn(move || send_in_turn(at))).collect();
        clients
            .into_iter()
            .try_for_each(|client| client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    println!("{}", json!({"answered": answered.into_inner(), "late": late.into_inner()}));
    Ok(())
}
