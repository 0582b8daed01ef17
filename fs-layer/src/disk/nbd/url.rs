//! Where an NBD server is, as people write it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// An export of an NBD server: `nbd://HOST[:PORT]/NAME` or `nbd+unix:///NAME?socket=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdUrl {
    /// Over TCP.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
        /// Name of the export; empty is the server's default.
        export: String,
    },
    /// Over a Unix socket.
    Unix {
        /// The socket.
        socket: PathBuf,
        /// Name of the export.
        export: String,
    },
}

/// Not the place of an NBD server.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not an NBD server; write nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH")]
pub struct BadUrl(String);

impl NbdUrl {
    /// The port of a server that names none.
    pub const PORT: u16 = 10_809;

    /// Whether the server may lose power and we not.
    pub fn is_remote(&self) -> bool {
        match self {
            NbdUrl::Tcp { host, .. } => !matches!(host.as_str(), "localhost" | "127.0.0.1" | "::1"),
            NbdUrl::Unix { .. } => false,
        }
    }

    /// Another export of the same server.
    pub fn with_export(&self, export: &str) -> NbdUrl {
        let export = export.to_owned();
        match self {
            NbdUrl::Tcp { host, port, .. } => NbdUrl::Tcp { host: host.clone(), port: *port, export },
            NbdUrl::Unix { socket, .. } => NbdUrl::Unix { socket: socket.clone(), export },
        }
    }

    /// The name of the export.
    pub fn export(&self) -> &str {
        match self {
            NbdUrl::Tcp { export, .. } | NbdUrl::Unix { export, .. } => export,
        }
    }
}

impl FromStr for NbdUrl {
    type Err = BadUrl;

    fn from_str(text: &str) -> Result<NbdUrl, BadUrl> {
        let bad = || BadUrl(text.to_owned());
        if let Some(rest) = text.strip_prefix("nbd+unix://") {
            let (export, query) = rest.split_once('?').ok_or_else(bad)?;
            let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket=")).ok_or_else(bad)?;
            let export = export.strip_prefix('/').unwrap_or(export);
            if socket.is_empty() {
                return Err(bad());
            }
            return Ok(NbdUrl::Unix { socket: unescape(socket).into(), export: unescape(export) });
        }
        let rest = text.strip_prefix("nbd://").ok_or_else(bad)?;
        let (place, export) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match place.rsplit_once(':') {
            // Colons inside brackets belong to an address.
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| bad())?),
            _ => (place, NbdUrl::PORT),
        };
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(bad());
        }
        Ok(NbdUrl::Tcp { host: host.to_owned(), port, export: unescape(export) })
    }
}

impl fmt::Display for NbdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdUrl::Tcp { host, port, export } if host.contains(':') => write!(f, "nbd://[{host}]:{port}/{export}"),
            NbdUrl::Tcp { host, port, export } => write!(f, "nbd://{host}:{port}/{export}"),
            NbdUrl::Unix { socket, export } => write!(f, "nbd+unix:///{export}?socket={}", socket.display()),
        }
    }
}

/// Percent signs and two digits are a byte.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let byte = (first == b'%')
            .then(|| after.get(..2))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.unwrap_or(first));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_people_write_them() {
        let tcp = |host: &str, port, export: &str| NbdUrl::Tcp { host: host.into(), port, export: export.into() };
        for (text, url) in [
            ("nbd://a:1/b", tcp("a", 1, "b")),
            ("nbd://a/b", tcp("a", 10_809, "b")),
            ("nbd://10.0.0.5", tcp("10.0.0.5", 10_809, "")),
            ("nbd://[fe80::1]:7/x", tcp("fe80::1", 7, "x")),
            ("nbd://[fe80::1]/x%20y", tcp("fe80::1", 10_809, "x y")),
            ("nbd+unix:///v?socket=/run/n.sock", NbdUrl::Unix { socket: "/run/n.sock".into(), export: "v".into() }),
            ("nbd+unix://?socket=/n", NbdUrl::Unix { socket: "/n".into(), export: String::new() }),
        ] {
            assert_eq!(text.parse(), Ok(url.clone()), "{text}");
            assert_eq!(url.to_string().parse(), Ok(url));
        }
        for text in ["", "a:1", "http://a/b", "nbd://", "nbd://a:b/c", "nbd+unix:///v", "nbd+unix:///v?socket="] {
            assert!(text.parse::<NbdUrl>().is_err(), "{text}");
        }
    }
}
