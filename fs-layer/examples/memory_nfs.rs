//! A tree in memory, served over NFS: `memory_nfs LISTEN STATE-DIRECTORY [LEASE-SECONDS]`. SIGTERM or a line `restart` on standard input ends the
//! server and starts another one over the same tree, as a restart looks to clients. It says `ready ADDRESS` when it serves, and ends with its
//! standard input.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use fs_layer::export::nfs4::state::Let;
use fs_layer::export::nfs4::{DirectoryRecords, NfsOptions, Server};
use fs_layer::vfs::memory::MemoryVfs;
use fs_layer::vfs::{Credentials, ROOT, SetAttributes, Vfs};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let mut arguments = std::env::args().skip(1);
    let listen = arguments.next().context("the first argument is where to listen, as 127.0.0.1:0")?;
    let state = arguments.next().context("the second argument is a directory for records of clients")?;
    let lease: u64 =
        arguments.next().map_or(Ok(90), |text| text.parse()).context("the third argument is the lease in seconds")?;

    let vfs = Arc::new(MemoryVfs::default());
    let open_root = SetAttributes { mode: Some(0o1777), ..SetAttributes::default() };
    vfs.setattr(&Credentials::system(), ROOT, &open_root, false)?;
    let records = Arc::new(DirectoryRecords::open(state.as_ref())?);
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut listen = listen;
    // Of the server before, for the clients of the one that runs.
    let mut held = Let::default();
    loop {
        let listener = TcpListener::bind(&listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        let mut options = NfsOptions::new(records.clone());
        options.lease = Duration::from_secs(lease);
        options.grace = Duration::from_secs(lease);
        options.export.root_squash = false;
        let server = Server::start(listener, vfs.clone(), options).await?;
        listen = server.address().to_string();
        println!("ready {listen}");
        let line = lines.next_line().await?;
        let before = std::mem::replace(&mut held, server.stop().await);
        before.go(&*vfs);
        if line.is_none() {
            return Ok(());
        }
    }
}
