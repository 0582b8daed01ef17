//! Remote procedure calls (RFC 5531): what stands before the arguments of a call and before the results of a reply, and the record
//! marks of TCP (section 11).

use super::status::Status;
use super::xdr::{Reader, Writer};

/// The program NFS.
pub const NFS_PROGRAM: u32 = 100_003;
/// Credentials that say nothing.
pub const AUTH_NONE: u32 = 0;
/// Credentials as in UNIX: a user and groups, believed.
pub const AUTH_SYS: u32 = 1;
/// Most groups that AUTH_SYS carries.
pub const AUTH_SYS_GROUPS_MAX: usize = 16;
/// Set in the mark of the last fragment of a record.
pub const LAST_FRAGMENT: u32 = 1 << 31;

const CALL: u32 = 0;
const REPLY: u32 = 1;
const RPC_VERSION: u32 = 2;
/// Most bytes in the body of credentials (RFC 5531 section 8.2).
const AUTH_BODY_MAX: usize = 400;

/// Who calls, by the call's own word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// AUTH_NONE.
    Nobody,
    /// AUTH_SYS.
    Unix {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// Further groups.
        groups: Vec<u32>,
    },
    /// Another flavour of credentials.
    Unknown,
}

/// What came in a record.
#[derive(Debug)]
pub enum Message<'a> {
    /// A call.
    Call(Call<'a>),
    /// A reply to a call of the server's.
    Reply {
        /// Of which call.
        xid: u32,
        /// From the reply's state on.
        body: &'a [u8],
    },
}

/// A call.
#[derive(Debug)]
pub struct Call<'a> {
    /// The caller's number for it.
    pub xid: u32,
    /// Version of the protocol for remote calls.
    pub rpc_version: u32,
    /// Which program is called.
    pub program: u32,
    /// In which version.
    pub version: u32,
    /// Which procedure.
    pub procedure: u32,
    /// By whom.
    pub caller: Caller,
    /// Its arguments.
    pub arguments: &'a [u8],
}

impl<'a> Message<'a> {
    /// Takes a record apart.
    ///
    /// # Errors
    /// It is no such message; there is nothing to answer.
    pub fn parse(record: &'a [u8]) -> Status<Message<'a>> {
        let mut r = Reader::new(record);
        let xid = r.u32()?;
        match r.u32()? {
            CALL => {}
            REPLY => return Ok(Message::Reply { xid, body: r.rest() }),
            _ => return Err(super::status::Nfs4Error::BadXdr),
        }
        let rpc_version = r.u32()?;
        let (program, version, procedure) = (r.u32()?, r.u32()?, r.u32()?);
        let caller = caller(r.u32()?, r.opaque(AUTH_BODY_MAX)?)?;
        r.u32()?;
        r.opaque(AUTH_BODY_MAX)?;
        Ok(Message::Call(Call { xid, rpc_version, program, version, procedure, caller, arguments: r.rest() }))
    }
}

impl Call<'_> {
    /// Whether the version of remote calls is the one there is.
    pub fn is_rpc_2(&self) -> bool {
        self.rpc_version == RPC_VERSION
    }
}

fn caller(flavour: u32, body: &[u8]) -> Status<Caller> {
    match flavour {
        AUTH_NONE => Ok(Caller::Nobody),
        AUTH_SYS => {
            let mut r = Reader::new(body);
            r.u32()?;
            r.opaque(255)?;
            let (uid, gid) = (r.u32()?, r.u32()?);
            let groups = (0..r.count(AUTH_SYS_GROUPS_MAX)?).map(|_| r.u32()).collect::<Status<_>>()?;
            Ok(Caller::Unix { uid, gid, groups })
        }
        _ => Ok(Caller::Unknown),
    }
}

/// How the server answers a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Results follow.
    Success,
    /// The program is not here.
    NoProgram,
    /// The program is here in these versions only.
    OtherVersions(u32, u32),
    /// The procedure is not in the program.
    NoProcedure,
    /// The arguments cannot be decoded.
    Garbage,
    /// SYSTEM_ERR: the server could not run it.
    SystemError,
    /// The version of remote calls is not 2.
    OtherRpc,
    /// AUTH_TOOWEAK: the caller may not call.
    TooWeak,
    /// AUTH_BADCRED: this flavour of credentials is not understood.
    BadCredentials,
}

/// The beginning of the reply to `xid`; with [`Answer::Success`] the results come next.
pub fn reply(xid: u32, answer: Answer) -> Writer {
    let mut w = Writer::default();
    w.u32(xid);
    w.u32(REPLY);
    let denied = matches!(answer, Answer::OtherRpc | Answer::TooWeak | Answer::BadCredentials);
    w.u32(u32::from(denied));
    if !denied {
        w.u32(AUTH_NONE);
        w.opaque(&[]);
    }
    match answer {
        Answer::Success => w.u32(0),
        Answer::NoProgram => w.u32(1),
        Answer::OtherVersions(low, high) => {
            w.u32(2);
            w.u32(low);
            w.u32(high);
        }
        Answer::NoProcedure => w.u32(3),
        Answer::Garbage => w.u32(4),
        Answer::SystemError => w.u32(5),
        Answer::OtherRpc => {
            w.u32(0);
            w.u32(RPC_VERSION);
            w.u32(RPC_VERSION);
        }
        Answer::TooWeak => {
            w.u32(1);
            w.u32(5);
        }
        Answer::BadCredentials => {
            w.u32(1);
            w.u32(1);
        }
    }
    w
}

/// A call of the server's (the back channel), as user 0 of AUTH_SYS or without credentials.
pub fn call(xid: u32, program: u32, version: u32, procedure: u32, caller: &Caller) -> Writer {
    let mut w = Writer::default();
    for word in [xid, CALL, RPC_VERSION, program, version, procedure] {
        w.u32(word);
    }
    match caller {
        Caller::Unix { uid, gid, groups } => {
            let mut body = Writer::default();
            body.u32(0);
            body.opaque(b"");
            body.u32(*uid);
            body.u32(*gid);
            body.u32(groups.len() as u32);
            groups.iter().for_each(|group| body.u32(*group));
            w.u32(AUTH_SYS);
            w.opaque(body.as_bytes());
        }
        _ => {
            w.u32(AUTH_NONE);
            w.opaque(b"");
        }
    }
    w.u32(AUTH_NONE);
    w.opaque(b"");
    w
}

/// The answer to a record whose call could not be run; `None` if it was none.
pub fn system_error(record: &[u8]) -> Option<Writer> {
    match Message::parse(record) {
        Ok(Message::Call(call)) => Some(reply(call.xid, Answer::SystemError)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_read_back() {
        let unix = Caller::Unix { uid: 5, gid: 6, groups: vec![7, 8] };
        let mut w = call(9, NFS_PROGRAM, 4, 1, &unix);
        w.u32(77);
        let Message::Call(call) = Message::parse(w.as_bytes()).unwrap() else { panic!("no call") };
        assert!(call.is_rpc_2());
        assert_eq!((call.xid, call.program, call.version, call.procedure), (9, NFS_PROGRAM, 4, 1));
        assert_eq!(call.caller, unix);
        assert_eq!(call.arguments, 77u32.to_be_bytes());
    }

    #[test]
    fn too_many_groups_are_refused() {
        let unix = Caller::Unix { uid: 5, gid: 6, groups: vec![7; 17] };
        assert!(Message::parse(call(9, NFS_PROGRAM, 4, 1, &unix).as_bytes()).is_err());
    }
}
