use super::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

const SIZE: u64 = 1 << 20;

/// Serves one connection: negotiates, then hands the stream to `serve`.
fn server(serve: impl FnOnce(&mut UnixStream) + Send + 'static) -> (tempfile::TempDir, thread::JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        stream.write_all(proto::Greeting::new(flags).as_bytes()).unwrap();
        stream.read_exact(&mut [0; 4]).unwrap();
        loop {
            let mut head = [0; proto::OptionHeader::SIZE];
            stream.read_exact(&mut head).unwrap();
            let (head, _) = proto::take::<proto::OptionHeader>(&head).unwrap();
            head.check().unwrap();
            let mut data = vec![0; head.len.get() as usize];
            stream.read_exact(&mut data).unwrap();
            let mut reply = |kind: u32, data: &[u8]| {
                let head = proto::OptionReply::new(head.option.get(), kind, data.len() as u32);
                stream.write_all(head.as_bytes()).unwrap();
                stream.write_all(data).unwrap();
            };
            match head.option.get() {
                option::STRUCTURED_REPLY => reply(option_reply::ACK, &[]),
                option::SET_META_CONTEXT => {
                    let context = proto::encode_meta_context(3, proto::BASE_ALLOCATION);
                    reply(option_reply::META_CONTEXT, &context);
                    reply(option_reply::ACK, &[]);
                }
                option::GO => {
                    if proto::InfoQuery::decode(&data).unwrap().name != "vol" {
                        reply(option_reply::ERR_UNKNOWN, b"try another");
                        return;
                    }
                    let export = proto::InfoExport {
                        kind: info::EXPORT.into(),
                        size: SIZE.into(),
                        flags: proto::transmission::HAS_FLAGS.into(),
                    };
                    reply(option_reply::INFO, export.as_bytes());
                    reply(option_reply::ACK, &[]);
                    break;
                }
                option::LIST => {
                    for (name, details) in [("vol", ""), ("vol@a", "made today")] {
                        let mut data = Vec::new();
                        proto::put_string(&mut data, name);
                        data.extend_from_slice(details.as_bytes());
                        reply(option_reply::SERVER, &data);
                    }
                    reply(option_reply::ACK, &[]);
                    return;
                }
                _ => reply(option_reply::ERR_UNSUP, &[]),
            }
        }
        serve(&mut stream);
    });
    (dir, thread)
}

#[test]
fn exports_are_listed_with_what_is_said_of_them() {
    let (dir, thread) = server(|_| ());
    let listed = NbdClient::list_unix(dir.path().join("s"), None).unwrap();
    let listed: Vec<_> = listed.iter().map(|export| (&export.name[..], &export.description[..])).collect();
    assert_eq!(listed, [("vol", ""), ("vol@a", "made today")]);
    thread.join().unwrap();
}

fn request(stream: &mut UnixStream) -> (proto::Request, Vec<u8>) {
    let mut head = [0; proto::Request::SIZE];
    stream.read_exact(&mut head).unwrap();
    let (head, _) = proto::take::<proto::Request>(&head).unwrap();
    let len = if head.command.get() == command::WRITE { head.len.get() } else { 0 };
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data).unwrap();
    (head, data)
}

#[test]
fn replies_out_of_order_find_their_requests() {
    let (dir, thread) = server(|stream| {
        let (a, _) = request(stream);
        let (b, data) = request(stream);
        assert_eq!(data, [7; 100]);
        stream.write_all(proto::SimpleReply::new(proto::errno::ENOSPC, b.cookie.get()).as_bytes()).unwrap();
        stream.write_all(proto::SimpleReply::new(0, a.cookie.get()).as_bytes()).unwrap();
        stream.write_all(&[9; 512]).unwrap();
    });
    let mut client = NbdClient::connect_unix(dir.path().join("s"), "vol").unwrap();
    assert_eq!((client.size(), client.has_block_status()), (SIZE, true));
    let read = client.submit(Request::Read { offset: 0, len: 512 }).unwrap();
    let write = client.submit(Request::Write { offset: 512, data: &[7; 100], fua: false }).unwrap();
    assert_eq!(client.next_reply().unwrap(), (write, Err(Errno(proto::errno::ENOSPC))));
    assert_eq!(client.next_reply().unwrap(), (read, Ok(ReplyData::Data(vec![9; 512]))));
    assert_eq!(client.in_flight(), 0);
    thread.join().unwrap();
}

#[test]
fn a_read_in_chunks_is_put_together() {
    let (dir, thread) = server(|stream| {
        let (head, _) = request(stream);
        let cookie = head.cookie.get();
        let chunk = proto::ChunkHeader::new(chunk::OFFSET_DATA, false, cookie, 8 + 100);
        stream.write_all(chunk.as_bytes()).unwrap();
        stream.write_all(&(4096u64 + 412).to_be_bytes()).unwrap();
        stream.write_all(&[5; 100]).unwrap();
        let hole = proto::ChunkHeader::new(chunk::OFFSET_HOLE, true, cookie, 12);
        stream.write_all(hole.as_bytes()).unwrap();
        stream.write_all(&4096u64.to_be_bytes()).unwrap();
        stream.write_all(&412u32.to_be_bytes()).unwrap();
        // Twice the same byte, another one never: not an answer.
        let (head, _) = request(stream);
        let chunk = proto::ChunkHeader::new(chunk::OFFSET_DATA, true, head.cookie.get(), 8 + 1);
        stream.write_all(chunk.as_bytes()).unwrap();
        stream.write_all(&[0; 9]).unwrap();
    });
    let mut client = NbdClient::connect_unix(dir.path().join("s"), "vol").unwrap();
    let mut buf = [1; 512];
    client.read(4096, &mut buf).unwrap();
    assert_eq!(buf[..412], [0; 412]);
    assert_eq!(buf[412..], [5; 100]);
    let error = client.read(0, &mut buf).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    thread.join().unwrap();
}

#[test]
fn a_chunk_outside_its_request_is_refused() {
    for (offset, len) in [(0u64, 16u32), (4096 + 500, 100), (u64::MAX - 3, 8)] {
        let (dir, thread) = server(move |stream| {
            let (head, _) = request(stream);
            let chunk = proto::ChunkHeader::new(chunk::OFFSET_DATA, true, head.cookie.get(), 8 + len);
            stream.write_all(chunk.as_bytes()).unwrap();
            stream.write_all(&offset.to_be_bytes()).unwrap();
            let _ = stream.write_all(&vec![1; len as usize]);
        });
        let mut client = NbdClient::connect_unix(dir.path().join("s"), "vol").unwrap();
        let error = client.read(4096, &mut [0; 512]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        thread.join().unwrap();
    }
}

#[test]
fn a_server_that_answers_before_it_reads_on_is_no_deadlock() {
    const COUNT: usize = 64;
    const LEN: usize = 1 << 18;
    let (dir, thread) = server(|stream| {
        for _ in 0..COUNT {
            let (read, _) = request(stream);
            stream.write_all(proto::SimpleReply::new(0, read.cookie.get()).as_bytes()).unwrap();
            stream.write_all(&vec![3; LEN]).unwrap();
            let (write, _) = request(stream);
            stream.write_all(proto::SimpleReply::new(0, write.cookie.get()).as_bytes()).unwrap();
        }
    });
    let options = Options { timeout: Some(Duration::from_secs(20)), ..Options::default() };
    let mut client = NbdClient::connect_unix_with(dir.path().join("s"), "vol", options).unwrap();
    let data = vec![1; LEN];
    for _ in 0..COUNT {
        client.submit(Request::Read { offset: 0, len: LEN as u32 }).unwrap();
        client.submit(Request::Write { offset: 0, data: &data, fua: true }).unwrap();
    }
    for _ in 0..2 * COUNT {
        client.next_reply().unwrap().1.unwrap();
    }
    thread.join().unwrap();
}

#[test]
fn extents_errors_and_ends_are_told_apart() {
    let (dir, thread) = server(|stream| {
        let (head, _) = request(stream);
        let chunk = proto::ChunkHeader::new(chunk::BLOCK_STATUS, true, head.cookie.get(), 4 + 16);
        stream.write_all(chunk.as_bytes()).unwrap();
        for word in [3u32, 4096, 0, 8192, 3] {
            stream.write_all(&word.to_be_bytes()).unwrap();
        }
        let (head, _) = request(stream);
        let chunk = proto::ChunkHeader::new(chunk::ERROR, true, head.cookie.get(), 6 + 2);
        stream.write_all(chunk.as_bytes()).unwrap();
        stream.write_all(&[0, 0, 0, proto::errno::EPERM as u8, 0, 2, b'n', b'o']).unwrap();
        request(stream);
    });
    let mut client = NbdClient::connect_unix(dir.path().join("s"), "vol").unwrap();
    let extents = client.block_status(0, 12288).unwrap();
    let expected = [Extent { len: 4096, flags: 0 }, Extent { len: 8192, flags: 3 }];
    assert_eq!(extents, expected);
    let error = client.write(0, &[0; 512]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    // The server leaves with a request unanswered.
    assert_eq!(client.flush().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    thread.join().unwrap();
}

#[test]
fn an_unknown_export_and_silence_are_errors() {
    let (dir, thread) = server(|_| unreachable!());
    let error = NbdClient::connect_unix(dir.path().join("s"), "other").err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains("try another"), "{error}");
    thread.join().unwrap();

    let dir = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let options = Options { timeout: Some(Duration::from_millis(50)), ..Options::default() };
    let error = NbdClient::connect_unix_with(dir.path().join("s"), "vol", options).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}
