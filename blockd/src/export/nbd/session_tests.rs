//! The session against a device in memory, without sockets.

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::proto::{
    self, ChunkHeader, MAX_PAYLOAD, ReplyHeader, Request, SimpleReply, chunk, command, command_flag, errno,
};
use super::session::{DIRECT_PAYLOAD, MAX_IN_FLIGHT, Progress, Session, SessionParams};
use crate::outgoing::Outgoing;
use crate::reactor::{Device, RamDevice};
use crate::volume::Effect;

const SIZE: usize = 1 << 20;

/// A client's view of a session on its own device.
struct Rig {
    session: Session,
    device: RamDevice,
    out: Outgoing,
    /// Received and not used up.
    input: Vec<u8>,
}

/// A whole reply.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Simple { error: u32, cookie: u64 },
    Chunk { kind: u16, done: bool, cookie: u64, payload: Vec<u8> },
}

impl Rig {
    fn new(structured: bool) -> Self {
        Self::with_device(structured, RamDevice::new(SIZE))
    }

    fn with_device(structured: bool, device: RamDevice) -> Self {
        let params = SessionParams { structured, base_allocation: structured.then_some(1), ..SessionParams::default() };
        Self { session: Session::new(&params, 7 << 16), device, out: Outgoing::new(), input: Vec::new() }
    }

    /// Receives bytes as the reactor would: large payloads into their own memory.
    fn feed(&mut self, mut bytes: &[u8]) -> Progress {
        loop {
            if let Some(payload) = self.session.payload_mut().filter(|_| self.input.is_empty()) {
                let len = payload.len().min(bytes.len());
                payload[..len].copy_from_slice(&bytes[..len]);
                bytes = &bytes[len..];
                self.session.payload_received(len, &mut self.device);
            }
            self.input.extend_from_slice(bytes);
            bytes = &[];
            let (used, progress) = self.session.consume(&self.input, &mut self.device, &mut self.out).unwrap();
            self.input.drain(..used);
            if self.input.is_empty() || progress != Progress::NeedPayload {
                return progress;
            }
        }
    }

    /// Hands over what the device finished.
    fn settle(&mut self) {
        self.device.advance(1);
        while let Some(effect) = self.device.next_effect() {
            let Effect::Complete(done) = effect else { panic!("memory needs no I/O") };
            assert_eq!(done.token.0 >> 16, 7);
            self.session.complete(done.token.0 as u16, done.result, &mut self.out);
        }
    }

    fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> Vec<Reply> {
        let request = Request::new(command, flags, 42, offset, len);
        self.feed(&[request.as_bytes(), payload].concat());
        self.settle();
        self.replies(len)
    }

    /// Takes the output apart; a simple reply may be followed by `read` bytes of data at the end.
    fn replies(&mut self, read: u32) -> Vec<Reply> {
        let out = std::mem::take(&mut self.out).to_vec();
        let mut rest = &out[..];
        let mut replies = Vec::new();
        while let Some((header, tail)) = ReplyHeader::take(rest).unwrap() {
            rest = tail;
            replies.push(match header {
                ReplyHeader::Simple(reply) => Reply::Simple { error: reply.error.get(), cookie: reply.cookie.get() },
                ReplyHeader::Chunk(head) => {
                    let (payload, tail) = rest.split_at(head.len.get() as usize);
                    rest = tail;
                    Reply::Chunk {
                        kind: head.kind.get(),
                        done: head.done(),
                        cookie: head.cookie.get(),
                        payload: payload.to_vec(),
                    }
                }
            });
            if rest.len() == read as usize {
                break;
            }
        }
        replies
    }

    /// The error of a request that must fail, whatever the style.
    fn error(&mut self, command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> u32 {
        match &self.ask(command, flags, offset, len, payload)[..] {
            [Reply::Simple { error, cookie: 42 }] if *error != 0 => *error,
            [Reply::Chunk { kind: chunk::ERROR, done: true, cookie: 42, payload }] => {
                proto::decode_chunk_error(payload).unwrap().0
            }
            other => panic!("not one error: {other:?}"),
        }
    }

    fn ok(&mut self, command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) {
        let replies = self.ask(command, flags, offset, len, payload);
        assert_eq!(replies, [Reply::Simple { error: 0, cookie: 42 }]);
    }
}

/// A conversation with every kind of request, small, unaligned, large, refused.
fn conversation() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut say = |command, flags, cookie, offset, len: u32, payload: &[u8]| {
        bytes.extend_from_slice(Request::new(command, flags, cookie, offset, len).as_bytes());
        bytes.extend_from_slice(payload);
    };
    let large: Vec<u8> = (0..DIRECT_PAYLOAD).map(|i| (i % 251) as u8).collect();
    say(command::WRITE, 0, 1, 100, 3, b"abc");
    say(command::WRITE, command_flag::FUA, 2, 65536, large.len() as u32, &large);
    say(command::WRITE, 0, 3, 200_001, large.len() as u32, &large);
    say(command::READ, 0, 4, 99, 5, &[]);
    say(command::WRITE, command_flag::REQ_ONE, 5, 0, 5, b"xxxxx");
    say(command::WRITE, 0, 6, SIZE as u64 - 1, 2, b"xx");
    say(command::TRIM, 0, 7, 65536, 8192, &[]);
    say(command::WRITE_ZEROES, command_flag::NO_HOLE, 8, 81920, 4096, &[]);
    say(command::FLUSH, 0, 9, 0, 0, &[]);
    say(command::CACHE, 0, 10, 0, 4096, &[]);
    say(command::READ, 0, 11, 200_001, 70_000, &[]);
    say(99, 0, 12, 0, 0, &[]);
    say(command::DISC, 0, 13, 0, 0, &[]);
    bytes
}

fn play(structured: bool, pieces: &[&[u8]]) -> (Vec<u8>, Vec<u8>) {
    let mut rig = Rig::new(structured);
    let mut progress = Progress::NeedBytes;
    for piece in pieces {
        progress = rig.feed(piece);
        // Settling after each piece would reorder replies; the order of memory is that of the requests.
    }
    assert_eq!(progress, Progress::Disconnect);
    rig.settle();
    assert_eq!(rig.session.in_flight(), 0);
    (rig.out.to_vec(), rig.device.contents().to_vec())
}

#[test]
fn any_split_into_two_gives_the_same_conversation() {
    let bytes = conversation();
    for structured in [false, true] {
        let whole = play(structured, &[&bytes]);
        // Every position but those deep inside large payloads, which are all alike.
        for at in (0..bytes.len()).filter(|at| at % 64 < 2 || *at < 400 || *at > bytes.len() - 400) {
            let (head, tail) = bytes.split_at(at);
            assert!(play(structured, &[head, tail]) == whole, "split at {at}");
        }
    }
}

#[test]
fn single_bytes_give_the_same_conversation() {
    let bytes = conversation();
    let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
    assert!(play(true, &pieces) == play(true, &[&bytes]));
}

#[test]
fn a_simple_read_is_a_header_and_the_bytes() {
    let mut rig = Rig::new(false);
    rig.ok(command::WRITE, 0, 10, 4, b"data");
    rig.feed(Request::new(command::READ, 0, 5, 9, 6).as_bytes());
    let out = rig.out.to_vec();
    assert_eq!(out[..SimpleReply::SIZE], *SimpleReply::new(0, 5).as_bytes());
    assert_eq!(out[SimpleReply::SIZE..], *b"\0data\0");
}

#[test]
fn a_structured_read_sends_holes_as_such_unless_told_not_to() {
    for device in [RamDevice::new(SIZE), RamDevice::new(SIZE).with_late_reads()] {
        let mut rig = Rig::with_device(true, device);
        rig.ok(command::WRITE, 0, 4096, 4, b"data");
        let chunks = rig.ask(command::READ, 0, 0, 16384, &[]);
        let hole = |offset: u64, len: u32| [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
        let mut data = 4096u64.to_be_bytes().to_vec();
        data.extend_from_slice(b"data");
        data.resize(8 + 4096, 0);
        let chunk = |kind, done, payload| Reply::Chunk { kind, done, cookie: 42, payload };
        assert_eq!(
            chunks,
            [
                chunk(chunk::OFFSET_HOLE, false, hole(0, 4096)),
                chunk(chunk::OFFSET_DATA, false, data),
                chunk(chunk::OFFSET_HOLE, true, hole(8192, 8192)),
            ]
        );
        let whole = rig.ask(command::READ, command_flag::DF, 0, 16384, &[]);
        assert!(matches!(&whole[..], [Reply::Chunk { kind: chunk::OFFSET_DATA, done: true, payload, .. }]
            if payload.len() == 8 + 16384));
        let ends_in_data = rig.ask(command::READ, 0, 0, 8192, &[]);
        assert!(matches!(&ends_in_data[..], [_, Reply::Chunk { kind: chunk::OFFSET_DATA, done: true, .. }]));
    }
}

#[test]
fn errors_say_what_is_wrong() {
    for structured in [false, true] {
        let mut rig = Rig::new(structured);
        let end = SIZE as u64;
        assert_eq!(rig.error(command::READ, 0, end - 1, 2, &[]), errno::EINVAL);
        assert_eq!(rig.error(command::READ, 0, u64::MAX, 2, &[]), errno::EINVAL);
        assert_eq!(rig.error(command::TRIM, 0, end, 1, &[]), errno::EINVAL);
        assert_eq!(rig.error(command::WRITE, 0, end, 2, b"xx"), errno::ENOSPC);
        assert_eq!(rig.error(command::WRITE_ZEROES, 0, 1, u32::MAX, &[]), errno::ENOSPC);
        assert_eq!(rig.error(command::READ, 0, 0, MAX_PAYLOAD + 1, &[]), errno::EINVAL);
        assert_eq!(rig.error(command::TRIM, 1 << 9, 0, 1, &[]), errno::EINVAL);
        assert_eq!(rig.error(command::BLOCK_STATUS, 0, 0, 0, &[]), errno::EINVAL);
        let too_long = vec![0; MAX_PAYLOAD as usize + 1];
        assert_eq!(rig.error(command::WRITE, 0, 0, MAX_PAYLOAD + 1, &too_long), errno::EINVAL);
        rig.ok(command::WRITE, 0, 0, 2, b"ok");
        rig.session.shut_down();
        if structured {
            assert_eq!(rig.error(command::FLUSH, 0, 0, 0, &[]), errno::ESHUTDOWN);
        } else {
            let mut out = Outgoing::new();
            let request = Request::new(command::FLUSH, 0, 1, 0, 0);
            let (_, progress) = rig.session.consume(request.as_bytes(), &mut rig.device, &mut out).unwrap();
            assert_eq!((progress, out.len()), (Progress::Disconnect, 0));
        }
    }
    let mut rig = Rig::with_device(false, RamDevice::new(SIZE).read_only());
    assert_eq!(rig.error(command::WRITE, 0, 0, 2, b"xx"), errno::EPERM);
    assert_eq!(rig.error(command::READ, command_flag::DF, 0, 1, &[]), errno::EINVAL);
}

#[test]
fn a_read_only_session_refuses_writes_to_a_writable_device() {
    let params = SessionParams { read_only: true, ..SessionParams::default() };
    let mut rig = Rig::new(false);
    rig.session = Session::new(&params, 7 << 16);
    let payload = vec![1; DIRECT_PAYLOAD];
    assert_eq!(rig.error(command::WRITE, 0, 0, payload.len() as u32, &payload), errno::EPERM);
    assert_eq!(rig.error(command::TRIM, 0, 0, 1, &[]), errno::EPERM);
}

#[test]
fn what_cannot_be_a_request_is_an_error_at_once() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4]] {
        let mut rig = Rig::new(false);
        assert!(rig.session.consume(bytes, &mut rig.device, &mut rig.out).is_err());
    }
    let absurd = Request::new(command::WRITE, 0, 1, 0, u32::MAX);
    let mut rig = Rig::new(false);
    assert!(rig.session.consume(absurd.as_bytes(), &mut rig.device, &mut rig.out).is_err());
}

#[test]
fn block_status_joins_cuts_and_describes() {
    let mut rig = Rig::new(true);
    rig.ok(command::WRITE, 0, 4096, 4, b"data");
    rig.ok(command::WRITE_ZEROES, command_flag::NO_HOLE, 8192, 4096, &[]);
    let runs = |replies: Vec<Reply>| match &replies[..] {
        [Reply::Chunk { kind: chunk::BLOCK_STATUS, done: true, payload, .. }] => {
            proto::decode_block_status(payload).unwrap()
        }
        other => panic!("not one block status: {other:?}"),
    };
    let all = runs(rig.ask(command::BLOCK_STATUS, 0, 0, SIZE as u32, &[]));
    assert_eq!(all, (1, vec![(4096, 3), (4096, 0), (4096, 2), (SIZE as u32 - 12288, 3)]));
    let one = runs(rig.ask(command::BLOCK_STATUS, command_flag::REQ_ONE, 100, 10, &[]));
    assert_eq!(one, (1, vec![(10, 3)]));
}

#[test]
fn too_many_requests_wait_in_the_socket() {
    let mut rig = Rig::new(false);
    let flush = Request::new(command::FLUSH, 0, 1, 0, 0);
    let many = flush.as_bytes().repeat(MAX_IN_FLIGHT + 1);
    assert_eq!(rig.feed(&many), Progress::Busy);
    assert_eq!(rig.session.in_flight(), MAX_IN_FLIGHT);
    assert_eq!(rig.input.len(), Request::SIZE);
    rig.settle();
    assert_eq!(rig.feed(&[]), Progress::NeedBytes);
    assert_eq!(rig.session.in_flight(), 1);
}

#[test]
fn unsent_replies_stop_the_reading() {
    let mut rig = Rig::new(false);
    let read = Request::new(command::READ, 0, 1, 0, SIZE as u32);
    assert_eq!(rig.feed(&read.as_bytes().repeat(64)), Progress::Busy);
    assert!(rig.out.len() < 6 * SIZE);
    rig.out.clear(0);
    assert_eq!(rig.feed(&[]), Progress::Busy);
}

#[test]
fn late_and_inline_reads_say_the_same() {
    let mut now = Rig::new(true);
    let mut late = Rig::with_device(true, RamDevice::new(SIZE).with_late_reads());
    for rig in [&mut now, &mut late] {
        rig.ok(command::WRITE, 0, 5000, 4, b"data");
        rig.feed(Request::new(command::READ, 0, 8, 1, 30_000).as_bytes());
        rig.settle();
    }
    assert_eq!(now.out.to_vec(), late.out.to_vec());
    assert!(now.out.len() > ChunkHeader::SIZE);
}

proptest! {
    #[test]
    fn garbage_never_panics(
        requests in proptest::collection::vec(
            (0..9u16, 0..64u16, any::<u64>(), prop_oneof![0..20_000u32, any::<u32>()], any::<bool>()), 0..40),
        noise in proptest::collection::vec(any::<u8>(), 0..300),
        structured in any::<bool>(),
    ) {
        let mut rig = Rig::new(structured);
        let mut bytes = Vec::new();
        for (command, flags, offset, len, near) in requests {
            let offset = if near { offset % (2 * SIZE as u64) } else { offset };
            bytes.extend_from_slice(Request::new(command, flags, 1, offset, len).as_bytes());
            if command == command::WRITE && len < 20_000 {
                bytes.extend(std::iter::repeat_n(0x5a, len as usize));
            }
        }
        bytes.extend_from_slice(&noise);
        let _ = rig.session.consume(&bytes, &mut rig.device, &mut rig.out);
        rig.settle();
        prop_assert_eq!(rig.session.in_flight(), 0);
    }
}
