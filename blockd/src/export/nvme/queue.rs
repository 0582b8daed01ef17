//! A queue on tokio: the initialisation of its connection, command capsules in, completions out. I/O queues leave from
//! here to the reactor after their Connect command.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use zerocopy::{FromBytes, IntoBytes};

use super::command::{Command, Completion, Status};
use super::pdu::{self, CommandCapsule, Framing, Header, Initialize, PduError, fatal, fes, kind};
use super::{ADMIN_IN_CAPSULE_MAX, TRANSFER_MAX};
use crate::outgoing::Outgoing;

/// Why a queue ends.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The host broke the protocol.
    #[error(transparent)]
    Pdu(#[from] PduError),
}

/// A command and the data its capsule carried.
pub struct Capsule {
    pub command: Command,
    pub data: Vec<u8>,
    /// Whether the data arrived as it was sent.
    pub intact: bool,
}

/// See the module.
pub struct Queue {
    stream: TcpStream,
    input: Vec<u8>,
    output: Outgoing,
    framing: Framing,
    /// Entries, and how far they were read, once Connect has settled that there is flow control.
    flow: Option<(u16, u16)>,
}

impl Queue {
    /// Initialises a connection.
    pub async fn initialize(mut stream: TcpStream) -> Result<Self, QueueError> {
        let mut request = [0; Initialize::SIZE];
        // Garbage is noticed by its first bytes, not when it has grown to a PDU.
        stream.read_exact(&mut request[..Header::SIZE]).await?;
        let head = Header::read_from_bytes(&request[..Header::SIZE]).expect("as many bytes as it has");
        let mut checked = Initialize::new(head.kind, 0, 0, 0);
        checked.header = head;
        let mut result = checked.check_request();
        if result.is_ok() {
            stream.read_exact(&mut request[Header::SIZE..]).await?;
            checked = Initialize::read_from_bytes(&request).expect("as many bytes as it has");
            result = checked.check_request();
        }
        if let Err(error) = result {
            let mut out = Outgoing::new();
            Framing::put_terminate(&mut out, &error, &request[..Header::SIZE]);
            stream.write_all(&out.to_vec()).await?;
            return Err(error.into());
        }
        let framing = Framing::of(&checked);
        // The pieces in which a host sends data may be as long as a command's.
        let response = Initialize::new(kind::IC_RESP, 0, framing.digests(), TRANSFER_MAX);
        stream.write_all(response.as_bytes()).await?;
        Ok(Self { stream, input: Vec::new(), output: Outgoing::new(), framing, flow: None })
    }

    /// What was settled.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Counts the entries the host may use again, from now on; the Connect command was the first.
    pub fn begin_flow_control(&mut self, entries: u16) {
        self.flow = Some((entries, 1 % entries));
    }

    /// The next command; `None` when the host has left. Can be dropped and asked again.
    pub async fn next(&mut self) -> Result<Option<Capsule>, QueueError> {
        loop {
            match self.take() {
                Ok(Some(capsule)) => return Ok(Some(capsule)),
                Ok(None) => {}
                Err(error) => {
                    Framing::put_terminate(&mut self.output, &error, &self.input);
                    // It leaves anyway.
                    let _ = self.flush().await;
                    return Err(error.into());
                }
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Ok(None);
            }
        }
    }

    fn take(&mut self) -> Result<Option<Capsule>, PduError> {
        let Some((header, _)) = pdu::take::<Header>(&self.input) else { return Ok(None) };
        let pdo = self.framing.check(&header)?;
        let data = self.framing.data_len(&header, pdo);
        match header.kind {
            kind::CAPSULE_CMD if data > ADMIN_IN_CAPSULE_MAX as usize => {
                return Err(fatal(fes::INVALID_HEADER, 4, "a capsule with more data than it may carry"));
            }
            kind::CAPSULE_CMD | kind::H2C_TERM_REQ => {}
            // Data of admin commands comes in their capsules, so none is ever asked for.
            _ => return Err(fatal(fes::SEQUENCE, 0, "data that was not asked for")),
        }
        let plen = header.plen.get() as usize;
        if self.input.len() < plen {
            return Ok(None);
        }
        if header.kind == kind::H2C_TERM_REQ {
            let status = pdu::take::<pdu::Terminate>(&self.input).map_or(0, |(head, _)| head.status.get());
            return Err(PduError::Terminated(status));
        }
        self.framing.check_header_digest(&self.input, size_of::<CommandCapsule>())?;
        let (capsule, _) = pdu::take::<CommandCapsule>(&self.input).expect("its length was checked");
        let bytes = self.input[pdo..pdo + data].to_vec();
        let digest = self.input[pdo + data..plen].first_chunk().copied();
        let intact = data == 0 || digest.is_none_or(|digest| Framing::data_digest_matches(&bytes, digest));
        self.input.drain(..plen);
        if let Some((entries, head)) = &mut self.flow {
            *head = (*head + 1) % *entries;
        }
        Ok(Some(Capsule { command: capsule.command, data: bytes, intact }))
    }

    /// Queues a completion.
    pub fn complete(&mut self, cid: u16, status: Status, result: u64) {
        let head = self.flow.map_or(0, |(_, head)| head);
        self.framing.put_completion(&mut self.output, Completion::new(cid, head, status, result));
    }

    /// Queues data and the completion of the command that asked for it. No more than there is room for is sent; where
    /// the command has no room of the right kind it fails.
    pub fn answer(&mut self, command: &Command, data: &[u8]) {
        let cid = command.cid.get();
        match command.data_out() {
            Ok(room) => {
                let data = &data[..data.len().min(room as usize)];
                if !data.is_empty() {
                    self.framing.put_data(&mut self.output, cid, data.to_vec().into(), false);
                }
                self.complete(cid, Status::SUCCESS, 0);
            }
            Err(status) => self.complete(cid, status, 0),
        }
    }

    /// Sends what is queued.
    pub async fn flush(&mut self) -> io::Result<()> {
        let output = std::mem::take(&mut self.output);
        self.stream.write_all(&output.into_bytes()).await
    }

    /// The socket.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The socket and what was received and not used, for whoever goes on with it.
    pub fn into_parts(self) -> (TcpStream, Vec<u8>) {
        (self.stream, self.input)
    }
}
