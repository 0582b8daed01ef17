//! A host that sends anything, in pieces of any size, on an NVMe/TCP I/O queue. Commands it gets through are answered at
//! most once, and the answers are well-formed.
#![no_main]

use std::collections::HashMap;

use blockd::export::nvme::data::{ConnectData, name_in};
use blockd::export::nvme::namespace::Namespace;
use blockd::export::nvme::pdu::{self, Framing, Header, Initialize, ResponseCapsule, Transfer, kind};
use blockd::export::nvme::reservation::file;
use blockd::export::nvme::session::{Session, SessionParams};
use blockd::outgoing::Outgoing;
use blockd::reactor::{Device, Progress, RamDevice, Session as _};
use blockd::types::VolumeId;
use blockd::volume::Effect;
use libfuzzer_sys::fuzz_target;

const TOKENS: u64 = 3 << 16;
const VOLUME: VolumeId = VolumeId([0; 16]);

fuzz_target!(|data: &[u8]| {
    decoders(data);
    let [settings, piece, input @ ..] = data else { return };
    let framing = Framing {
        header_digest: settings & 1 != 0,
        data_digest: settings & 2 != 0,
        alignment: if settings & 4 != 0 { 3 } else { 0 },
    };
    let input = repaired(framing, input);
    let mut device = RamDevice::new(100 * 4096);
    if settings & 8 != 0 {
        device = device.with_late_reads();
    }
    let params = SessionParams {
        peer: String::new(),
        export: String::new(),
        framing,
        entries: 16,
        flow_control: settings & 16 != 0,
        host: [1; 16],
        namespace: Namespace::transient(VOLUME),
        read_only: settings & 32 != 0,
        group: 0,
        number: None,
    };
    let in_place = settings & 64 != 0;
    let mut session = Session::new(params, TOKENS);
    let (mut start, mut end) = (0, 0);
    while end < input.len() {
        end = input.len().min(end + 1 + usize::from(*piece));
        loop {
            let mut out = Outgoing::new();
            let consumed = session.consume(&input[start..end], &mut device, &mut out);
            let Ok((used, progress)) = consumed else { return check(&out.to_vec()) };
            start += used;
            assert!(start <= end);
            if let (true, Progress::NeedPayload, Some(room)) = (in_place, progress, session.payload_mut()) {
                let len = room.len().min(input.len() - end);
                room[..len].copy_from_slice(&input[end..end + len]);
                end += len;
                start = end;
                session.payload_received(len, &mut device, &mut out);
            }
            device.advance(1);
            while let Some(effect) = device.next_effect() {
                let Effect::Complete(done) = effect else { panic!("a device in memory has no other effects") };
                assert_eq!(done.token.0 & !0xffff, TOKENS);
                session.complete(done.token.0 as u16, done.result, &mut device, &mut out);
            }
            for (slot, task) in session.take_tasks() {
                // Without a file a change of reservations is done when it is begun.
                let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                let mut task = task;
                match task.as_mut().poll(&mut context) {
                    std::task::Poll::Ready(result) => session.task_done(slot, result, &mut device, &mut out),
                    std::task::Poll::Pending => return,
                }
            }
            check(&out.to_vec());
            match progress {
                Progress::Disconnect => return,
                Progress::Busy => {}
                Progress::NeedBytes | Progress::NeedPayload => break,
            }
        }
    }
    assert_eq!(session.in_flight(), 0, "everything was answered, or waits for data");
});

/// With the header digests of all PDUs that follow each other made right, or nothing would get past them.
fn repaired(framing: Framing, input: &[u8]) -> Vec<u8> {
    let mut input = input.to_vec();
    let mut at = 0;
    while let Some((header, _)) = pdu::take::<Header>(&input[at..]) {
        let (hlen, plen) = (usize::from(header.hlen), header.plen.get() as usize);
        if framing.header_digest && hlen >= 8 && at + hlen + 4 <= input.len() {
            let digest = crc32c(&input[at..at + hlen]);
            input[at + hlen..at + hlen + 4].copy_from_slice(&digest.to_le_bytes());
        }
        if plen < 8 {
            break;
        }
        at = at.saturating_add(plen).min(input.len());
    }
    input
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
        }
    }
    !crc
}

/// Reads the answers as a host does.
fn check(mut out: &[u8]) {
    let mut answered: HashMap<u16, u32> = HashMap::new();
    while !out.is_empty() {
        let (header, _) = pdu::take::<Header>(out).expect("a whole header");
        let plen = header.plen.get() as usize;
        assert!(plen <= out.len(), "a whole PDU");
        match header.kind {
            kind::CAPSULE_RESP => {
                let (capsule, _) = pdu::take::<ResponseCapsule>(out).expect("a response");
                *answered.entry(capsule.completion.cid.get()).or_default() += 1;
            }
            kind::C2H_DATA | kind::R2T => drop(pdu::take::<Transfer>(out).expect("a transfer")),
            other => assert_eq!(other, kind::C2H_TERM_REQ),
        }
        out = &out[plen..];
    }
}

fn decoders(data: &[u8]) {
    if let Some((request, _)) = pdu::take::<Initialize>(data) {
        let _ = request.check_request();
    }
    if let Some((connect, _)) = pdu::take::<ConnectData>(data) {
        let _ = (name_in(&connect.subsystem), name_in(&connect.host));
    }
    if let Ok((state, boot)) = file::decode(data, VOLUME) {
        assert_eq!(file::encode(&state, VOLUME, boot), data);
    }
}
