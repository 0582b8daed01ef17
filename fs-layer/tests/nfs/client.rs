//! A client of NFSv4.1 that says exactly what a test wants said, to a server in the same process.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use fs_layer::export::nfs4::bitmap::Bitmap;
use fs_layer::export::nfs4::connection::{self, Connection};
use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::rpc::{self, Caller};
use fs_layer::export::nfs4::state::session::SessionId;
use fs_layer::export::nfs4::state::stateid::{ANONYMOUS, Stateid};
use fs_layer::export::nfs4::status::Nfs4Error;
use fs_layer::export::nfs4::xdr::{Reader, Writer};
use fs_layer::export::nfs4::{MemoryRecords, NfsOptions, Shared};
use fs_layer::vfs::Vfs;
use fs_layer::vfs::memory::MemoryVfs;

/// A tree in memory with what outlives a server.
pub struct World {
    pub vfs: Arc<MemoryVfs>,
    pub records: Arc<MemoryRecords>,
    pub lease: Duration,
    pub grace: Duration,
    pub read_only: bool,
}

impl World {
    pub fn new() -> World {
        World {
            vfs: Arc::default(),
            records: Arc::default(),
            lease: Duration::from_secs(600),
            grace: Duration::from_secs(600),
            read_only: false,
        }
    }

    /// Starts a server.
    pub fn serve(&self) -> Arc<Shared> {
        let mut options = NfsOptions::new(self.records.clone());
        options.lease = self.lease;
        options.grace = self.grace;
        options.export.root_squash = false;
        options.export.read_only = self.read_only;
        Arc::new(Shared::new(self.vfs.clone() as Arc<dyn Vfs>, options).unwrap())
    }

    /// The old server ends, and another one starts.
    pub fn restart(&self, old: Arc<Shared>) -> Arc<Shared> {
        let gone = old.table().clear();
        gone.go(&*self.vfs);
        self.serve()
    }
}

/// Operations of a compound.
#[derive(Clone, Default)]
pub struct Ops {
    pub count: u32,
    pub w: Writer,
}

impl Ops {
    pub fn add(mut self, operation: u32, arguments: impl FnOnce(&mut Writer)) -> Ops {
        self.count += 1;
        self.w.u32(operation);
        arguments(&mut self.w);
        self
    }

    pub fn root() -> Ops {
        Ops::default().add(op::PUTROOTFH, |_| ())
    }

    pub fn at(handle: &[u8]) -> Ops {
        Ops::default().add(op::PUTFH, |w| w.opaque(handle))
    }

    pub fn lookup(self, name: &[u8]) -> Ops {
        self.add(op::LOOKUP, |w| w.opaque(name))
    }

    pub fn getfh(self) -> Ops {
        self.add(op::GETFH, |_| ())
    }

    pub fn getattr(self, asked: &[u32]) -> Ops {
        self.add(op::GETATTR, |w| Bitmap::of(asked).write(w))
    }

    pub fn open(self, owner: &[u8], name: &[u8], access: u32, deny: u32) -> Ops {
        self.open_with(owner, access, deny, |w| {
            w.u32(0);
            w.u32(0);
            w.opaque(name);
        })
    }

    pub fn create(self, owner: &[u8], name: &[u8]) -> Ops {
        self.open_with(owner, 3, 0, |w| {
            w.u32(1);
            w.u32(0);
            Bitmap::default().write(w);
            w.opaque(&[]);
            w.u32(0);
            w.opaque(name);
        })
    }

    /// `rest` is openhow4 and the claim.
    pub fn open_with(self, owner: &[u8], access: u32, deny: u32, rest: impl FnOnce(&mut Writer)) -> Ops {
        self.add(op::OPEN, |w| {
            w.u32(0);
            w.u32(access);
            w.u32(deny);
            w.u64(0);
            w.opaque(owner);
            rest(w);
        })
    }

    pub fn reclaim(self, owner: &[u8], access: u32) -> Ops {
        self.open_with(owner, access, 0, |w| {
            w.u32(0);
            w.u32(1);
            w.u32(0);
        })
    }

    pub fn close(self, stateid: Stateid) -> Ops {
        self.add(op::CLOSE, |w| {
            w.u32(0);
            stateid.write(w);
        })
    }

    pub fn read(self, stateid: Stateid, offset: u64, count: u32) -> Ops {
        self.add(op::READ, |w| {
            stateid.write(w);
            w.u64(offset);
            w.u32(count);
        })
    }

    pub fn write(self, stateid: Stateid, offset: u64, stable: u32, data: &[u8]) -> Ops {
        self.add(op::WRITE, |w| {
            stateid.write(w);
            w.u64(offset);
            w.u32(stable);
            w.opaque(data);
        })
    }

    pub fn commit(self) -> Ops {
        self.add(op::COMMIT, |w| {
            w.u64(0);
            w.u32(0);
        })
    }

    pub fn remove(self, name: &[u8]) -> Ops {
        self.add(op::REMOVE, |w| w.opaque(name))
    }

    pub fn mkdir(self, name: &[u8]) -> Ops {
        self.add(op::CREATE, |w| {
            w.u32(2);
            w.opaque(name);
            Bitmap::default().write(w);
            w.opaque(&[]);
        })
    }

    pub fn readdir(self, cookie: u64, max: u32, asked: &[u32]) -> Ops {
        self.add(op::READDIR, |w| {
            w.u64(cookie);
            w.u64(0);
            w.u32(max);
            w.u32(max);
            Bitmap::of(asked).write(w);
        })
    }

    /// LOCK by an owner that is new to the file.
    pub fn lock_new(self, open: Stateid, owner: &[u8], kind: u32, offset: u64, length: u64, reclaim: bool) -> Ops {
        self.add(op::LOCK, |w| {
            w.u32(kind);
            w.bool(reclaim);
            w.u64(offset);
            w.u64(length);
            w.bool(true);
            w.u32(0);
            open.write(w);
            w.u32(0);
            w.u64(0);
            w.opaque(owner);
        })
    }

    pub fn unlock(self, lock: Stateid, offset: u64, length: u64) -> Ops {
        self.add(op::LOCKU, |w| {
            w.u32(1);
            w.u32(0);
            lock.write(w);
            w.u64(offset);
            w.u64(length);
        })
    }

    pub fn setattr_size(self, stateid: Stateid, size: u64) -> Ops {
        self.add(op::SETATTR, |w| {
            stateid.write(w);
            Bitmap::of(&[4]).write(w);
            w.opaque(&size.to_be_bytes());
        })
    }

    pub fn seek(self, stateid: Stateid, offset: u64, what: u32) -> Ops {
        self.add(op::SEEK, |w| {
            stateid.write(w);
            w.u64(offset);
            w.u32(what);
        })
    }

    pub fn reclaim_complete(self, one_filesystem: bool) -> Ops {
        self.add(op::RECLAIM_COMPLETE, |w| w.bool(one_filesystem))
    }
}

/// What a compound answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub status: u32,
    pub count: u32,
    pub body: Vec<u8>,
    at: usize,
}

impl Reply {
    fn parse(results: &[u8]) -> Reply {
        let mut r = Reader::new(results);
        let status = r.u32().unwrap();
        r.opaque(1024).unwrap();
        let count = r.u32().unwrap();
        Reply { status, count, body: r.rest().to_vec(), at: 0 }
    }

    /// The status as an error.
    pub fn error(&self) -> Option<Nfs4Error> {
        (self.status != 0).then(|| Nfs4Error::from_code(self.status).expect("a known status"))
    }

    /// Reads on with `f`.
    pub fn take<T>(&mut self, f: impl FnOnce(&mut Reader<'_>) -> Result<T, Nfs4Error>) -> T {
        let mut r = Reader::new(&self.body[self.at..]);
        let value = f(&mut r).unwrap();
        self.at = self.body.len() - r.rest().len();
        value
    }

    /// The next result is that of a successful operation; its body follows.
    #[track_caller]
    pub fn ok(&mut self, operation: u32) -> &mut Reply {
        let (found, status) = self.take(|r| Ok((r.u32()?, r.u32()?)));
        assert_eq!((found, status), (operation, 0), "status {:?}", Nfs4Error::from_code(status));
        self
    }

    /// The next result is that of an operation that failed so.
    #[track_caller]
    pub fn fails(&mut self, operation: u32, error: Nfs4Error) -> &mut Reply {
        let (found, status) = self.take(|r| Ok((r.u32()?, r.u32()?)));
        assert_eq!((found, Nfs4Error::from_code(status)), (operation, Some(error)));
        assert_eq!(self.status, status);
        self
    }

    pub fn stateid(&mut self) -> Stateid {
        self.take(Stateid::read)
    }

    pub fn handle(&mut self) -> Vec<u8> {
        self.take(|r| Ok(r.opaque(128)?.to_vec()))
    }

    /// The body of a successful OPEN.
    pub fn opened(&mut self) -> (Stateid, u32) {
        self.take(|r| {
            let stateid = Stateid::read(r)?;
            r.u32()?;
            r.u64()?;
            r.u64()?;
            let flags = r.u32()?;
            Bitmap::read(r)?;
            assert_eq!(r.u32()?, 0, "a delegation");
            Ok((stateid, flags))
        })
    }

    /// The values of a fattr4, as they stand on the wire.
    pub fn attributes(&mut self) -> (Bitmap, Vec<u8>) {
        self.take(|r| Ok((Bitmap::read(r)?, r.opaque(1 << 20)?.to_vec())))
    }

    /// An attribute of eight bytes that was asked for alone.
    pub fn attribute_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.attributes().1.try_into().unwrap())
    }
}

/// A client with a session.
pub struct Client {
    pub shared: Arc<Shared>,
    pub connection: Arc<Connection>,
    pub calls: Receiver<Vec<u8>>,
    pub caller: Caller,
    pub name: Vec<u8>,
    pub verifier: u64,
    pub id: u64,
    pub session: SessionId,
    pub sequences: Vec<u32>,
    pub minor: u32,
    pub keep: bool,
    xid: u32,
}

pub const ROOT_USER: Caller = Caller::Unix { uid: 0, gid: 0, groups: Vec::new() };

impl Client {
    /// A connection, no more.
    pub fn strange(shared: &Arc<Shared>, name: &[u8]) -> Client {
        let (connection, calls) = connection::detached("127.0.0.1".parse().unwrap());
        Client {
            shared: shared.clone(),
            connection,
            calls,
            caller: ROOT_USER,
            name: name.to_vec(),
            verifier: 1,
            id: 0,
            session: [0; 16],
            sequences: Vec::new(),
            minor: 2,
            keep: false,
            xid: 1,
        }
    }

    /// One with a session that may open what it wants.
    pub fn new(shared: &Arc<Shared>, name: &[u8]) -> Client {
        let mut client = Client::with_session(shared, name);
        client.run(Ops::default().reclaim_complete(false)).ok(op::SEQUENCE);
        client
    }

    /// One that did not say yet that it reclaims nothing.
    pub fn with_session(shared: &Arc<Shared>, name: &[u8]) -> Client {
        let mut client = Client::strange(shared, name);
        client.establish();
        client
    }

    pub fn establish(&mut self) {
        let (id, sequence, _) = self.exchange(0).unwrap();
        self.id = id;
        self.create_session(sequence).unwrap();
    }

    /// EXCHANGE_ID: client, sequence, flags.
    pub fn exchange(&mut self, flags: u32) -> Result<(u64, u32, u32), Nfs4Error> {
        let ops = Ops::default().add(op::EXCHANGE_ID, |w| {
            w.u64(self.verifier);
            w.opaque(&self.name);
            w.u32(flags);
            w.u32(0);
            w.u32(0);
        });
        let mut reply = self.bare(&ops);
        match reply.error() {
            Some(e) => Err(e),
            None => Ok(reply.ok(op::EXCHANGE_ID).take(|r| Ok((r.u64()?, r.u32()?, r.u32()?)))),
        }
    }

    pub fn create_session_ops(&self, sequence: u32) -> Ops {
        Ops::default().add(op::CREATE_SESSION, |w| {
            w.u64(self.id);
            w.u32(sequence);
            w.u32(2);
            for _ in 0..2 {
                for word in [0, 1 << 20, 1 << 20, 4096, 16, 8, 0] {
                    w.u32(word);
                }
            }
            w.u32(0x4000_0000);
            w.u32(1);
            w.u32(0);
        })
    }

    pub fn create_session(&mut self, sequence: u32) -> Result<Reply, Nfs4Error> {
        let mut reply = self.bare(&self.create_session_ops(sequence));
        let whole = reply.clone();
        match reply.error() {
            Some(e) => Err(e),
            None => {
                self.session = reply.ok(op::CREATE_SESSION).take(|r| r.fixed());
                self.sequences = vec![0; 8];
                Ok(whole)
            }
        }
    }

    /// A compound as it is.
    pub fn bare(&mut self, ops: &Ops) -> Reply {
        Reply::parse(&self.arguments(&self.compound(ops)).expect("a compound is answered"))
    }

    pub fn compound(&self, ops: &Ops) -> Vec<u8> {
        let mut w = Writer::default();
        w.opaque(b"tag");
        w.u32(self.minor);
        w.u32(ops.count);
        w.raw(ops.w.as_bytes());
        w.into_bytes()
    }

    /// Calls with these arguments; what follows the reply's header, if it says success.
    pub fn arguments(&mut self, arguments: &[u8]) -> Option<Vec<u8>> {
        self.xid += 1;
        let mut record = rpc::call(self.xid, rpc::NFS_PROGRAM, 4, 1, &self.caller);
        record.raw(arguments);
        let reply = connection::answer(&self.shared, &self.connection, record.as_bytes())?.into_bytes();
        let mut r = Reader::new(&reply);
        assert_eq!((r.u32().unwrap(), r.u32().unwrap()), (self.xid, 1));
        let words: Vec<u32> = (0..4).map(|_| r.u32().unwrap_or(99)).collect();
        (words == [0, 0, 0, 0]).then(|| r.rest().to_vec())
    }

    /// SEQUENCE in a slot, then these.
    pub fn sequenced(&self, slot: u32, sequence: u32, ops: &Ops) -> Ops {
        let mut all = Ops::default().add(op::SEQUENCE, |w| {
            w.fixed(&self.session);
            w.u32(sequence);
            w.u32(slot);
            w.u32(0);
            w.bool(self.keep);
        });
        all.count += ops.count;
        all.w.raw(ops.w.as_bytes());
        all
    }

    /// The reply from SEQUENCE's result on, which is not read.
    pub fn run(&mut self, ops: Ops) -> Reply {
        self.sequences[0] += 1;
        let all = self.sequenced(0, self.sequences[0], &ops);
        self.bare(&all)
    }

    /// The reply behind the result of SEQUENCE, which succeeds.
    #[track_caller]
    pub fn go(&mut self, ops: Ops) -> Reply {
        let mut reply = self.run(ops);
        reply.ok(op::SEQUENCE).take(|r| {
            r.fixed::<16>()?;
            (0..5).try_for_each(|_| r.u32().map(drop))
        });
        reply
    }

    /// Creates a file in the root and opens it for everything: state and handle.
    pub fn create(&mut self, owner: &[u8], name: &[u8]) -> (Stateid, Vec<u8>) {
        let mut reply = self.go(Ops::root().create(owner, name).getfh());
        let (stateid, _) = reply.ok(op::PUTROOTFH).ok(op::OPEN).opened();
        (stateid, reply.ok(op::GETFH).handle())
    }

    /// Opens a file by name.
    pub fn open(&mut self, owner: &[u8], name: &[u8], access: u32, deny: u32) -> Result<Stateid, Nfs4Error> {
        let mut reply = self.go(Ops::root().open(owner, name, access, deny));
        match reply.error() {
            Some(e) => Err(e),
            None => Ok(reply.ok(op::PUTROOTFH).ok(op::OPEN).opened().0),
        }
    }

    /// The status of operations.
    #[track_caller]
    pub fn status(&mut self, ops: Ops) -> Result<(), Nfs4Error> {
        self.go(ops).error().map_or(Ok(()), Err)
    }

    pub fn write_all(&mut self, handle: &[u8], data: &[u8]) {
        self.status(Ops::at(handle).write(ANONYMOUS, 0, 2, data)).unwrap();
    }
}
