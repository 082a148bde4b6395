//! A server on tokio 0.2 that blocks its loop for as many milliseconds as a connection's first byte says, times ten.

use std::{net::Ipv4Addr, thread, time::Duration};

use tokio::{io::AsyncReadExt as _, io::AsyncWriteExt as _, net::TcpListener, runtime::Builder};

fn main() {
    let port: u16 = std::env::args().nth(1).and_then(|text| text.parse().ok()).expect("the port");
    let mut runtime = Builder::new().basic_scheduler().enable_all().build().expect("a runtime");
    runtime.block_on(async move {
        let mut listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.expect("listen");
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { continue };
            tokio::spawn(async move {
                if let Ok(tens) = stream.read_u8().await {
                    thread::sleep(Duration::from_millis(u64::from(tens) * 10));
                    let _ = stream.write_all(b"done").await;
                }
            });
        }
    });
}
