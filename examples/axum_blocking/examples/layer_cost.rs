//! Prints what the layer of `loopguard-emit` costs a hello-world server while no tracer is attached.
//!
//!     cargo build --release --package axum-blocking
//!     cargo run --release --package axum-blocking --example layer_cost
//!
//! Two servers of one thread, with and without the layer, take turns. What counts is the CPU time of the server for a
//! request, system calls included, which the load's own pace does not change.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context as _, Result, ensure};

const CONNECTIONS: u64 = 16;
/// On each of them, in a round.
const REQUESTS: u64 = 100;
const ROUNDS: usize = 150;
const HELLO: &[u8] = b"GET /hello HTTP/1.1\r\nhost: test\r\n\r\n";

struct Server {
    child: Child,
    connections: Vec<TcpStream>,
}

impl Server {
    fn start(probes: &[&str]) -> Result<Self> {
        let program = std::env::current_exe()?
            .parent()
            .and_then(|folder| folder.parent())
            .context("a target folder")?
            .join("axum-blocking");
        let mut child = Command::new("taskset")
            .args(["-c", "0"])
            .arg(program)
            .args(["--runtime", "current-thread"])
            .args(probes)
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        let port: u16 = line.trim().rsplit(':').next().context("an address")?.parse()?;
        let connect = |_| {
            let stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        Ok(Self { child, connections: (0..CONNECTIONS).map(connect).collect::<Result<_>>()? })
    }

    /// Of its only thread, in nanoseconds (proc(5): schedstat).
    fn cpu_ns(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/schedstat", self.child.id()))?;
        Ok(text.split(' ').next().context("a number")?.parse()?)
    }

    /// CPU time of the server for a request, in nanoseconds.
    fn round(&self) -> Result<f64> {
        let before = self.cpu_ns()?;
        thread::scope(|scope| {
            let clients: Vec<_> = self.connections.iter().map(|stream| scope.spawn(|| ask(stream))).collect();
            clients.into_iter().try_for_each(|client| client.join().expect("no panic"))
        })?;
        Ok((self.cpu_ns()? - before) as f64 / (CONNECTIONS * REQUESTS) as f64)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(mut stream: &TcpStream) -> Result<()> {
    let mut answer = [0; 1024];
    for _ in 0..REQUESTS {
        stream.write_all(HELLO)?;
        // So short an answer comes in one piece.
        let length = stream.read(&mut answer)?;
        ensure!(answer[..length].ends_with(b"hello"), "an answer");
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let (without, with) = (Server::start(&[])?, Server::start(&["--probes"])?);
    let (mut bare, mut layered) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let pair = (without.round()?, with.round()?);
        // The first one warms up.
        if round > 0 {
            bare.push(pair.0);
            layered.push(pair.1);
        }
    }
    let ratio = median(bare.iter().zip(&layered).map(|(bare, layered)| bare / layered).collect());
    println!("CPU time a request: {:.0} ns without, {:.0} ns with the layer", median(bare), median(layered));
    println!("throughput of a busy server with the layer, against without: {ratio:.3}");
    Ok(())
}
