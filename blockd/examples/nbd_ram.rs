//! Serves memory over NBD: the ceiling of protocol and reactor, for measurements beside other servers.
//!
//! `nbd_ram ADDRESS|SOCKET SIZE_MIB [LOG_FILE [ring|thread]]`. With a log file, flushes are durable on it; the file is
//! overwritten. Ends on SIGTERM or SIGINT.

use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use anyhow::Context;
use blockd::export::nbd::server::{Export, Exports, Listen, Server};
use blockd::reactor::{LogShape, RamDevice, ReactorHandle, ReactorOptions};
use tokio::signal::unix::{SignalKind, signal};

struct One(Export);

impl Exports for One {
    fn list(&self) -> Vec<String> {
        vec![self.0.name.clone()]
    }

    fn find(&self, name: &str) -> Option<Export> {
        (name == self.0.name).then(|| self.0.clone())
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [listen, size, options @ ..] = &args[..] else {
        anyhow::bail!("usage: nbd_ram ADDRESS|SOCKET SIZE_MIB [LOG_FILE [ring|thread]]");
    };
    let listen = match listen.parse() {
        Ok(address) => Listen::Tcp(address),
        Err(_) => Listen::Unix(listen.into()),
    };
    let size: usize = size.parse::<usize>().context("SIZE_MIB")? << 20;
    let mut device = RamDevice::new(size);
    if let Some(path) = options.first() {
        // Written before, so that no flush has to commit block allocations.
        std::fs::write(path, vec![0; 72 << 20]).with_context(|| format!("writing the log file {path}"))?;
        let log = std::fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .with_context(|| format!("opening the log file {path} for direct I/O"))?;
        log.sync_all()?;
        device = device.with_log(log.into());
    }
    let log_shape = match options.get(1).map(String::as_str) {
        None | Some("ring") => LogShape::Ring,
        Some("thread") => LogShape::Thread,
        Some(other) => anyhow::bail!("unknown log shape {other:?}; ring and thread are known"),
    };
    let reactor = ReactorHandle::spawn(ReactorOptions { log_shape }, tokio::runtime::Handle::current())?;
    let key = reactor.add_device(Box::new(device)).await?;
    let export = Export {
        name: "ram".into(),
        description: "memory".into(),
        size: size as u64,
        read_only: false,
        reactor: reactor.clone(),
        key,
    };
    let server = Server::start(&[listen], Arc::new(One(export))).await?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    drop(server);
    reactor.close_device(key).await;
    reactor.stop().await;
    Ok(())
}
