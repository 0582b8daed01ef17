//! Who the client is, and the sessions its requests run in.

use std::sync::Arc;

use crate::export::nfs4::callback::BackChannel;
use crate::export::nfs4::compound::{Compound, InSession, OPERATIONS_MAX};
use crate::export::nfs4::rpc::{AUTH_NONE, AUTH_SYS, AUTH_SYS_GROUPS_MAX, Caller};
use crate::export::nfs4::state::session::{Begun, Channel, Session, SessionId};
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::xdr::{Reader, Writer};

/// Most bytes of a client's long name.
const OWNER_MAX: usize = 1024;
/// Bytes that requests and replies have beside data.
const OVERHEAD: u32 = 8 << 10;
/// Longest reply that is kept.
const CACHED_MAX: u32 = 8 << 10;
/// Shortest request and reply that a session makes sense with.
const MESSAGE_MIN: u32 = 512;

const FLAG_UPDATE: u32 = 0x4000_0000;
const FLAG_CONFIRMED: u32 = 0x8000_0000;
const FLAG_NON_PNFS: u32 = 0x0001_0000;
/// All flags of EXCHANGE_ID that a client may send (RFC 8881 section 18.35.3, RFC 7862 section 13).
const FLAGS_KNOWN: u32 = FLAG_UPDATE | 0x0007_0103 | 0x4;
const SESSION_BACK_CHANNEL: u32 = 2;
/// SEQ4_STATUS_CB_PATH_DOWN_SESSION.
const STATUS_NO_BACK_CHANNEL: u32 = 0x200;

/// EXCHANGE_ID; the numbered cases are those of RFC 8881 section 18.35.4.
pub fn exchange_id(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let verifier: [u8; 8] = r.fixed()?;
    let owner = r.opaque(OWNER_MAX)?;
    let flags = r.u32()?;
    match r.u32()? {
        0 => {}
        // State protection needs Kerberos.
        1 => return Err(Nfs4Error::Inval),
        2 => return Err(Nfs4Error::EncrAlgUnsupp),
        _ => return Err(Nfs4Error::BadXdr),
    }
    for _ in 0..r.count(1)? {
        r.opaque(OWNER_MAX)?;
        r.opaque(OWNER_MAX)?;
        r.i64()?;
        r.u32()?;
    }
    if flags & !FLAGS_KNOWN != 0 || owner.is_empty() {
        return Err(Nfs4Error::Inval);
    }
    let update = flags & FLAG_UPDATE != 0;
    let mut gone = None;
    let (id, sequence, confirmed) = {
        let mut table = c.shared.table();
        let known = table.records_of(owner).confirmed;
        let facts = known.and_then(|id| {
            let client = table.client(id)?;
            Some((id, client.verifier == verifier, client.principal == c.caller, client.has_state()))
        });
        let id = match facts {
            // 6: an update, 2: the same client again.
            Some((id, true, true, _)) => id,
            None if update => return Err(Nfs4Error::NoEnt), // 7
            Some((_, _, false, _)) if update => return Err(Nfs4Error::Perm), // 9
            Some((_, false, _, _)) if update => return Err(Nfs4Error::NotSame), // 8
            // 3: another user claims the name, which counts only if nobody uses it.
            Some((id, _, false, has_state)) => {
                if has_state && !table.is_expired(id) {
                    return Err(Nfs4Error::ClidInUse);
                }
                gone = Some(table.remove_client(id)?);
                table.add_client(owner.to_vec(), verifier, c.caller.clone())?
            }
            // 1 and 4: a new client; 5: one that restarted, the old one goes when the new one has a session.
            None | Some((_, false, true, _)) => table.add_client(owner.to_vec(), verifier, c.caller.clone())?,
        };
        table.renew(id);
        let client = table.client(id).ok_or(Nfs4Error::ServerFault)?;
        (id, client.create_sequence.wrapping_add(1), client.confirmed)
    };
    if let Some(gone) = gone {
        gone.go(&*c.shared.vfs);
    }
    w.u64(id);
    w.u32(sequence);
    w.u32(FLAG_NON_PNFS | if confirmed { FLAG_CONFIRMED } else { 0 });
    w.u32(0);
    // Of this server alone: two with the same would be taken for one (section 2.10.5).
    w.u64(0);
    w.opaque(&c.shared.start.identity);
    w.opaque(&c.shared.fs_id);
    w.u32(0);
    Ok(())
}

/// Credentials that the client wants to be called with; the last ones it lists that are understood.
fn read_callback_security(r: &mut Reader<'_>) -> Status<Caller> {
    let mut caller = Caller::Nobody;
    for _ in 0..r.count(16)? {
        match r.u32()? {
            AUTH_NONE => caller = Caller::Nobody,
            AUTH_SYS => {
                r.u32()?;
                r.opaque(255)?;
                let (uid, gid) = (r.u32()?, r.u32()?);
                let groups = (0..r.count(AUTH_SYS_GROUPS_MAX)?).map(|_| r.u32()).collect::<Status<_>>()?;
                caller = Caller::Unix { uid, gid, groups };
            }
            // RPCSEC_GSS: service and two handles.
            6 => {
                r.u32()?;
                r.opaque(1024)?;
                r.opaque(1024)?;
            }
            _ => return Err(Nfs4Error::BadXdr),
        }
    }
    Ok(caller)
}

/// What of the client's wishes a fore channel gets (section 18.36.3).
fn negotiate(c: &Compound<'_>, asked: Channel) -> Status<Channel> {
    if asked.request_max < MESSAGE_MIN || asked.response_max < MESSAGE_MIN {
        return Err(Nfs4Error::TooSmall);
    }
    if asked.operations_max == 0 || asked.requests_max == 0 {
        return Err(Nfs4Error::Inval);
    }
    let message_max = c.shared.options.transfer_max + OVERHEAD;
    Ok(Channel {
        header_pad: 0,
        request_max: asked.request_max.min(message_max),
        response_max: asked.response_max.min(message_max),
        cached_max: asked.cached_max.min(CACHED_MAX),
        operations_max: asked.operations_max.min(OPERATIONS_MAX),
        requests_max: asked.requests_max.min(c.shared.options.slots),
    })
}

pub fn create_session(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let id = r.u64()?;
    let sequence = r.u32()?;
    let flags = r.u32()?;
    let (fore, back) = (Channel::read(r)?, Channel::read(r)?);
    let program = r.u32()?;
    let security = read_callback_security(r)?;
    let (session, gone) = {
        let mut table = c.shared.table();
        let client = table.client(id).ok_or(Nfs4Error::StaleClientId)?;
        if sequence == client.create_sequence {
            // The last one again: the same answer.
            w.raw(client.create_reply.as_ref().ok_or(Nfs4Error::SeqMisordered)?);
            return Ok(());
        }
        if sequence != client.create_sequence.wrapping_add(1) {
            return Err(Nfs4Error::SeqMisordered);
        }
        if !client.confirmed && client.principal != c.caller {
            return Err(Nfs4Error::ClidInUse);
        }
        if flags & !7 != 0 {
            return Err(Nfs4Error::Inval);
        }
        let fore = negotiate(c, fore)?;
        // Whatever held the name before goes now, and the new one counts.
        let gone = table.confirm_client(id)?;
        let minor = c.minor;
        let session = table.add_session(id, |session| {
            Session::new(
                session,
                id,
                fore,
                BackChannel::new(Channel { header_pad: 0, ..back }, program, security, minor),
            )
        })?;
        table.renew(id);
        let begin = w.len();
        w.fixed(&session.id);
        w.u32(sequence);
        w.u32(flags & SESSION_BACK_CHANNEL);
        session.fore.write(w);
        session.back.attributes.write(w);
        let client = table.client(id).ok_or(Nfs4Error::ServerFault)?;
        client.create_sequence = sequence;
        client.create_reply = Some(w.as_bytes()[begin..].to_vec());
        (session, gone)
    };
    if flags & SESSION_BACK_CHANNEL != 0 {
        session.back.bind(c.connection);
    }
    gone.go(&*c.shared.vfs);
    Ok(())
}

pub fn destroy_session(c: &mut Compound<'_>, r: &mut Reader<'_>) -> Status<()> {
    let id: SessionId = r.fixed()?;
    if let Some(place) = &c.place {
        // The reply cannot be kept in what is gone, so nothing may follow (section 18.37.3).
        if place.session.id == id && c.index + 1 != c.operations {
            return Err(Nfs4Error::NotOnlyOp);
        }
    }
    c.shared.table().remove_session(&id).map(drop).ok_or(Nfs4Error::BadSession)
}

pub fn bind_conn(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let id: SessionId = r.fixed()?;
    let direction = r.u32()?;
    let _rdma = r.bool()?;
    let session = c.shared.table().session(&id).ok_or(Nfs4Error::BadSession)?;
    let bound = match direction {
        1 => 1,
        2 => 2,
        3 | 7 => 3,
        _ => return Err(Nfs4Error::BadXdr),
    };
    if bound & 2 != 0 {
        session.back.bind(c.connection);
    }
    w.fixed(&id);
    w.u32(bound);
    w.bool(false);
    Ok(())
}

pub fn backchannel_ctl(c: &mut Compound<'_>, r: &mut Reader<'_>) -> Status<()> {
    let program = r.u32()?;
    let caller = read_callback_security(r)?;
    let place = c.place.as_ref().ok_or(Nfs4Error::OpNotInSession)?;
    place.session.back.set(program, caller);
    Ok(())
}

/// SEQUENCE (section 18.46). Only one that succeeds in a session renews the lease.
pub fn sequence(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let id: SessionId = r.fixed()?;
    let sequence = r.u32()?;
    let slot = r.u32()?;
    let highest = r.u32()?;
    let keep = r.bool()?;
    let session = c.shared.table().session(&id);
    let Some(session) = session else {
        if !c.was_run_before() {
            return Err(Nfs4Error::BadSession);
        }
        // The answer that the server before this one did not get to send.
        tracing::info!("an NFS request is answered that ran before the server was killed");
        c.again = true;
        w.fixed(&id);
        for word in [sequence, slot, highest, highest, 0] {
            w.u32(word);
        }
        return Ok(());
    };
    let slots = session.fore.requests_max;
    if highest >= slots {
        return Err(Nfs4Error::BadHighSlot);
    }
    let begun = session.begin(slot, sequence, &c.fingerprint())?;
    let status = if session.back.lost() { STATUS_NO_BACK_CHANNEL } else { 0 };
    {
        let mut table = c.shared.table();
        table.renew(session.client);
    }
    w.fixed(&id);
    w.u32(sequence);
    w.u32(slot);
    w.u32(slots - 1);
    w.u32(slots - 1);
    w.u32(status);
    match begun {
        Begun::New => c.place = Some(InSession::new(Arc::clone(&session), slot, keep)),
        other => c.replay = Some(other),
    }
    Ok(())
}

pub fn destroy_clientid(c: &mut Compound<'_>, r: &mut Reader<'_>) -> Status<()> {
    let id = r.u64()?;
    let gone = {
        let mut table = c.shared.table();
        let client = table.client(id).ok_or(Nfs4Error::StaleClientId)?;
        if !client.sessions.is_empty() || client.has_state() {
            return Err(Nfs4Error::ClientIdBusy);
        }
        table.remove_client(id)?
    };
    gone.go(&*c.shared.vfs);
    Ok(())
}

/// RECLAIM_COMPLETE (section 18.51). The client is written down before it may take anything new.
pub fn reclaim_complete(c: &mut Compound<'_>, r: &mut Reader<'_>) -> Status<()> {
    let one_filesystem = r.bool()?;
    if one_filesystem {
        // There is no migration; this says nothing of the other filesystems, nor of grace.
        return c.current().map(drop);
    }
    let id = c.client()?;
    let owner = {
        let mut table = c.shared.table();
        let client = table.client(id).ok_or(Nfs4Error::BadSession)?;
        if client.reclaim_complete {
            return Err(Nfs4Error::CompleteAlready);
        }
        client.owner.clone()
    };
    c.shared.options.records.add(&owner).map_err(|e| {
        tracing::error!("an NFS client cannot be written down, it can open nothing: {e}");
        Nfs4Error::Io
    })?;
    c.shared.table().reclaim_complete(id);
    Ok(())
}
