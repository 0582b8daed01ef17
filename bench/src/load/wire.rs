//! The two protocols, as far as the load needs them: how a request begins, and what answers mean.

use std::io;

use blockd::export::nbd::proto;
use blockd::export::nvme::command::{Command, io as op};
use blockd::export::nvme::pdu::{self, CommandCapsule, Header, ResponseCapsule, Transfer, flag, kind};
use blockd::export::nvme::{IN_CAPSULE_MAX, LBA_BYTES, NSID};
use zerocopy::IntoBytes;

/// What a slot asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    Read,
    Write,
    Flush,
}

/// A request's bytes before its payload.
#[derive(Clone, Copy)]
pub struct Head {
    bytes: [u8; 72],
    len: usize,
}

impl Head {
    /// Nothing.
    pub const NONE: Self = Self { bytes: [0; 72], len: 0 };

    fn of(bytes: &[u8]) -> Self {
        let mut head = Self::NONE;
        head.bytes[..bytes.len()].copy_from_slice(bytes);
        head.len = bytes.len();
        head
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// A protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// NBD with simple replies.
    Nbd,
    /// NVMe/TCP without digests.
    Nvme,
}

/// What came.
pub enum Event {
    /// The slot's request is done.
    Done(usize),
    /// So many bytes of data for the slot follow; with `true` they end its request.
    Data(usize, usize, bool),
    /// The server wants the slot's payload, behind this head.
    Wanted(usize, Head),
}

impl Wire {
    /// The beginning of a request, and whether its payload follows at once.
    pub fn head(self, ask: Ask, slot: usize, offset: u64, len: u32) -> (Head, bool) {
        match self {
            Wire::Nbd => {
                let command = match ask {
                    Ask::Read => proto::command::READ,
                    Ask::Write => proto::command::WRITE,
                    Ask::Flush => proto::command::FLUSH,
                };
                (Head::of(proto::Request::new(command, 0, slot as u64, offset, len).as_bytes()), true)
            }
            Wire::Nvme => {
                let opcode = match ask {
                    Ask::Read => op::READ,
                    Ask::Write => op::WRITE,
                    Ask::Flush => op::FLUSH,
                };
                let mut command = Command::new(opcode, slot as u16, NSID);
                let in_capsule = ask == Ask::Write && len <= IN_CAPSULE_MAX;
                let (mut plen, mut pdo) = (72, 0);
                if ask != Ask::Flush {
                    command =
                        command.with_blocks(offset / LBA_BYTES, len / LBA_BYTES as u32).with_data(len, in_capsule);
                }
                if in_capsule {
                    (plen, pdo) = (72 + len, 72);
                }
                let header = Header { kind: kind::CAPSULE_CMD, flags: 0, hlen: 72, pdo, plen: plen.into() };
                (Head::of(CommandCapsule { header, command }.as_bytes()), in_capsule)
            }
        }
    }

    /// The next event in what was received, and how many bytes it used; `None` if there are too few. `reads` tells
    /// whether a slot is a read, and of how many bytes.
    pub fn event(self, bytes: &[u8], reads: impl Fn(usize) -> Option<usize>) -> io::Result<Option<(Event, usize)>> {
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        match self {
            Wire::Nbd => {
                let Some((reply, _)) = proto::take::<proto::SimpleReply>(bytes) else { return Ok(None) };
                if reply.magic.get() != proto::SIMPLE_REPLY_MAGIC || reply.error.get() != 0 {
                    return Err(bad(format!("the server answered badly or with an error: {reply:?}")));
                }
                let slot = reply.cookie.get() as usize;
                let event = match reads(slot) {
                    Some(len) => Event::Data(slot, len, true),
                    None => Event::Done(slot),
                };
                Ok(Some((event, proto::SimpleReply::SIZE)))
            }
            Wire::Nvme => {
                let Some((header, _)) = pdu::take::<Header>(bytes) else { return Ok(None) };
                match header.kind {
                    kind::CAPSULE_RESP => {
                        let Some((capsule, _)) = pdu::take::<ResponseCapsule>(bytes) else { return Ok(None) };
                        if !capsule.completion.status().is_success() {
                            return Err(bad(format!("the controller answered with {}", capsule.completion.status())));
                        }
                        Ok(Some((Event::Done(capsule.completion.cid.get().into()), 24)))
                    }
                    kind::C2H_DATA => {
                        let Some((head, _)) = pdu::take::<Transfer>(bytes) else { return Ok(None) };
                        let ends = head.header.flags & flag::SUCCESS != 0;
                        Ok(Some((Event::Data(head.cid.get().into(), head.len.get() as usize, ends), 24)))
                    }
                    kind::R2T => {
                        let Some((r2t, _)) = pdu::take::<Transfer>(bytes) else { return Ok(None) };
                        let (cid, len) = (r2t.cid.get(), r2t.len.get());
                        let mut head = Transfer::new(kind::H2C_DATA, flag::LAST, cid, r2t.tag.get(), 0, len);
                        head.header.pdo = 24;
                        head.header.plen = (24 + len).into();
                        Ok(Some((Event::Wanted(cid.into(), Head::of(head.as_bytes())), 24)))
                    }
                    other => Err(bad(format!("a PDU of type {other:#x}"))),
                }
            }
        }
    }
}
