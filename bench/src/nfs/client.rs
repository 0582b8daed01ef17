//! A client of NFSv4.1 (RFC 8881) for load: one connection, one session, calls in as many slots as are wanted at once.
//!
//! It says what the kernel's client says for the same work, and does nothing else: no caches, no delegations.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use fs_layer::export::nfs4::bitmap::Bitmap;
use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::rpc::{self, Caller};
use fs_layer::export::nfs4::status::Nfs4Error;
use fs_layer::export::nfs4::xdr::{Reader, Writer};

/// Most calls at once.
pub const SLOTS: u32 = 32;
/// Most bytes that a READ or WRITE moves.
pub const IO_BYTES: u32 = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(60);
/// What GETATTR asks for, as the kernel's client does: type, change, size, fsid, fileid, mode, numlinks, owner, owner_group, rawdev,
/// space_used, time_access, time_metadata, time_modify, mounted_on_fileid.
const ATTRIBUTES: &[u32] = &[1, 3, 4, 8, 20, 33, 35, 36, 37, 41, 45, 47, 52, 53, 55];
/// In listings there are the handle and an entry's error besides.
const LISTED: &[u32] = &[1, 3, 4, 8, 11, 19, 20, 33, 35, 36, 37, 41, 45, 47, 52, 53, 55];

/// What the server calls a file.
pub type Handle = Vec<u8>;
/// An open file: its handle and the bytes of its stateid4.
pub type Open = (Handle, [u8; 16]);

/// Operations of a compound.
#[derive(Default)]
pub struct Ops {
    count: u32,
    arguments: Writer,
}

impl Ops {
    /// Beginning at the file with this handle.
    pub fn at(handle: &[u8]) -> Self {
        Self::default().add(op::PUTFH, |w| w.opaque(handle))
    }

    fn add(mut self, operation: u32, arguments: impl FnOnce(&mut Writer)) -> Self {
        self.count += 1;
        self.arguments.u32(operation);
        arguments(&mut self.arguments);
        self
    }

    fn getfh(self) -> Self {
        self.add(op::GETFH, |_| ())
    }

    fn getattr(self) -> Self {
        self.add(op::GETATTR, |w| Bitmap::of(ATTRIBUTES).write(w))
    }

    /// A name is looked for, and all is asked of what it names.
    pub fn lookup(self, name: &str) -> Self {
        self.add(op::LOOKUP, |w| w.opaque(name.as_bytes())).getfh().getattr()
    }

    /// A file is opened for reading and writing; created where it is not there, if wanted.
    pub fn open(self, name: &str, create: bool) -> Self {
        const READ_AND_WRITE: u32 = 3;
        const WANT_NO_DELEGATION: u32 = 0x400;
        const MODE: u32 = 33;
        let open = self.add(op::OPEN, |w| {
            w.u32(0);
            w.u32(READ_AND_WRITE | WANT_NO_DELEGATION);
            w.u32(0);
            w.u64(0);
            w.opaque(b"bench");
            w.u32(u32::from(create));
            if create {
                // UNCHECKED4
                w.u32(0);
                Bitmap::of(&[MODE]).write(w);
                w.opaque(&0o644u32.to_be_bytes());
            }
            // CLAIM_NULL
            w.u32(0);
            w.opaque(name.as_bytes());
        });
        open.getfh().getattr()
    }

    /// A directory is made.
    pub fn mkdir(self, name: &str) -> Self {
        const DIRECTORY: u32 = 2;
        let made = self.add(op::CREATE, |w| {
            w.u32(DIRECTORY);
            w.opaque(name.as_bytes());
            Bitmap::default().write(w);
            w.opaque(&[]);
        });
        made.getfh()
    }

    /// An open file is closed.
    pub fn close(self, stateid: &[u8; 16]) -> Self {
        self.add(op::CLOSE, |w| {
            w.u32(0);
            w.fixed(stateid);
        })
    }

    /// Bytes are written; durable with the answer, or with the next COMMIT.
    pub fn write(self, stateid: &[u8; 16], offset: u64, durable: bool, data: &[u8]) -> Self {
        self.add(op::WRITE, |w| {
            w.fixed(stateid);
            w.u64(offset);
            w.u32(if durable { 2 } else { 0 });
            w.opaque(data);
        })
    }

    /// All that was written is made durable.
    pub fn commit(self) -> Self {
        self.add(op::COMMIT, |w| {
            w.u64(0);
            w.u32(0);
        })
    }

    /// Bytes are read.
    pub fn read(self, stateid: &[u8; 16], offset: u64, bytes: u32) -> Self {
        self.add(op::READ, |w| {
            w.fixed(stateid);
            w.u64(offset);
            w.u32(bytes);
        })
    }

    fn readdir(self, cookie: u64, verifier: [u8; 8]) -> Self {
        const BYTES: u32 = 256 << 10;
        self.add(op::READDIR, |w| {
            w.u64(cookie);
            w.fixed(&verifier);
            w.u32(BYTES / 4);
            w.u32(BYTES);
            Bitmap::of(LISTED).write(w);
        })
    }
}

/// The results of a compound whose operations all succeeded.
pub struct Reply<'a>(Reader<'a>);

impl<'a> Reply<'a> {
    fn next(&mut self, operation: u32) -> Result<()> {
        let (found, status) = (self.0.u32().map_err(malformed)?, self.0.u32().map_err(malformed)?);
        ensure!((found, status) == (operation, 0), "operation {found} instead of {operation}, status {status}");
        Ok(())
    }

    fn take<T>(&mut self, f: impl FnOnce(&mut Reader<'a>) -> Result<T, Nfs4Error>) -> Result<T> {
        f(&mut self.0).map_err(malformed)
    }

    /// Of PUTFH, OPEN and GETFH.
    pub fn opened(mut self) -> Result<Open> {
        self.next(op::PUTFH)?;
        self.next(op::OPEN)?;
        let (stateid, delegation) = self.take(|r| {
            let stateid = r.fixed()?;
            // What became of the directory, and flags.
            r.fixed::<24>()?;
            Bitmap::read(r)?;
            Ok((stateid, r.u32()?))
        })?;
        match delegation {
            0 => (),
            // OPEN_DELEGATE_NONE_EXT; two of the reasons say more.
            3 => {
                if let 1 | 2 = self.take(Reader::u32)? {
                    self.take(Reader::u32)?;
                }
            }
            _ => bail!("a delegation that was not wanted"),
        }
        Ok((self.handle()?, stateid))
    }

    fn handle(&mut self) -> Result<Handle> {
        self.next(op::GETFH)?;
        self.take(|r| Ok(r.opaque(128)?.to_vec()))
    }

    /// Of PUTFH and READ: the bytes.
    pub fn data(mut self) -> Result<&'a [u8]> {
        self.next(op::PUTFH)?;
        self.next(op::READ)?;
        self.take(|r| {
            r.bool()?;
            r.opaque(IO_BYTES as usize)
        })
    }
}

fn malformed(error: Nfs4Error) -> anyhow::Error {
    anyhow!("a malformed reply: {error:?}")
}

/// A connection with a session of its own, of a client of its own.
pub struct Session {
    stream: TcpStream,
    client: u64,
    id: [u8; 16],
    /// The last sequence number of each slot.
    sequences: [u32; SLOTS as usize],
    xid: u32,
    received: Vec<u8>,
}

impl Session {
    /// Connects. `name` tells clients apart.
    pub fn connect(addr: SocketAddr, name: &str) -> Result<Self> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut session =
            Self { stream, client: 0, id: [0; 16], sequences: [0; SLOTS as usize], xid: 0, received: Vec::new() };
        let exchange = Ops::default().add(op::EXCHANGE_ID, |w| {
            w.u64(u64::from(std::process::id()) << 32 | rand::random::<u32>() as u64);
            w.opaque(name.as_bytes());
            (0..3).for_each(|_| w.u32(0));
        });
        let (client, sequence) = session.bare(&exchange, |mut reply| {
            reply.next(op::EXCHANGE_ID)?;
            reply.take(|r| Ok((r.u64()?, r.u32()?)))
        })?;
        session.client = client;
        let create = Ops::default().add(op::CREATE_SESSION, |w| {
            w.u64(client);
            w.u32(sequence);
            w.u32(0);
            for slots in [SLOTS, 1] {
                let message = IO_BYTES + 4096;
                [0, message, message, 8192, 16, slots, 0].iter().for_each(|word| w.u32(*word));
            }
            // The back channel's program and security: none.
            [0x4000_0000, 1, 0].iter().for_each(|word| w.u32(*word));
        });
        session.id = session.bare(&create, |mut reply| {
            reply.next(op::CREATE_SESSION)?;
            reply.take(Reader::fixed)
        })?;
        let nothing_to_reclaim = Ops::default().add(op::RECLAIM_COMPLETE, |w| w.bool(false));
        session.run(nothing_to_reclaim, |_| Ok(()))?;
        Ok(session)
    }

    /// The handle of the tree's root.
    pub fn root(&mut self) -> Result<Handle> {
        let root = Ops::default().add(op::PUTROOTFH, |_| ()).getfh();
        self.run(root, |mut reply| {
            reply.next(op::PUTROOTFH)?;
            reply.handle()
        })
    }

    /// Makes a directory.
    pub fn mkdir(&mut self, parent: &[u8], name: &str) -> Result<Handle> {
        self.run(Ops::at(parent).mkdir(name), |mut reply| {
            reply.next(op::PUTFH)?;
            reply.next(op::CREATE)?;
            reply.take(|r| {
                r.fixed::<20>()?;
                Bitmap::read(r)
            })?;
            reply.handle()
        })
    }

    /// Opens a file.
    pub fn open(&mut self, parent: &[u8], name: &str, create: bool) -> Result<Open> {
        self.run(Ops::at(parent).open(name, create), |reply| reply.opened())
    }

    /// Closes it.
    pub fn close(&mut self, file: &Open) -> Result<()> {
        self.run(Ops::at(&file.0).close(&file.1), |_| Ok(()))
    }

    /// Lists a directory with all attributes; returns the number of entries.
    pub fn list(&mut self, handle: &[u8]) -> Result<usize> {
        let (mut entries, mut cookie, mut verifier) = (0, 0, [0; 8]);
        loop {
            let ended = self.run(Ops::at(handle).readdir(cookie, verifier), |mut reply| {
                reply.next(op::PUTFH)?;
                reply.next(op::READDIR)?;
                reply.take(|r| {
                    verifier = r.fixed()?;
                    while r.bool()? {
                        cookie = r.u64()?;
                        r.opaque(255)?;
                        Bitmap::read(r)?;
                        r.opaque(4096)?;
                        entries += 1;
                    }
                    r.bool()
                })
            })?;
            if ended {
                return Ok(entries);
            }
        }
    }

    /// One compound.
    pub fn run<T>(&mut self, ops: Ops, then: impl FnOnce(Reply<'_>) -> Result<T>) -> Result<T> {
        self.send(0, &ops)?;
        self.receive()?;
        then(self.reply()?.1)
    }

    /// `count` compounds, `depth` at once, with what `ops` says; their results go to `then`, in the order in which they come.
    pub fn pipeline(
        &mut self,
        count: usize,
        depth: usize,
        mut ops: impl FnMut(usize) -> Ops,
        mut then: impl FnMut(usize, Reply<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut calls = [0; SLOTS as usize];
        let mut free: Vec<u32> = (0..SLOTS.min(depth as u32)).collect();
        let (mut sent, mut done) = (0, 0);
        while done < count {
            while sent < count
                && let Some(slot) = free.pop()
            {
                calls[slot as usize] = sent;
                self.send(slot, &ops(sent))?;
                sent += 1;
            }
            self.receive()?;
            let (slot, reply) = self.reply()?;
            then(calls[slot as usize], reply)?;
            free.push(slot);
            done += 1;
        }
        Ok(())
    }

    fn send(&mut self, slot: u32, ops: &Ops) -> Result<()> {
        let sequence = &mut self.sequences[slot as usize];
        *sequence += 1;
        let sequenced = Ops::default().add(op::SEQUENCE, |w| {
            w.fixed(&self.id);
            w.u32(*sequence);
            w.u32(slot);
            w.u32(SLOTS - 1);
            w.bool(false);
        });
        self.send_all(&[&sequenced, ops])
    }

    fn bare<T>(&mut self, ops: &Ops, then: impl FnOnce(Reply<'_>) -> Result<T>) -> Result<T> {
        self.send_all(&[ops])?;
        self.receive()?;
        then(Reply(compound(&self.received)?))
    }

    fn send_all(&mut self, parts: &[&Ops]) -> Result<()> {
        self.xid = self.xid.wrapping_add(1);
        let root = Caller::Unix { uid: 0, gid: 0, groups: Vec::new() };
        let mut head = rpc::call(self.xid, rpc::NFS_PROGRAM, 4, 1, &root);
        head.opaque(b"");
        head.u32(1);
        head.u32(parts.iter().map(|ops| ops.count).sum());
        let len = head.len() + parts.iter().map(|ops| ops.arguments.len()).sum::<usize>();
        let mut record = Vec::with_capacity(4 + len);
        record.extend_from_slice(&(len as u32 | rpc::LAST_FRAGMENT).to_be_bytes());
        record.extend_from_slice(head.as_bytes());
        parts.iter().for_each(|ops| record.extend_from_slice(ops.arguments.as_bytes()));
        self.stream.write_all(&record).context("cannot send")
    }

    fn receive(&mut self) -> Result<()> {
        self.received.clear();
        loop {
            let mut mark = [0; 4];
            self.stream.read_exact(&mut mark).context("no answer")?;
            let mark = u32::from_be_bytes(mark);
            let bytes = u64::from(mark & !rpc::LAST_FRAGMENT);
            let got = io::copy(&mut (&mut self.stream).take(bytes), &mut self.received)?;
            ensure!(got == bytes, "the connection ended within an answer");
            if mark & rpc::LAST_FRAGMENT != 0 {
                return Ok(());
            }
        }
    }

    /// What came last: the slot, and what follows the result of SEQUENCE.
    fn reply(&self) -> Result<(u32, Reply<'_>)> {
        let mut reply = Reply(compound(&self.received)?);
        reply.next(op::SEQUENCE)?;
        let slot = reply.take(|r| {
            let (_, _, slot): ([u8; 16], u32, u32) = (r.fixed()?, r.u32()?, r.u32()?);
            // The highest slots, and flags.
            r.fixed::<12>()?;
            Ok(slot)
        })?;
        ensure!(slot < SLOTS, "an answer for slot {slot}");
        Ok((slot, reply))
    }
}

impl Drop for Session {
    /// Or a server that starts again would wait for what this client wants to have back.
    fn drop(&mut self) {
        let session = Ops::default().add(op::DESTROY_SESSION, |w| w.fixed(&self.id));
        let client = Ops::default().add(op::DESTROY_CLIENTID, |w| w.u64(self.client));
        let ended = self.bare(&session, |_| Ok(())).and_then(|()| self.bare(&client, |_| Ok(())));
        if let Err(error) = ended {
            eprintln!("a client could not end in order: {error:#}");
        }
    }
}

/// The results in a record.
fn compound(record: &[u8]) -> Result<Reader<'_>> {
    let mut r = Reader::new(record);
    let words = (0..6).map(|_| r.u32()).collect::<Result<Vec<_>, _>>().map_err(malformed)?;
    // Reply, accepted, a verifier of no bytes, success.
    ensure!(words[1..] == [1, 0, 0, 0, 0], "the call was refused: {:?}", &words[1..]);
    let status = r.u32().map_err(malformed)?;
    ensure!(status == 0, "the server says {:?} ({status})", Nfs4Error::from_code(status));
    r.opaque(1024).map_err(malformed)?;
    r.u32().map_err(malformed)?;
    Ok(r)
}
