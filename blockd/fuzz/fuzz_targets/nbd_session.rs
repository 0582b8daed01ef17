//! A client that sends anything, in pieces of any size, after the handshake. Every request it gets through is answered
//! once, and the answers are well-formed.
#![no_main]

use blockd::export::nbd::proto::{self, ReplyHeader};
use blockd::export::nbd::session::{Progress, Session, SessionParams};
use blockd::outgoing::Outgoing;
use blockd::reactor::{Device, RamDevice};
use blockd::volume::Effect;
use libfuzzer_sys::fuzz_target;

const TOKENS: u64 = 3 << 16;

fuzz_target!(|data: &[u8]| {
    let [settings, piece, input @ ..] = data else { return };
    let params = SessionParams {
        read_only: settings & 1 != 0,
        structured: settings & 2 != 0,
        base_allocation: (settings & 4 != 0).then_some(1),
        ..SessionParams::default()
    };
    let mut device = RamDevice::new(100_000);
    if settings & 8 != 0 {
        device = device.with_late_reads();
    }
    let in_place = settings & 16 != 0;
    let mut session = Session::new(&params, TOKENS);
    let mut replies = Vec::new();
    let (mut start, mut end) = (0, 0);
    while end < input.len() {
        end = input.len().min(end + 1 + usize::from(*piece));
        loop {
            let mut out = Outgoing::new();
            let Ok((used, progress)) = session.consume(&input[start..end], &mut device, &mut out) else { return };
            start += used;
            assert!(start <= end);
            if let (true, Progress::NeedPayload, Some(room)) = (in_place, progress, session.payload_mut()) {
                let len = room.len().min(input.len() - end);
                room[..len].copy_from_slice(&input[end..end + len]);
                end += len;
                start = end;
                session.payload_received(len, &mut device);
            }
            answer(&mut session, &mut device, &mut out);
            replies.extend_from_slice(&out.to_vec());
            match progress {
                Progress::Disconnect => return check(&replies, params.structured),
                Progress::Busy => {}
                Progress::NeedBytes | Progress::NeedPayload => break,
            }
        }
        if settings & 32 != 0 && end > input.len() / 2 {
            session.shut_down();
        }
    }
    assert_eq!(session.in_flight(), 0, "everything was answered");
    check(&replies, params.structured);
});

/// Hands over what the device has finished.
fn answer(session: &mut Session, device: &mut RamDevice, out: &mut Outgoing) {
    device.advance(1);
    while let Some(effect) = device.next_effect() {
        let Effect::Complete(completion) = effect else { panic!("a device in memory has no other effects") };
        assert_eq!(completion.token.0 & !0xffff, TOKENS);
        session.complete(completion.token.0 as u16, completion.result, out);
    }
}

/// Reads the replies as a client does. Without structured replies a client must know what it asked to tell where a
/// reply ends, so only those with them are looked at.
fn check(mut replies: &[u8], structured: bool) {
    while structured && !replies.is_empty() {
        let (header, rest) = ReplyHeader::take(replies).expect("a reply begins").expect("a whole header");
        replies = match header {
            ReplyHeader::Simple(_) => rest,
            ReplyHeader::Chunk(chunk) => {
                let (body, rest) = rest.split_at(chunk.len.get() as usize);
                match chunk.kind.get() {
                    _ if chunk.is_error() => drop(proto::decode_chunk_error(body).expect("an error")),
                    proto::chunk::BLOCK_STATUS => drop(proto::decode_block_status(body).expect("a block status")),
                    proto::chunk::OFFSET_HOLE => assert_eq!(body.len(), proto::ChunkHole::SIZE),
                    proto::chunk::OFFSET_DATA => assert!(body.len() > proto::ChunkOffset::SIZE),
                    kind => assert_eq!((kind, body.len()), (proto::chunk::NONE, 0)),
                }
                rest
            }
        };
    }
}
