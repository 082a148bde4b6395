//! Answers scrapes over HTTP, on a thread of its own: nobody who asks slowly, or for nonsense, gets in the way of what
//! is measured.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::Registry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

use super::Exposition;

/// Connections at a time; more have to wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 16;
/// From the first byte to the last.
const MAX_TIME: Duration = Duration::from_secs(10);
const MAX_HEADER_TIME: Duration = Duration::from_secs(5);
/// Of a request.
const MAX_HEADER: usize = 16 << 10;

/// Serves until it is dropped.
pub struct Server {
    _stop: oneshot::Sender<()>,
}

impl Server {
    /// Its thread does `first` before it serves anybody, and nothing if that fails.
    pub fn start(address: SocketAddr, registry: Registry, first: fn() -> io::Result<()>) -> Result<Self> {
        let listener = match StdListener::bind(address) {
            Ok(listener) => listener,
            Err(error) => match error.kind() {
                io::ErrorKind::AddrInUse => {
                    bail!("--prometheus: {address} is taken by another program; choose another port")
                }
                io::ErrorKind::PermissionDenied => bail!("--prometheus: not permitted to listen on {address}"),
                io::ErrorKind::AddrNotAvailable => bail!("--prometheus: {address} is no address of this machine"),
                _ => return Err(error).with_context(|| format!("--prometheus: listen on {address}")),
            },
        };
        listener.set_nonblocking(true)?;
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new()
            .name("loopguard-http".to_owned())
            .spawn(move || {
                if first().is_err() {
                    return;
                }
                runtime.block_on(async {
                    tokio::select! {
                        () = accept(listener, registry) => {}
                        _ = stopped => {}
                    }
                });
            })
            .context("start the thread that serves metrics")?;
        Ok(Self { _stop: stop })
    }
}

async fn accept(listener: StdListener, registry: Registry) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, _peer)) = listener.accept().await else {
            // Out of descriptors, for one: it may pass.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let registry = registry.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let response = answer(&request, &registry);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(MAX_HEADER_TIME)
                .max_buf_size(MAX_HEADER)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer);
            // Whether the scraper got its answer is its own concern.
            let _ = tokio::time::timeout(MAX_TIME, connection).await;
            drop(place);
        });
    }
}

fn answer(request: &Request<Incoming>, registry: &Registry) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri().path() {
        "/metrics" => {
            let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
            let exposition = Exposition::negotiate(accept);
            let mut response = Response::new(Full::from(exposition.encode(&registry.gather())));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(exposition.content_type()));
            response
        }
        "/" => plain(StatusCode::OK, "loopguard: the metrics are at /metrics\n"),
        _ => plain(StatusCode::NOT_FOUND, "not here: the metrics are at /metrics\n"),
    }
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;
    use std::time::Instant;

    use super::*;

    fn start() -> (Server, SocketAddr) {
        let free = StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let registry = Registry::new();
        let counter = prometheus::IntCounter::new("loopguard_test_total", "A test.").unwrap();
        registry.register(Box::new(counter)).unwrap();
        (Server::start(free, registry, || Ok(())).unwrap(), free)
    }

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    #[test]
    fn scrapes_are_answered_in_the_form_asked_for() {
        let (_server, address) = start();
        let text = ask(address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("text/plain; version=0.0.4"), "{text}");
        assert!(text.contains("loopguard_test_total 0"), "{text}");
        let open = ask(address, "GET /metrics HTTP/1.1\r\nhost: x\r\naccept: application/openmetrics-text\r\n\r\n");
        assert!(open.contains("application/openmetrics-text; version=1.0.0") && open.ends_with("# EOF\n"), "{open}");
        assert!(ask(address, "GET /other HTTP/1.1\r\nhost: x\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics HTTP/1.1\r\nhost: x\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert!(ask(address, "nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
    }

    #[test]
    fn slow_and_hostile_scrapers_do_not_keep_others_from_their_answer() {
        let (_server, address) = start();
        // One less than there are places; each says a little, and then nothing.
        let slow: Vec<TcpStream> = (1..MAX_CONNECTIONS)
            .map(|_| {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(b"GET /metrics HTTP/1.1\r\nx-slow: ").unwrap();
                stream
            })
            .collect();
        let endless = format!("GET /metrics HTTP/1.1\r\nx-long: {}\r\n\r\n", "x".repeat(4 * MAX_HEADER));
        let refused = ask(address, &endless);
        assert!(!refused.starts_with("HTTP/1.1 200"), "{refused}");
        assert!(ask(address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").contains("loopguard_test_total 0"));
        // With all places taken one waits until the slow ones are given up.
        let one_more = TcpStream::connect(address).unwrap();
        let started = Instant::now();
        let late = ask(address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
        assert!(late.contains("loopguard_test_total 0"), "after {:?}: {late}", started.elapsed());
        drop((slow, one_more));
    }

    #[test]
    fn a_taken_port_is_one_clear_sentence() {
        let taken = StdListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let Err(error) = Server::start(address, Registry::new(), || Ok(())) else { panic!("it is taken") };
        assert_eq!(
            error.to_string(),
            format!("--prometheus: {address} is taken by another program; choose another port")
        );
    }
}
