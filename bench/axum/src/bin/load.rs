//! A bounded load with a seed: keep-alive connections that send one request after the other and think in between.
//!
//! usage: bench-axum-load PORT CONNECTIONS SECONDS SEED [PERCENT_BLOCKING]
//! Prints one JSON object.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::json;

const BLOCKING: [&str; 9] = ["sleep", "spin", "mutex", "file", "upload", "socket", "dns", "between", "spawned"];
const HARMLESS: [&str; 5] = ["/hello", "/hello", "/ok/sleep/20", "/ok/pool/30", "/ok/in-place/30"];
const BLOCKS_MS: [u64; 5] = [13, 15, 20, 35, 60];
const THINK_MS: u64 = 120;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| -> Result<u64> {
        arguments.get(at).and_then(|text| text.parse().ok()).with_context(|| format!("argument {at} is no number"))
    };
    let (port, connections, seconds, seed) = (number(1)? as u16, number(2)?, number(3)?, number(4)?);
    let percent = number(5).unwrap_or(12);
    let (answered, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    let end = Instant::now() + Duration::from_secs(seconds);
    thread::scope(|scope| {
        for client in 0..connections {
            let (answered, failed) = (&answered, &failed);
            scope.spawn(move || {
                let mut chance = Chance(seed << 32 | (client + 1));
                let mut connection = None;
                for count in 0.. {
                    thread::sleep(Duration::from_millis(chance.below(2 * THINK_MS)));
                    if Instant::now() >= end {
                        return;
                    }
                    let request = order(&mut chance, percent, &format!("c{client:02}-{count:04}"));
                    match exchange(&mut connection, port, &request) {
                        Ok(()) => answered.fetch_add(1, Ordering::Relaxed),
                        Err(_) => {
                            connection = None;
                            failed.fetch_add(1, Ordering::Relaxed)
                        }
                    };
                }
            });
        }
    });
    println!("{}", json!({"answered": answered.into_inner(), "failed": failed.into_inner()}));
    Ok(())
}

fn order(chance: &mut Chance, percent: u64, id: &str) -> String {
    let head = format!("host: test\r\nx-request-id: {id}\r\n");
    if chance.below(100) >= percent {
        let path = HARMLESS[chance.below(HARMLESS.len() as u64) as usize];
        return format!("GET {path} HTTP/1.1\r\n{head}\r\n");
    }
    let kind = BLOCKING[chance.below(BLOCKING.len() as u64) as usize];
    let ms = BLOCKS_MS[chance.below(BLOCKS_MS.len() as u64) as usize];
    if kind == "upload" {
        // What looks like a request, but is the body of one.
        let body = "GET /innocent HTTP/1.1\r\nx-request-id: innocent\r\n\r\n".repeat(40);
        return format!("POST /block/file/{ms} HTTP/1.1\r\n{head}content-length: {}\r\n\r\n{body}", body.len());
    }
    format!("GET /block/{kind}/{ms} HTTP/1.1\r\n{head}\r\n")
}

fn exchange(connection: &mut Option<BufReader<TcpStream>>, port: u16, request: &str) -> io::Result<()> {
    if connection.is_none() {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        *connection = Some(BufReader::new(stream));
    }
    let Some(stream) = connection else { return Err(io::ErrorKind::NotConnected.into()) };
    // Now and then in two pieces, as networks deliver it.
    let first_length = if request.len().is_multiple_of(3) { 30 } else { request.len() };
    let (first, second) = request.as_bytes().split_at(first_length);
    stream.get_mut().write_all(first)?;
    if !second.is_empty() {
        thread::sleep(Duration::from_millis(2));
        stream.get_mut().write_all(second)?;
    }
    let mut line = String::new();
    stream.read_line(&mut line)?;
    if !line.starts_with("HTTP/1.1 200") {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut length = 0;
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)
}

/// SplitMix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}
