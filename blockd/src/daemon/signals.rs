//! How the daemon is asked to stop.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT, caught from the moment this exists; or a program around the daemon that has its own way to be stopped.
pub(super) enum Signals {
    Process { terminate: Signal, interrupt: Signal },
    Embedded(tokio::sync::mpsc::Receiver<()>),
}

impl Signals {
    pub fn catch() -> io::Result<Self> {
        Ok(Self::Process { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one and names it.
    pub async fn next(&mut self) -> &'static str {
        match self {
            Self::Process { terminate, interrupt } => tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            },
            Self::Embedded(stop) => match stop.recv().await {
                Some(()) => "asked to stop",
                // Whoever could ask again is gone: what was asked for goes on.
                None => std::future::pending().await,
            },
        }
    }
}
