//! The gate between clients and an owner: shut while the lease has run out, closed for good once another host has the
//! volume.
//!
//! While it is shut nothing is answered and nothing is accepted: requests wait, and so do the answers of those that
//! were accepted before. What is in the log goes on to the bucket, which has its own protection (the epoch). When the
//! lease is renewed everything goes on where it was; when the volume is lost everything that waits fails.

use super::api::{Completion, Effect, IoError, Outcome, ReadData, ReadNow, Token, WriteData};
use super::engine::{State, Volume};
use crate::buf::AlignedBuf;
use crate::lease::{Grant, Instants};
use crate::outgoing::Outgoing;

/// A request that came while the gate was shut.
enum Request {
    Read { offset: u64, len: u32 },
    Write { offset: u64, data: AlignedBuf, len: usize, fua: bool },
    CompareWrite { offset: u64, expected: Vec<u8>, data: Vec<u8>, fua: bool },
    Zero { offset: u64, len: u64, fua: bool, no_hole: bool },
    Copy { from: u64, to: u64, len: u64, fua: bool },
    Trim { offset: u64, len: u64, fua: bool },
    Flush,
    Extents { offset: u64, len: u64, max: usize },
}

/// See the module.
#[derive(Default)]
pub(super) struct Gate {
    /// Until when to serve; without one, always.
    grant: Option<Grant>,
    shut: bool,
    /// Nothing new is taken on: everything is on its way to the bucket, for another host to go on with.
    pub releasing: bool,
    requests: Vec<(Token, Request)>,
    answers: Vec<Completion>,
}

impl Gate {
    /// Whether requests and answers wait.
    pub fn is_shut(&self) -> bool {
        self.shut
    }

    pub fn hold_answer(&mut self, completion: Completion) {
        self.answers.push(completion);
    }

    pub fn hold_read(&mut self, token: Token, offset: u64, len: u32) {
        self.requests.push((token, Request::Read { offset, len }));
    }

    pub fn hold_write(&mut self, token: Token, offset: u64, data: WriteData<'_>, fua: bool) {
        let (data, len) = match data {
            WriteData::Copy(bytes) => (AlignedBuf::copy_of(bytes), bytes.len()),
            WriteData::Owned(buf, len) => (buf, len),
        };
        self.requests.push((token, Request::Write { offset, data, len, fua }));
    }

    pub fn hold_compare_write(&mut self, token: Token, offset: u64, expected: Vec<u8>, data: Vec<u8>, fua: bool) {
        self.requests.push((token, Request::CompareWrite { offset, expected, data, fua }));
    }

    pub fn hold_zero(&mut self, token: Token, offset: u64, len: u64, fua: bool, no_hole: bool) {
        self.requests.push((token, Request::Zero { offset, len, fua, no_hole }));
    }

    pub fn hold_copy(&mut self, token: Token, (from, to): (u64, u64), len: u64, fua: bool) {
        self.requests.push((token, Request::Copy { from, to, len, fua }));
    }

    pub fn hold_trim(&mut self, token: Token, offset: u64, len: u64, fua: bool) {
        self.requests.push((token, Request::Trim { offset, len, fua }));
    }

    pub fn hold_flush(&mut self, token: Token) {
        self.requests.push((token, Request::Flush));
    }

    pub fn hold_extents(&mut self, token: Token, offset: u64, len: u64, max: usize) {
        self.requests.push((token, Request::Extents { offset, len, max }));
    }
}

impl Volume {
    /// The time; to be called before anything else that may answer a request. Shuts the gate when the lease has run
    /// out.
    pub fn tick(&mut self, now: Instants) {
        if !self.gate.shut && self.failed.is_none() && self.gate.grant.is_some_and(|grant| !grant.holds(now)) {
            tracing::warn!(volume = %self.name, "its lease could not be renewed in time: requests wait until it is");
            self.gate.shut = true;
        }
    }

    /// The lease was taken or renewed.
    pub fn grant(&mut self, grant: Grant, now: Instants) {
        if self.failed.is_some() {
            return;
        }
        self.gate.grant = Some(grant);
        self.tick(now);
        if self.gate.shut && grant.holds(now) {
            tracing::info!(volume = %self.name, "its lease is renewed: requests go on");
            self.gate.shut = false;
            self.effects.extend(self.gate.answers.drain(..).map(Effect::Complete));
            for (token, request) in std::mem::take(&mut self.gate.requests) {
                self.start(token, request);
            }
        }
    }

    fn start(&mut self, token: Token, request: Request) {
        match request {
            Request::Read { offset, len } => {
                let mut bytes = Outgoing::new();
                match self.read(token, offset, len, &mut bytes) {
                    ReadNow::Ready { holes } => self.complete(token, Ok(Outcome::Data(ReadData { bytes, holes }))),
                    ReadNow::Failed(error) => self.complete(token, Err(error)),
                    ReadNow::Pending => {}
                }
            }
            Request::Write { offset, data, len, fua } => {
                // Ownership of the buffer may only be passed on for whole blocks.
                self.write(token, offset, WriteData::Copy(&data[..len]), fua);
            }
            Request::CompareWrite { offset, expected, data, fua } => {
                self.compare_write(token, offset, expected, data, fua);
            }
            Request::Zero { offset, len, fua, no_hole } => self.zero(token, offset, len, fua, no_hole),
            Request::Copy { from, to, len, fua } => self.copy(token, from, to, len, fua),
            Request::Trim { offset, len, fua } => self.trim(token, offset, len, fua),
            Request::Flush => self.flush(token),
            Request::Extents { offset, len, max } => self.extents(token, offset, len, max),
        }
    }

    /// Another host has the volume: everything fails from here on, and nothing more is sent to the bucket. The log
    /// keeps what the bucket does not have.
    pub fn fence(&mut self, reason: &str) {
        if self.failed.is_none() {
            tracing::error!(volume = %self.name, "volume fenced: {reason}");
        }
        self.failed = Some(reason.into());
        self.gate.shut = false;
        self.fail_held(IoError::Stopped(reason.into()));
        self.fail_writes();
    }

    /// Answers everything that waits at the gate with an error.
    pub(super) fn fail_held(&mut self, error: IoError) {
        let answers = self.gate.answers.drain(..).map(|answer| answer.token);
        let tokens: Vec<Token> = answers.chain(self.gate.requests.drain(..).map(|(token, _)| token)).collect();
        for token in tokens {
            self.effects.push_back(Effect::Complete(Completion { token, result: Err(error.clone()) }));
        }
    }

    /// Begins to let go of the volume: requests are refused, and everything accepted is sent to the bucket.
    pub fn begin_release(&mut self) {
        self.gate.releasing = true;
        self.fail_held(IoError::Shutdown);
    }

    /// Goes back to serving.
    pub fn cancel_release(&mut self) {
        self.gate.releasing = false;
    }

    /// Whether everything ever accepted is in the bucket and in the table, and nothing new can come.
    pub fn is_drained(&self) -> bool {
        self.gate.releasing
            && self.waiting.is_empty()
            && self.tickets.is_empty()
            && !self.log.has_open_records()
            && self.log.in_flight() == 0
            && self.destage.is_empty()
            && self.destage.stored_lsn() == self.log.accepted_lsn()
    }

    /// Why the volume stopped for good, if it did: another host has it.
    pub fn fenced(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// Why nothing may be read either, if so.
    pub(super) fn read_error(&self) -> Option<IoError> {
        match &self.failed {
            Some(reason) => Some(IoError::Stopped(reason.clone())),
            None => self.gate.releasing.then_some(IoError::Shutdown),
        }
    }

    /// What an answer becomes on its way out; nothing while it has to wait.
    pub(super) fn at_gate(&mut self, mut completion: Completion) -> Option<Completion> {
        if let Some(reason) = &self.failed {
            if completion.result.is_ok() {
                completion.result = Err(IoError::Stopped(reason.clone()));
            }
        } else if self.gate.is_shut() {
            if self.state == State::Open {
                self.gate.hold_answer(completion);
                return None;
            }
            completion.result = Err(IoError::Shutdown);
        }
        Some(completion)
    }
}
