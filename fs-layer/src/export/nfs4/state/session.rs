//! Sessions: slots in which requests run exactly once, and their replies kept for those who ask again (RFC 8881 section 2.10.6).

use std::sync::{Arc, Mutex, MutexGuard};

use super::super::callback::BackChannel;
use super::super::rpc::Caller;
use super::super::status::{Nfs4Error, Status};
use super::super::xdr::{Reader, Writer};

/// The name of a session.
pub type SessionId = [u8; 16];

/// Replies up to this many bytes are kept although the client did not ask.
pub const SMALL_REPLY_BYTES: usize = 512;

/// What a channel can carry (channel_attrs4, RFC 8881 section 18.36.1), in bytes and counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Padding of headers.
    pub header_pad: u32,
    /// Longest request.
    pub request_max: u32,
    /// Longest reply.
    pub response_max: u32,
    /// Longest reply that is kept.
    pub cached_max: u32,
    /// Most operations in a compound.
    pub operations_max: u32,
    /// Requests at a time.
    pub requests_max: u32,
}

impl Channel {
    /// Reads one.
    pub fn read(r: &mut Reader<'_>) -> Status<Channel> {
        let channel = Channel {
            header_pad: r.u32()?,
            request_max: r.u32()?,
            response_max: r.u32()?,
            cached_max: r.u32()?,
            operations_max: r.u32()?,
            requests_max: r.u32()?,
        };
        for _ in 0..r.count(1)? {
            r.u32()?;
        }
        Ok(channel)
    }

    /// Writes it.
    pub fn write(&self, w: &mut Writer) {
        for word in [
            self.header_pad,
            self.request_max,
            self.response_max,
            self.cached_max,
            self.operations_max,
            self.requests_max,
            0,
        ] {
            w.u32(word);
        }
    }
}

/// A request that runs in a slot, told from others by what a retry has in common with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// By whom.
    pub caller: Caller,
    /// Operations of the compound.
    pub operations: u32,
}

#[derive(Default)]
struct Slot {
    sequence: u32,
    busy: bool,
    /// Of the last request that began.
    request: Option<Fingerprint>,
    /// What was answered to it, unless that was not kept.
    reply: Option<Arc<Vec<u8>>>,
}

/// What is to be done with a request.
#[derive(Debug)]
pub enum Begun {
    /// Run it, then [`Session::finish`].
    New,
    /// It ran: this was the reply.
    Replay(Arc<Vec<u8>>),
    /// It ran, and the reply was not kept.
    Uncached,
}

/// A session.
pub struct Session {
    /// Its name.
    pub id: SessionId,
    /// Whose it is.
    pub client: u64,
    /// The way from the client.
    pub fore: Channel,
    /// The way to it.
    pub back: BackChannel,
    slots: Mutex<Vec<Slot>>,
}

impl Session {
    /// One with empty slots.
    pub fn new(id: SessionId, client: u64, fore: Channel, back: BackChannel) -> Session {
        let slots = (0..fore.requests_max).map(|_| Slot::default()).collect();
        Session { id, client, fore, back, slots: Mutex::new(slots) }
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().expect("no panic under the lock")
    }

    /// Takes a slot for the request that follows the last one, or finds what was answered to it.
    ///
    /// # Errors
    /// `BadSlot`, `SeqMisordered`; `Delay` if the very request runs right now; `SeqFalseRetry` if another one ran under its number.
    pub fn begin(&self, slot: u32, sequence: u32, request: &Fingerprint) -> Status<Begun> {
        let mut slots = self.slots();
        let slot = slots.get_mut(slot as usize).ok_or(Nfs4Error::BadSlot)?;
        if sequence == slot.sequence.wrapping_add(1) {
            if slot.busy {
                return Err(Nfs4Error::SeqMisordered);
            }
            *slot = Slot { sequence, busy: true, request: Some(request.clone()), reply: None };
            return Ok(Begun::New);
        }
        let Some(last) = slot.request.as_ref().filter(|_| sequence == slot.sequence) else {
            return Err(Nfs4Error::SeqMisordered);
        };
        if slot.busy {
            return Err(Nfs4Error::Delay);
        }
        if last != request {
            return Err(Nfs4Error::SeqFalseRetry);
        }
        Ok(slot.reply.clone().map_or(Begun::Uncached, Begun::Replay))
    }

    /// Frees the slot of a request that has no reply.
    pub fn abandon(&self, slot: u32) {
        if let Some(slot) = self.slots().get_mut(slot as usize) {
            slot.busy = false;
        }
    }

    /// Frees the slot. The reply is there for who asks once more, if the client wants that or if it is small.
    pub fn finish(&self, slot: u32, reply: Option<Vec<u8>>) {
        let mut slots = self.slots();
        let slot = &mut slots[slot as usize];
        slot.busy = false;
        slot.reply = reply.map(Arc::new);
    }
}
