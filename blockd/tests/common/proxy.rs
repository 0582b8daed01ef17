//! A proxy before an HTTP server that delays, drops, stalls and refuses, as the test says.
//!
//! It reads one whole request per connection, decides, and passes it on over a connection of its own.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The connection is closed; the server never sees the request.
    DropRequest,
    /// The server answers, the client sees the connection close instead.
    LoseResponse,
    /// Half of the answer arrives.
    CutResponse,
    /// The proxy answers 503 SlowDown itself.
    SlowDown,
    /// The server never sees the request and answers 500.
    ServerError,
    /// The server answers, and the client sees 500 instead.
    HideBehind500,
    /// The request is spoilt so that its signature no longer fits.
    BreakSignature,
}

/// Whether anything gets through at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    None,
    /// Connections are closed at once.
    Closing,
    /// Connections are taken and never answered.
    Hanging,
}

/// Troubles a store must live with every day, for [`Proxy::sprinkle`].
const EVERYDAY: [Trouble; 6] = [
    Trouble::DropRequest,
    Trouble::LoseResponse,
    Trouble::CutResponse,
    Trouble::SlowDown,
    Trouble::ServerError,
    Trouble::HideBehind500,
];

/// Requests that get into trouble by chance.
struct Sprinkle {
    rng: SmallRng,
    chance: f64,
}

struct Plan {
    upstream: SocketAddr,
    script: VecDeque<(&'static str, &'static str, Trouble)>,
    sprinkle: Option<Sprinkle>,
    outage: Outage,
    delay: Duration,
    /// Request lines seen, with what became of each.
    seen: Vec<(String, Option<Trouble>)>,
}

/// The proxy; ends when dropped.
pub struct Proxy {
    address: SocketAddr,
    plan: Arc<Mutex<Plan>>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts before the server at `upstream`.
    pub async fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let plan = Arc::new(Mutex::new(Plan {
            upstream,
            script: VecDeque::new(),
            sprinkle: None,
            outage: Outage::None,
            delay: Duration::ZERO,
            seen: Vec::new(),
        }));
        let task = tokio::spawn(accept(listener, plan.clone()));
        Self { address, plan, task }
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Gives the next request with this method this trouble.
    pub fn next(&self, method: &'static str, trouble: Trouble) {
        self.next_of(method, "", trouble);
    }

    /// Gives the next request with this method and this text in its path this trouble.
    pub fn next_of(&self, method: &'static str, part: &'static str, trouble: Trouble) {
        let mut plan = self.plan.lock().unwrap();
        plan.script.push_back((method, part, trouble));
    }

    /// From now on gives requests that no [`Proxy::next`] is waiting for one of [`EVERYDAY`] with this chance. Which
    /// trouble comes when is decided by `seed`; which request it meets also by their order.
    pub fn sprinkle(&self, seed: u64, chance: f64) {
        self.plan.lock().unwrap().sprinkle = Some(Sprinkle { rng: SmallRng::seed_from_u64(seed), chance });
    }

    /// Requests that began with `start` and got into some trouble since the last call of [`Proxy::forget`].
    pub fn troubled(&self, start: &str) -> usize {
        let plan = self.plan.lock().unwrap();
        plan.seen.iter().filter(|(line, trouble)| line.starts_with(start) && trouble.is_some()).count()
    }

    pub fn set_outage(&self, outage: Outage) {
        self.plan.lock().unwrap().outage = outage;
    }

    /// Holds every request back this long.
    pub fn set_delay(&self, delay: Duration) {
        self.plan.lock().unwrap().delay = delay;
    }

    /// Requests that started with `start` since the last call of [`Proxy::forget`].
    pub fn count(&self, start: &str) -> usize {
        self.plan.lock().unwrap().seen.iter().filter(|(line, _)| line.starts_with(start)).count()
    }

    /// Forgets the requests seen. Panics if a trouble was ordered that no request has met.
    pub fn forget(&self) {
        let mut plan = self.plan.lock().unwrap();
        assert!(plan.script.is_empty(), "no request met {:?}; seen: {:?}", plan.script, plan.seen);
        plan.seen.clear();
    }
}

impl Sprinkle {
    fn next(&mut self) -> Option<Trouble> {
        self.rng.random_bool(self.chance).then(|| EVERYDAY[self.rng.random_range(0..EVERYDAY.len())])
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, plan: Arc<Mutex<Plan>>) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let plan = plan.clone();
        // A connection that breaks is what this is for.
        connections.spawn(async move { serve(client, &plan).await.ok() });
    }
}

async fn serve(mut client: TcpStream, plan: &Mutex<Plan>) -> io::Result<()> {
    let outage = plan.lock().unwrap().outage;
    match outage {
        Outage::None => {}
        Outage::Closing => return Ok(()),
        Outage::Hanging => std::future::pending().await,
    }
    client.set_nodelay(true)?;
    let mut request = read_request(&mut client).await?;
    let (trouble, delay, upstream) = {
        let mut plan = plan.lock().unwrap();
        let line = &request.line;
        let at = plan.script.iter().position(|(m, part, _)| line.starts_with(m) && line.contains(part));
        let trouble = at.and_then(|at| plan.script.remove(at)).map(|(_, _, trouble)| trouble);
        let trouble = trouble.or_else(|| plan.sprinkle.as_mut().and_then(Sprinkle::next));
        plan.seen.push((request.line.clone(), trouble));
        (trouble, plan.delay, plan.upstream)
    };
    tokio::time::sleep(delay).await;
    match trouble {
        Some(Trouble::DropRequest) => return Ok(()),
        Some(Trouble::SlowDown) => return answer(&mut client, "503 Slow Down", "SlowDown").await,
        Some(Trouble::ServerError) => {
            return answer(&mut client, "500 Oh No", "InternalError").await;
        }
        Some(Trouble::BreakSignature) => request.head = request.head.replace("Signature=", "Signature=0"),
        _ => {}
    }
    let mut server = TcpStream::connect(upstream).await?;
    server.set_nodelay(true)?;
    server.write_all(request.head.as_bytes()).await?;
    server.write_all(&request.body).await?;
    let mut response = Vec::new();
    server.read_to_end(&mut response).await?;
    match trouble {
        Some(Trouble::LoseResponse) => Ok(()),
        Some(Trouble::HideBehind500) => answer(&mut client, "500 Oh No", "InternalError").await,
        Some(Trouble::CutResponse) => client.write_all(&response[..response.len() / 2]).await,
        _ => client.write_all(&response).await,
    }
}

async fn answer(client: &mut TcpStream, status: &str, code: &str) -> io::Result<()> {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>");
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    client.write_all((head + &body).as_bytes()).await
}

/// A request as it goes on to the server.
pub struct Request {
    /// Method, path and protocol.
    pub line: String,
    /// Everything before the body, with the connection to be closed after the answer.
    pub head: String,
    pub body: Vec<u8>,
}

/// Reads one whole request with a `Content-Length`, or without body.
pub async fn read_request(client: &mut TcpStream) -> io::Result<Request> {
    let mut bytes = Vec::new();
    let end = loop {
        if client.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
    };
    let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let header = |name: &str| {
        text.lines().find_map(|line| {
            let (n, value) = line.split_once(':')?;
            n.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    if header("expect").is_some() {
        client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    let len: usize = header("content-length").map_or(0, |v| v.parse().unwrap());
    let mut body = bytes.split_off(end);
    let have = body.len();
    body.resize(len, 0);
    client.read_exact(&mut body[have.min(len)..]).await?;
    let kept = text.trim_end().lines().filter(|line| {
        let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
        name != "expect" && name != "connection"
    });
    let head = kept.map(|line| format!("{line}\r\n")).collect::<String>() + "Connection: close\r\n\r\n";
    Ok(Request { line: text.lines().next().unwrap_or_default().to_owned(), head, body })
}

/// A server that says yes to everything and keeps nothing: the worst store there is. Ends with the process.
pub async fn start_yes_man() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                read_request(&mut client).await.ok();
                let yes = "HTTP/1.1 200 OK\r\nETag: \"yes\"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
                client.write_all(yes.as_bytes()).await.ok();
            });
        }
    });
    url
}
