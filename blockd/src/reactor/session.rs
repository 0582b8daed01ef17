//! What the reactor drives on behalf of a client: the state machine of a protocol.

use std::fmt;

use futures::future::BoxFuture;

use super::device::Device;
use crate::outgoing::Outgoing;
use crate::volume::{IoError, Outcome};

/// Write payloads of at least this many bytes are received into memory of their own. Smaller ones, with all that goes
/// before them, must fit the receive buffer.
pub const DIRECT_PAYLOAD: usize = 64 << 10;

/// Why [`Session::consume`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More bytes are needed.
    NeedBytes,
    /// Bytes for [`Session::payload_mut`] are needed; all input was used.
    NeedPayload,
    /// Too much is unanswered or unsent; try again after completions or sends.
    Busy,
    /// The client said goodbye: answer what runs, then close.
    Disconnect,
}

/// Totals since the connection began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Requests accepted.
    pub requests: u64,
    /// Bytes asked for by reads.
    pub read_bytes: u64,
    /// Bytes received by writes.
    pub written_bytes: u64,
}

/// Why a client is dropped. What collected in the output buffer is still sent.
#[derive(Debug)]
pub struct SessionError(pub Box<dyn std::error::Error + Send + Sync>);

impl fmt::Display for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<E> for SessionError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// Work of a request that is not the device's; its result goes to [`Session::task_done`].
pub type Task = BoxFuture<'static, u32>;

/// Turns bytes into device calls, and what the device answers into bytes. Performs no I/O.
///
/// Each request that is given to the device gets a token: the base that the session was made with, plus a slot below
/// 2^16, by which its completion comes back.
pub trait Session: Send {
    /// Uses up a prefix of `input`, calling `device` and appending replies to `out`. Returns the prefix's length.
    ///
    /// # Errors
    /// The client broke the protocol; nothing after can be understood and the connection must be closed.
    fn consume(
        &mut self,
        input: &[u8],
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<(usize, Progress), SessionError>;
    /// Where the rest of a large write's payload goes, after [`Progress::NeedPayload`].
    fn payload_mut(&mut self) -> Option<&mut [u8]>;
    /// `len` bytes were put at the start of [`Session::payload_mut`].
    fn payload_received(&mut self, len: usize, device: &mut dyn Device, out: &mut Outgoing);
    /// Whether the last request was a write received in place, so that another is likely to follow.
    fn streams_large_writes(&self) -> bool;
    /// The device finished the request of a slot.
    fn complete(&mut self, slot: u16, result: Result<Outcome, IoError>, device: &mut dyn Device, out: &mut Outgoing);
    /// Requests not answered yet.
    fn in_flight(&self) -> usize;
    /// Totals.
    fn stats(&self) -> SessionStats;
    /// From now on new requests are refused.
    fn shut_down(&mut self);
    /// Work to be run elsewhere, each with the slot of its request.
    fn take_tasks(&mut self) -> Vec<(u16, Task)> {
        Vec::new()
    }
    /// A task ended.
    fn task_done(&mut self, _slot: u16, _result: u32, _device: &mut dyn Device, _out: &mut Outgoing) {}
    /// Whether the client is told of this error by hanging up, so that it asks again elsewhere or later.
    fn hangs_up_for(&self, _error: &IoError) -> bool {
        false
    }
    /// Why the connection cannot go on, if so; it is then dropped without another word.
    fn broken(&self) -> Option<&str> {
        None
    }
    /// Whether a client that has gone is remembered until the device has answered all it asked.
    fn outlives_client(&self) -> bool {
        false
    }
}

/// Makes the session of a new connection from the base of its tokens, whose low 16 bits are 0.
pub type NewSession = Box<dyn FnOnce(u64) -> Box<dyn Session> + Send>;

/// A client whose handshake is over.
pub struct Client {
    /// Its address, for messages.
    pub peer: String,
    /// The export it asked for.
    pub export: String,
    /// Connections that are dropped together, see [`super::ReactorHandle::drop_group`]; 0 for none.
    pub group: u64,
    /// What serves it.
    pub session: NewSession,
}
