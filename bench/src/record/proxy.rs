//! Between client and server. It follows clients that use simple replies, as the kernel's does.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, Result};
use blockd::export::nbd::proto::{
    Greeting, OptionHeader, OptionReply, Request, SIMPLE_REPLY_MAGIC, SimpleReply, command, command_flag, option,
    option_reply,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::log::{self, Event};

type Recording = Arc<Mutex<BufWriter<File>>>;
/// Requests that are not answered: what to note when they are, and how many bytes the answer brings.
type Pending = Arc<Mutex<HashMap<u64, (Vec<Event>, usize)>>>;

/// Records into `file` what goes to `upstream`, for ever. Writes its two addresses, for NBD clients and for marks, to
/// `addresses`, one a line.
///
/// # Errors
/// It cannot begin.
pub fn run(upstream: &str, file: &Path, addresses: &Path) -> Result<()> {
    let recording = File::create(file).with_context(|| format!("cannot create {}", file.display()))?;
    let recording: Recording = Arc::new(Mutex::new(BufWriter::new(recording)));
    let clients = TcpListener::bind("127.0.0.1:0")?;
    let marks = TcpListener::bind("127.0.0.1:0")?;
    let temporary = addresses.with_extension("new");
    std::fs::write(&temporary, format!("{}\n{}\n", clients.local_addr()?, marks.local_addr()?))?;
    std::fs::rename(&temporary, addresses)?;
    let of_marks = recording.clone();
    thread::spawn(move || {
        for stream in marks.incoming().flatten() {
            let recording = of_marks.clone();
            thread::spawn(move || report("marks", take_marks(stream, &recording)));
        }
    });
    for client in clients.incoming() {
        let (client, recording, upstream) = (client?, recording.clone(), upstream.to_owned());
        thread::spawn(move || report("client", serve(client, &upstream, &recording)));
    }
    Ok(())
}

fn report(who: &str, result: io::Result<()>) {
    if let Err(error) = result {
        eprintln!("nbd-record: {who}: {error}");
    }
}

fn note(recording: &Recording, events: &[Event]) -> io::Result<()> {
    let mut recording = recording.lock().expect("nobody panics with the recording");
    events.iter().try_for_each(|event| log::put(&mut *recording, event))?;
    // What was answered is on file before the answer goes out, however we end.
    recording.flush()
}

/// Notes each line, then answers it: whoever waits for the answer knows the mark's place.
fn take_marks(stream: TcpStream, recording: &Recording) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut out = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        note(recording, &[Event::Mark(line?)])?;
        out.write_all(b"ok\n")?;
    }
    Ok(())
}

fn read<T: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned>(from: &mut impl Read) -> io::Result<T> {
    let mut value = T::new_zeroed();
    from.read_exact(value.as_mut_bytes())?;
    Ok(value)
}

fn bytes(from: &mut impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn serve(mut client: TcpStream, upstream: &str, recording: &Recording) -> io::Result<()> {
    let mut server = TcpStream::connect(upstream)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    if !negotiate(&mut client, &mut server)? {
        return Ok(());
    }
    let pending = Pending::default();
    let (their_pending, recording) = (pending.clone(), recording.clone());
    let (to_client, from_server) = (client.try_clone()?, server.try_clone()?);
    let answers = thread::spawn(move || {
        // However it ends, the other direction ends with it.
        let result = pass_answers(from_server, &to_client, &their_pending, &recording);
        let _ = to_client.shutdown(std::net::Shutdown::Both);
        result
    });
    let requests = pass_requests(&client, &server, &pending);
    let _ = server.shutdown(std::net::Shutdown::Both);
    let answers = answers.join().expect("the other direction does not panic");
    // The end of a connection is no news; a message that is not understood is.
    let news = |result: io::Result<()>| result.err().filter(|error| error.kind() == io::ErrorKind::InvalidData);
    news(requests).or(news(answers)).map_or(Ok(()), Err)
}

/// Passes the negotiation on; whether it came to the transmission phase.
fn negotiate(client: &mut TcpStream, server: &mut TcpStream) -> io::Result<bool> {
    client.write_all(read::<Greeting>(server)?.as_bytes())?;
    server.write_all(&bytes(client, 4)?)?;
    loop {
        let header = match read::<OptionHeader>(client) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            other => other?,
        };
        let data = bytes(client, header.len.get() as usize)?;
        server.write_all(&[header.as_bytes(), &data].concat())?;
        loop {
            let reply: OptionReply = read(server)?;
            let data = bytes(server, reply.len.get() as usize)?;
            client.write_all(&[reply.as_bytes(), &data].concat())?;
            match (reply.kind.get(), header.option.get()) {
                (option_reply::ACK, option::GO) => return Ok(true),
                (option_reply::ACK, option::ABORT) => return Ok(false),
                (option_reply::ACK, _) => break,
                (kind, _) if kind >> 31 == 1 => break,
                _ => {}
            }
        }
    }
}

fn pass_requests(client: &TcpStream, mut server: &TcpStream, pending: &Pending) -> io::Result<()> {
    let mut client = BufReader::with_capacity(1 << 20, client);
    loop {
        let request: Request = read(&mut client)?;
        let (offset, len) = (request.offset.get(), request.len.get());
        let mut events = Vec::new();
        let mut payload = Vec::new();
        match request.command.get() {
            command::WRITE => {
                payload = bytes(&mut client, len as usize)?;
                events.push(Event::Write { offset, data: payload.clone() });
            }
            command::WRITE_ZEROES | command::TRIM => events.push(Event::Zero { offset, len: len.into() }),
            command::FLUSH => events.push(Event::Flush),
            _ => {}
        }
        // Not all before it is durable then, but a power cut may leave it all.
        if request.flags.get() & command_flag::FUA != 0 && !events.is_empty() {
            events.push(Event::Flush);
        }
        let answer = if request.command.get() == command::READ { len as usize } else { 0 };
        pending.lock().expect("nobody panics with it").insert(request.cookie.get(), (events, answer));
        server.write_all(&[request.as_bytes(), &payload].concat())?;
    }
}

fn pass_answers(server: TcpStream, mut client: &TcpStream, pending: &Pending, recording: &Recording) -> io::Result<()> {
    let mut server = BufReader::with_capacity(1 << 20, server);
    let broken = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    loop {
        let reply: SimpleReply = read(&mut server)?;
        if reply.magic.get() != SIMPLE_REPLY_MAGIC {
            return Err(broken("an answer that is not a simple reply"));
        }
        let request = pending.lock().expect("nobody panics with it").remove(&reply.cookie.get());
        let (events, len) = request.ok_or_else(|| broken("an answer to nothing"))?;
        let mut data = Vec::new();
        if reply.error.get() == 0 {
            data = bytes(&mut server, len)?;
            if !events.is_empty() {
                note(recording, &events)?;
            }
        }
        client.write_all(&[reply.as_bytes(), &data].concat())?;
    }
}
