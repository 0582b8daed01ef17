//! One connection to a server, and what must be true of it.

use std::io;
use std::time::Duration;

use blockd::export::nbd::client::{Listed, NbdClient, Options};
use blockd::export::nbd::proto::transmission;

use super::NbdUrl;
use crate::disk::BLOCK_BYTES;

/// How long a server elsewhere may say nothing before the connection counts as lost. One that waits for a slow
/// bucket is asked again then, which does no harm.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The same while it lists its exports, for which it needs no bucket.
const LIST_SILENCE_MAX: Duration = Duration::from_secs(10);

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// It cannot be reached, or has no such export.
    #[error("cannot connect to {url}: {source}")]
    Connect {
        /// The server.
        url: NbdUrl,
        /// The cause.
        source: io::Error,
    },
    /// It is not fit for a filesystem.
    #[error("{url} is no disk for a filesystem: {why}")]
    Unfit {
        /// The server.
        url: NbdUrl,
        /// What it lacks.
        why: String,
    },
}

impl NbdError {
    /// As the error of a call.
    pub(super) fn into_io(self) -> io::Error {
        let kind = match &self {
            NbdError::Connect { source, .. } => source.kind(),
            NbdError::Unfit { .. } => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, self)
    }

    /// Whether waiting does not help.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, NbdError::Unfit { .. })
    }
}

/// What a server says of an export.
pub(super) struct Facts {
    /// Bytes.
    pub size: u64,
    /// Whether a flush on one connection covers what others wrote.
    pub shares_flushes: bool,
    /// Whether it can discard.
    pub trims: bool,
    /// Bytes of one read or write.
    pub request_bytes_max: u32,
}

/// A server.
pub(super) struct Server {
    url: NbdUrl,
    read_only: bool,
    /// What it said of the export at first.
    description: String,
}

impl Server {
    pub(super) fn new(url: NbdUrl, read_only: bool) -> Server {
        Server { url, read_only, description: String::new() }
    }

    /// Remembers what the export is.
    pub(super) fn know(&mut self, client: &NbdClient) {
        client.description().clone_into(&mut self.description);
    }

    pub(super) fn url(&self) -> &NbdUrl {
        &self.url
    }

    pub(super) fn description(&self) -> &str {
        &self.description
    }

    pub(super) fn connect(&self) -> Result<NbdClient, NbdError> {
        let timeout = self.url.is_remote().then_some(SILENCE_MAX);
        let options = Options { structured: true, block_status: false, timeout };
        match &self.url {
            NbdUrl::Tcp { host, port, export } => NbdClient::connect_tcp_with((host.as_str(), *port), export, options),
            NbdUrl::Unix { socket, export } => NbdClient::connect_unix_with(socket, export, options),
        }
        .map_err(|source| NbdError::Connect { url: self.url.clone(), source })
    }

    pub(super) fn check(&self, client: &NbdClient) -> Result<Facts, NbdError> {
        let unfit = |why: &str| NbdError::Unfit { url: self.url.clone(), why: why.to_owned() };
        let has = |flag| client.flags() & flag != 0;
        let (smallest, _, largest) = client.block_sizes();
        if has(transmission::READ_ONLY) && !self.read_only {
            return Err(unfit("it is read-only"));
        }
        if !has(transmission::SEND_FLUSH) && !self.read_only {
            return Err(unfit("the server has no flush, so nothing on it could be made durable"));
        }
        if smallest > BLOCK_BYTES as u32 {
            return Err(unfit("the server takes only requests larger than 4 KiB"));
        }
        Ok(Facts {
            size: client.size(),
            shares_flushes: has(transmission::CAN_MULTI_CONN),
            trims: has(transmission::SEND_TRIM),
            request_bytes_max: largest & !(BLOCK_BYTES as u32 - 1),
        })
    }

    /// Whether a server that was away is still the same disk, as far as can be seen.
    pub(super) fn check_again(&self, client: &NbdClient, size_min: u64) -> Result<(), NbdError> {
        let facts = self.check(client)?;
        if facts.size < size_min {
            let why = format!("it came back with {} bytes where it had {size_min}", facts.size);
            return Err(NbdError::Unfit { url: self.url.clone(), why });
        }
        // Where nothing changes, all that was read is kept: it must not be mixed with another export that was given the name. That of a disk
        // that changes says its settings as well, which may be others by now.
        if self.read_only && client.description() != self.description {
            let why = format!("it came back as {:?} where it was {:?}", client.description(), self.description);
            return Err(NbdError::Unfit { url: self.url.clone(), why });
        }
        Ok(())
    }
}

/// The exports of a server, as it lists them: names, and what it says of each.
///
/// # Errors
/// If it cannot be reached, or lists none.
pub fn exports(url: &NbdUrl) -> Result<Vec<Listed>, NbdError> {
    match url {
        NbdUrl::Tcp { host, port, .. } => {
            NbdClient::list_tcp((host.as_str(), *port), url.is_remote().then_some(LIST_SILENCE_MAX))
        }
        NbdUrl::Unix { socket, .. } => NbdClient::list_unix(socket, None),
    }
    .map_err(|source| NbdError::Connect { url: url.clone(), source })
}
