//! The negotiation phase: fixed newstyle, from the greeting to the first request.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::proto::{
    self, BASE_ALLOCATION, EXPORT_NAME_PADDING, ExportInfo, Greeting, InfoBlockSize, InfoExport, InfoQuery,
    MAX_PAYLOAD, MetaQuery, OptionHeader, OptionReply, ProtoError, handshake, info, option, option_reply, transmission,
};
use super::server::{Export, Exports};
use super::session::SessionParams;
use crate::types::BLOCK_SIZE;

/// How long each message may take. Bounds what half-open connections cost.
const MESSAGE_TIMEOUT: Duration = if cfg!(test) { Duration::from_millis(500) } else { Duration::from_secs(10) };
/// Option data beyond this many bytes is skipped and the option refused.
const MAX_OPTION_DATA: u32 = 64 << 10;
/// Option data beyond this many bytes is not even skipped.
const MAX_SKIPPED_DATA: u32 = 16 << 20;
/// Options after which a client that never comes to an end is dropped.
const MAX_OPTIONS: usize = 1000;
/// The id of `base:allocation`.
const BASE_ALLOCATION_ID: u32 = 1;

/// Why a negotiation failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke.
    #[error("connection lost during negotiation: {0}")]
    Io(#[from] io::Error),
    /// The client does not speak fixed newstyle NBD.
    #[error("the client does not speak fixed newstyle NBD: {0}")]
    Proto(#[from] ProtoError),
    /// The client was silent for too long.
    #[error("no message from the client within {} s", MESSAGE_TIMEOUT.as_secs())]
    Timeout,
    /// The client asked, by EXPORT_NAME, for something that is not there.
    #[error("no export is named {0:?}")]
    UnknownExport(String),
    /// The client negotiates without end.
    #[error("more than {MAX_OPTIONS} options")]
    TooManyOptions,
}

/// Negotiates. `None` means that the client took its leave.
///
/// # Errors
/// The connection is of no more use.
pub async fn negotiate<S>(
    stream: &mut S,
    exports: &dyn Exports,
    peer: &str,
) -> Result<Option<(Export, SessionParams)>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut negotiation = Negotiation { stream, exports, peer, no_zeroes: false, structured: false, context_of: None };
    negotiation.greet().await?;
    for _ in 0..MAX_OPTIONS {
        match negotiation.option().await? {
            Next::Option => {}
            Next::Transmission(export) => return Ok(Some(negotiation.settle(*export))),
            Next::Goodbye => return Ok(None),
        }
    }
    Err(HandshakeError::TooManyOptions)
}

/// What follows an option.
enum Next {
    Option,
    Transmission(Box<Export>),
    Goodbye,
}

struct Negotiation<'a, S> {
    stream: &'a mut S,
    exports: &'a dyn Exports,
    peer: &'a str,
    no_zeroes: bool,
    structured: bool,
    /// The canonical name of the export for which `base:allocation` was chosen.
    context_of: Option<String>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Negotiation<'_, S> {
    async fn greet(&mut self) -> Result<(), HandshakeError> {
        let greeting = Greeting::new(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.send(greeting.as_bytes()).await?;
        let flags: zerocopy::byteorder::big_endian::U32 = self.receive().await?;
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags.get() & !known != 0 {
            return Err(ProtoError::Malformed("client flags").into());
        }
        self.no_zeroes = flags.get() & u32::from(handshake::NO_ZEROES) != 0;
        Ok(())
    }

    /// Reads one option and answers it.
    async fn option(&mut self) -> Result<Next, HandshakeError> {
        let header: OptionHeader = self.receive().await?;
        header.check()?;
        let (number, len) = (header.option.get(), header.len.get());
        if len > MAX_OPTION_DATA {
            self.skip(len).await?;
            if number == option::EXPORT_NAME {
                return Err(ProtoError::Malformed("export name").into());
            }
            self.refuse(number, option_reply::ERR_TOO_BIG, "option data too long").await?;
            return Ok(Next::Option);
        }
        let mut data = vec![0; len as usize];
        self.receive_into(&mut data).await?;
        match number {
            option::EXPORT_NAME => return self.export_name(&data).await,
            option::ABORT => {
                // The client may be gone already.
                let _ = self.reply(number, option_reply::ACK, &[]).await;
                return Ok(Next::Goodbye);
            }
            option::INFO | option::GO => return self.info(number, &data).await,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(number, &data).await?,
            option::LIST | option::STRUCTURED_REPLY if !data.is_empty() => {
                self.refuse(number, option_reply::ERR_INVALID, "this option carries no data").await?;
            }
            option::LIST => self.list().await?,
            option::STRUCTURED_REPLY => {
                self.structured = true;
                self.reply(number, option_reply::ACK, &[]).await?;
            }
            option::STARTTLS => {
                self.refuse(number, option_reply::ERR_UNSUP, "TLS is not offered here").await?;
            }
            _ => self.refuse(number, option_reply::ERR_UNSUP, "unknown option").await?,
        }
        Ok(Next::Option)
    }

    async fn export_name(&mut self, data: &[u8]) -> Result<Next, HandshakeError> {
        let name = String::from_utf8_lossy(data).into_owned();
        let Some(export) = find(self.exports, &name).await else {
            // The protocol has no way to say this but to hang up.
            return Err(HandshakeError::UnknownExport(name));
        };
        let info = ExportInfo { size: export.size.into(), flags: self.flags(&export).into() };
        let mut out = info.as_bytes().to_vec();
        if !self.no_zeroes {
            out.resize(out.len() + EXPORT_NAME_PADDING, 0);
        }
        self.send(&out).await?;
        Ok(Next::Transmission(Box::new(export)))
    }

    async fn list(&mut self) -> Result<(), HandshakeError> {
        let mut out = Vec::new();
        for name in self.exports.list() {
            let mut data = Vec::new();
            proto::put_string(&mut data, &name);
            // What follows the name is up to the server, and shown to people by most clients.
            data.extend_from_slice(self.exports.describe(&name).as_bytes());
            put_reply(&mut out, option::LIST, option_reply::SERVER, &data);
        }
        put_reply(&mut out, option::LIST, option_reply::ACK, &[]);
        self.send(&out).await
    }

    async fn info(&mut self, number: u32, data: &[u8]) -> Result<Next, HandshakeError> {
        let query = match InfoQuery::decode(data) {
            Ok(query) => query,
            Err(error) => {
                self.refuse(number, option_reply::ERR_INVALID, &error.to_string()).await?;
                return Ok(Next::Option);
            }
        };
        let Some(export) = find(self.exports, &query.name).await else {
            self.refuse_unknown(number, &query.name).await?;
            return Ok(Next::Option);
        };
        let mut out = Vec::new();
        let mut put = |data: &[u8]| put_reply(&mut out, number, option_reply::INFO, data);
        let of_export =
            InfoExport { kind: info::EXPORT.into(), size: export.size.into(), flags: self.flags(&export).into() };
        put(of_export.as_bytes());
        let block_size = InfoBlockSize {
            kind: info::BLOCK_SIZE.into(),
            minimum: 1.into(),
            preferred: (BLOCK_SIZE as u32).into(),
            maximum: MAX_PAYLOAD.into(),
        };
        put(block_size.as_bytes());
        for (kind, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if query.wanted.contains(&kind) && !text.is_empty() {
                put(&[&kind.to_be_bytes(), text.as_bytes()].concat());
            }
        }
        put_reply(&mut out, number, option_reply::ACK, &[]);
        self.send(&out).await?;
        Ok(match number {
            option::GO => Next::Transmission(Box::new(export)),
            _ => Next::Option,
        })
    }

    async fn meta_context(&mut self, number: u32, data: &[u8]) -> Result<(), HandshakeError> {
        let set = number == option::SET_META_CONTEXT;
        if set {
            // A new choice replaces the old one, even if it fails.
            self.context_of = None;
        }
        if !self.structured {
            let why = "structured replies must be negotiated first";
            return self.refuse(number, option_reply::ERR_INVALID, why).await;
        }
        let query = match MetaQuery::decode(data) {
            Ok(query) => query,
            Err(error) => {
                return self.refuse(number, option_reply::ERR_INVALID, &error.to_string()).await;
            }
        };
        let Some(export) = find(self.exports, &query.export).await else {
            return self.refuse_unknown(number, &query.export).await;
        };
        let wanted = if set {
            query.queries.iter().any(|query| query == BASE_ALLOCATION)
        } else {
            query.queries.is_empty() || query.queries.iter().any(|query| query == BASE_ALLOCATION || query == "base:")
        };
        let mut out = Vec::new();
        if wanted {
            let context = proto::encode_meta_context(BASE_ALLOCATION_ID, BASE_ALLOCATION);
            put_reply(&mut out, number, option_reply::META_CONTEXT, &context);
        }
        put_reply(&mut out, number, option_reply::ACK, &[]);
        if set && wanted {
            self.context_of = Some(export.name);
        }
        self.send(&out).await
    }

    fn flags(&self, export: &Export) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::CAN_MULTI_CONN
            | transmission::SEND_CACHE;
        flags |= if export.read_only {
            transmission::READ_ONLY
        } else {
            transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO
        };
        if self.structured {
            flags |= transmission::SEND_DF;
        }
        flags
    }

    fn settle(self, export: Export) -> (Export, SessionParams) {
        let chosen = self.context_of.is_some_and(|name| name == export.name);
        let params = SessionParams {
            peer: self.peer.to_owned(),
            export: export.name.clone(),
            read_only: export.read_only,
            structured: self.structured,
            base_allocation: chosen.then_some(BASE_ALLOCATION_ID),
        };
        (export, params)
    }

    async fn refuse_unknown(&mut self, number: u32, name: &str) -> Result<(), HandshakeError> {
        let why = self.exports.refusal(name).unwrap_or_else(|| format!("no export is named {name:?}"));
        self.refuse(number, option_reply::ERR_UNKNOWN, &why).await
    }

    async fn refuse(&mut self, number: u32, kind: u32, why: &str) -> Result<(), HandshakeError> {
        self.reply(number, kind, why.as_bytes()).await
    }

    async fn reply(&mut self, number: u32, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        let mut out = Vec::new();
        put_reply(&mut out, number, kind, data);
        self.send(&out).await
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        in_time(self.stream.write_all(bytes)).await
    }

    async fn receive<T>(&mut self) -> Result<T, HandshakeError>
    where
        T: FromBytes + FromZeros + IntoBytes + KnownLayout + Immutable + Unaligned,
    {
        let mut value = T::new_zeroed();
        self.receive_into(value.as_mut_bytes()).await?;
        Ok(value)
    }

    async fn receive_into(&mut self, buf: &mut [u8]) -> Result<(), HandshakeError> {
        in_time(self.stream.read_exact(buf)).await.map(drop)
    }

    async fn skip(&mut self, len: u32) -> Result<(), HandshakeError> {
        if len > MAX_SKIPPED_DATA {
            return Err(ProtoError::Malformed("option length").into());
        }
        let mut rest = (&mut *self.stream).take(len.into());
        let skipped = in_time(tokio::io::copy(&mut rest, &mut tokio::io::sink())).await?;
        if skipped < len.into() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(())
    }
}

/// The export of a name; the empty name means the only one.
async fn find(exports: &dyn Exports, name: &str) -> Option<Export> {
    exports.prepare(name).await;
    exports.find(name).or_else(|| match &exports.list()[..] {
        [only] if name.is_empty() => exports.find(only),
        _ => None,
    })
}

fn put_reply(out: &mut Vec<u8>, number: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(OptionReply::new(number, kind, data.len() as u32).as_bytes());
    out.extend_from_slice(data);
}

async fn in_time<T>(io: impl Future<Output = io::Result<T>>) -> Result<T, HandshakeError> {
    match timeout(MESSAGE_TIMEOUT, io).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(HandshakeError::Timeout),
    }
}
