//! A way to a server that takes longer: every answer arrives later by a fixed time.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// A TCP relay that holds back everything the server says for a while. It delays, and does not slow down: what the server
/// says meanwhile waits as well and arrives in its turn.
pub struct DelayedPath {
    addr: SocketAddr,
}

impl DelayedPath {
    /// Listens on a loopback port and relays to `server`; answers take `delay` longer. The threads end with the process.
    pub fn start(server: SocketAddr, delay: Duration) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let addr = listener.local_addr()?;
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                thread::spawn(move || {
                    // A connection that breaks is the client's to notice.
                    let _ = relay(client, server, delay);
                });
            }
        });
        Ok(Self { addr })
    }

    /// Where to connect instead.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

fn relay(client: TcpStream, server: SocketAddr, delay: Duration) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_server) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || copy_until_end(from_client, to_server));
    let (sender, answers) = mpsc::sync_channel::<(Instant, Vec<u8>)>(1024);
    let mut to_client = client;
    thread::spawn(move || {
        for (due, bytes) in answers {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if to_client.write_all(&bytes).is_err() {
                break;
            }
        }
        // Whoever is gone already is gone.
        let _ = to_client.shutdown(Shutdown::Both);
    });
    let mut from_server = server;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let len = from_server.read(&mut buffer)?;
        if len == 0 || sender.send((Instant::now() + delay, buffer[..len].to_vec())).is_err() {
            return Ok(());
        }
    }
}

fn copy_until_end(mut from: TcpStream, mut to: TcpStream) {
    // Either side may end it at any time.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
}
