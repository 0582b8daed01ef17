//! What an I/O queue does with PDUs that a well-behaved host does not send.

use zerocopy::IntoBytes;

use super::command::{Command, Status, fuse, io};
use super::data::CopyRange;
use super::namespace::Namespace;
use super::pdu::{CommandCapsule, Framing, Header, ResponseCapsule, Terminate, Transfer, fes, flag, kind, take};
use super::session::{Session, SessionParams};
use super::{IN_CAPSULE_MAX, NSID, TRANSFER_MAX};
use crate::outgoing::Outgoing;
use crate::reactor::{Device, Progress, RamDevice, Session as _};
use crate::types::VolumeId;
use crate::volume::Effect;

struct Rig {
    session: Session,
    device: RamDevice,
    framing: Framing,
    /// Fed and not used yet.
    input: Vec<u8>,
}

/// A PDU for a transfer tag, and the status it is refused with.
type Bad<'a> = (&'a dyn Fn(&Rig, u16) -> Vec<u8>, u16);

impl Rig {
    fn new(framing: Framing) -> Self {
        let params = SessionParams {
            peer: "test".into(),
            export: "ram".into(),
            framing,
            entries: 8,
            flow_control: true,
            host: [1; 16],
            namespace: Namespace::transient(VolumeId([0; 16])),
            read_only: false,
            group: 0,
            number: None,
        };
        Self { session: Session::new(params, 1 << 16), device: RamDevice::new(8 << 20), framing, input: Vec::new() }
    }

    /// Feeds all of `input` and returns what came back, and whether the connection goes on.
    fn feed(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Outgoing::new();
        self.input.extend_from_slice(input);
        let input = std::mem::take(&mut self.input);
        let mut at = 0;
        loop {
            let (used, progress) = match self.session.consume(&input[at..], &mut self.device, &mut out) {
                Ok(found) => found,
                Err(_) => return (out.to_vec(), false),
            };
            at += used;
            self.device.advance(1);
            while let Some(Effect::Complete(done)) = self.device.next_effect() {
                self.session.complete(done.token.0 as u16, done.result, &mut self.device, &mut out);
            }
            if used == 0 || matches!(progress, Progress::Disconnect) {
                self.input = input[at..].to_vec();
                return (out.to_vec(), true);
            }
        }
    }

    fn capsule(&self, command: Command, data: &[u8]) -> Vec<u8> {
        let header = Header { kind: kind::CAPSULE_CMD, flags: 0, hlen: 72, pdo: 0, plen: 72.into() };
        let mut pdu = Outgoing::new();
        let capsule = CommandCapsule { header, command };
        if data.is_empty() {
            self.framing.put(&mut pdu, capsule.as_bytes());
        } else {
            self.framing.put_header(&mut pdu, capsule.as_bytes(), data.len());
            let from = pdu.len();
            pdu.extend_from_slice(data);
            self.framing.put_data_digest(&mut pdu, from);
        }
        pdu.to_vec()
    }

    fn data(&self, cid: u16, tag: u16, offset: u32, data: &[u8], last: bool) -> Vec<u8> {
        let flags = if last { flag::LAST } else { 0 };
        let head = Transfer::new(kind::H2C_DATA, flags, cid, tag, offset, data.len() as u32);
        let mut pdu = Outgoing::new();
        self.framing.put_header(&mut pdu, head.as_bytes(), data.len());
        let from = pdu.len();
        pdu.extend_from_slice(data);
        self.framing.put_data_digest(&mut pdu, from);
        pdu.to_vec()
    }

    /// The statuses of the responses in `out`, by command.
    fn statuses(&self, mut out: &[u8]) -> Vec<(u16, Status)> {
        let mut found = Vec::new();
        while let Some((header, _)) = take::<Header>(out) {
            if header.kind == kind::CAPSULE_RESP {
                let (capsule, _) = take::<ResponseCapsule>(out).unwrap();
                found.push((capsule.completion.cid.get(), capsule.completion.status()));
            }
            out = &out[header.plen.get() as usize..];
        }
        found
    }
}

fn write(cid: u16, lba: u64, blocks: u32) -> Command {
    Command::new(io::WRITE, cid, NSID).with_blocks(lba, blocks)
}

#[test]
fn long_capsules_are_received_in_place_and_refused_after_their_data() {
    for (header_digest, data_digest) in [(false, false), (true, true)] {
        let mut rig = Rig::new(Framing { header_digest, data_digest, alignment: 0 });
        let data: Vec<u8> = (0..300 << 10).map(|at| (at % 251) as u8).collect();
        let len = data.len() as u32;
        let asked = |cid, lba, blocks| write(cid, lba, blocks).with_data(len, true);
        let mut all = rig.capsule(asked(1, 8, len / 512), &data);
        all.extend(rig.capsule(asked(2, 0, len / 512 - 1), &data));
        all.extend(rig.capsule(Command::new(io::FLUSH, 3, NSID).with_data(len, true), &data));
        let mut damaged = rig.capsule(asked(4, 8, len / 512), &vec![9; data.len()]);
        if data_digest {
            damaged[100_000] ^= 1;
            all.extend(damaged);
        }
        all.extend(rig.capsule(Command::new(io::FLUSH, 5, NSID), &[]));
        for size in [50_000, all.len()] {
            let mut answers = Vec::new();
            for piece in all.chunks(size) {
                let (out, goes_on) = rig.feed(piece);
                assert!(goes_on);
                answers.extend(rig.statuses(&out));
                assert_eq!(rig.session.in_flight(), 0, "what waits for its host is not waited for");
            }
            answers.sort_by_key(|(cid, _)| *cid);
            let mut expected = vec![(1, Status::SUCCESS), (2, Status::SGL_LENGTH), (3, Status::SGL_LENGTH)];
            expected.extend(data_digest.then_some((4, Status::TRANSPORT)));
            expected.push((5, Status::SUCCESS));
            assert_eq!(answers, expected);
            assert_eq!(rig.device.contents()[4096..][..data.len()], data);
        }
        assert_eq!(rig.session.in_flight(), 0);
    }
}

fn terminated(out: &[u8]) -> u16 {
    let (terminate, _) = take::<Terminate>(out).expect("a terminate request");
    assert_eq!(terminate.header.kind, kind::C2H_TERM_REQ);
    assert_eq!(terminate.header.plen.get() as usize, out.len());
    terminate.status.get()
}

const PLAIN: Framing = Framing { header_digest: false, data_digest: false, alignment: 0 };
const DIGESTS: Framing = Framing { header_digest: true, data_digest: true, alignment: 0 };

#[test]
fn bytes_may_come_one_by_one() {
    for framing in [PLAIN, DIGESTS] {
        let mut rig = Rig::new(framing);
        let small = rig.capsule(write(1, 0, 2).with_data(1024, true), &[7; 1024]);
        let large = rig.capsule(write(2, 8, 256).with_data(128 << 10, false), &[]);
        let mut out = Vec::new();
        for byte in small.iter().chain(&large) {
            out.extend(rig.feed(&[*byte]).0);
        }
        assert_eq!(rig.statuses(&out), [(1, Status::SUCCESS)]);
        // Two pieces answer the one R2T.
        let pieces =
            [rig.data(2, 0, 0, &[8; 96 << 10], false), rig.data(2, 0, 96 << 10, &[9; 32 << 10], true)].concat();
        let mut out = Vec::new();
        for part in pieces.chunks(1000) {
            out.extend(rig.feed(part).0);
        }
        assert_eq!(rig.statuses(&out), [(2, Status::SUCCESS)]);
        let contents = rig.device.contents();
        assert!(contents[..1024].iter().all(|b| *b == 7));
        assert!(contents[4096..4096 + (96 << 10)].iter().all(|b| *b == 8));
        assert!(contents[4096 + (96 << 10)..4096 + (128 << 10)].iter().all(|b| *b == 9));
        assert_eq!(rig.session.in_flight(), 0);
    }
}

#[test]
fn data_nobody_asked_for_ends_the_connection() {
    let len = 68u32 << 10;
    let begin = |rig: &mut Rig| {
        let capsule = rig.capsule(write(5, 0, len / 512).with_data(len, false), &[]);
        let (out, on) = rig.feed(&capsule);
        let (r2t, _) = take::<Transfer>(&out).unwrap();
        assert!(on && r2t.header.kind == kind::R2T && r2t.len.get() == len);
        r2t.tag.get()
    };
    let cases: [Bad<'_>; 6] = [
        (&|rig, tag| rig.data(5, tag + 1, 0, &[0; 512], false), fes::INVALID_HEADER),
        (&|rig, tag| rig.data(6, tag, 0, &[0; 512], false), fes::INVALID_HEADER),
        (&|rig, tag| rig.data(5, tag, 512, &[0; 512], false), fes::OUT_OF_RANGE),
        (&|rig, tag| rig.data(5, tag, 0, &[0; 69 << 10], true), fes::OUT_OF_RANGE),
        (&|rig, tag| rig.data(5, tag, 0, &[0; 512], true), fes::INVALID_HEADER),
        (&|rig, tag| rig.data(5, tag, 0, &[0; 68 << 10], false), fes::INVALID_HEADER),
    ];
    for (at, (bad, status)) in cases.into_iter().enumerate() {
        let mut rig = Rig::new(PLAIN);
        let tag = begin(&mut rig);
        let pdu = bad(&rig, tag);
        let (out, on) = rig.feed(&pdu);
        assert!(!on, "case {at}");
        assert_eq!(terminated(&out), status, "case {at}");
    }
}

#[test]
fn digests_that_do_not_match_are_told_apart() {
    let mut rig = Rig::new(DIGESTS);
    // Of the data: the command fails, and may be repeated.
    let mut pdu = rig.capsule(write(1, 0, 1).with_data(512, true), &[1; 512]);
    let last = pdu.len() - 1;
    pdu[last] ^= 1;
    let (out, on) = rig.feed(&pdu);
    assert_eq!((rig.statuses(&out), on), (vec![(1, Status::TRANSPORT)], true));
    let len = 128u32 << 10;
    let capsule = rig.capsule(write(2, 0, len / 512).with_data(len, false), &[]);
    assert!(rig.feed(&capsule).1);
    let mut pdu = rig.data(2, 0, 0, &vec![1; len as usize], true);
    let last = pdu.len() - 1;
    pdu[last] ^= 1;
    let (out, on) = rig.feed(&pdu);
    assert_eq!((rig.statuses(&out), on), (vec![(2, Status::TRANSPORT)], true));
    assert!(rig.device.contents().iter().all(|b| *b == 0));
    // Of the header: nothing in it can be believed.
    let mut pdu = rig.capsule(Command::new(io::FLUSH, 3, NSID), &[]);
    pdu[20] ^= 1;
    let (out, on) = rig.feed(&pdu);
    assert!(!on);
    assert_eq!(terminated(&out), fes::HEADER_DIGEST);
}

#[test]
fn a_capsule_with_too_much_ends_the_connection() {
    let mut rig = Rig::new(PLAIN);
    let header = Header { kind: kind::CAPSULE_CMD, flags: 0, hlen: 72, pdo: 72, plen: (73 + IN_CAPSULE_MAX).into() };
    let command = write(1, 0, 2049).with_data(IN_CAPSULE_MAX + 1, true);
    let (out, on) = rig.feed(CommandCapsule { header, command }.as_bytes());
    assert!(!on);
    assert_eq!(terminated(&out), fes::INVALID_HEADER);
}

#[test]
fn more_commands_than_entries_end_the_connection() {
    let mut rig = Rig::new(PLAIN);
    for cid in 0..8 {
        let capsule = rig.capsule(write(cid, 0, 256).with_data(128 << 10, false), &[]);
        assert!(rig.feed(&capsule).1);
    }
    let capsule = rig.capsule(Command::new(io::FLUSH, 9, NSID), &[]);
    let (out, on) = rig.feed(&capsule);
    assert!(!on);
    assert_eq!(terminated(&out), fes::SEQUENCE);
}

#[test]
fn a_pair_fails_as_a_whole() {
    let mut rig = Rig::new(PLAIN);
    let fused = |mut command: Command, which| {
        command.flags |= which;
        command
    };
    let compare = |cid, lba| Command::new(io::COMPARE, cid, NSID).with_blocks(lba, 1).with_data(512, true);
    let pair = |rig: &mut Rig, first: Command, second: Command| {
        let input = [rig.capsule(first, &[0; 512]), rig.capsule(second, &[1; 512])].concat();
        let (out, on) = rig.feed(&input);
        assert!(on);
        let mut found = rig.statuses(&out);
        found.sort_unstable_by_key(|(cid, _)| *cid);
        found.into_iter().map(|(_, status)| status).collect::<Vec<_>>()
    };
    let (first, second) = (fused(compare(1, 3), fuse::FIRST), fused(write(2, 3, 1).with_data(512, true), fuse::SECOND));
    assert_eq!(pair(&mut rig, first, second), [Status::SUCCESS, Status::SUCCESS]);
    assert_eq!(pair(&mut rig, first, second), [Status::COMPARE_FAILURE, Status::FUSED_FAILED]);
    // Of other blocks than were compared, or of none that there are.
    let elsewhere = fused(write(2, 4, 1).with_data(512, true), fuse::SECOND);
    assert_eq!(pair(&mut rig, first, elsewhere), [Status::FUSED_MISSING, Status::INVALID_FIELD]);
    let far = u64::from(TRANSFER_MAX);
    let beyond = fused(write(2, far, 1).with_data(512, true), fuse::SECOND);
    assert_eq!(
        pair(&mut rig, fused(compare(1, far), fuse::FIRST), beyond),
        [Status::FUSED_FAILED, Status::LBA_OUT_OF_RANGE]
    );
    assert_eq!(rig.session.in_flight(), 0);
}

#[test]
fn a_volume_that_closes_leaves_commands_unanswered() {
    let mut rig = Rig::new(PLAIN);
    rig.device.close();
    let capsule = rig.capsule(write(1, 0, 1).with_data(512, true), &[1; 512]);
    let (out, _) = rig.feed(&capsule);
    assert!(out.is_empty());
    assert!(rig.session.broken().is_some());
}

#[test]
fn copies_of_whole_blocks_are_the_device_s() {
    let mut rig = Rig::new(PLAIN);
    let fill = |rig: &mut Rig, cid: u16, lba: u64, byte: u8| {
        let pdu = rig.capsule(write(cid, lba, 8).with_data(4096, true), &[byte; 4096]);
        let (out, _) = rig.feed(&pdu);
        assert_eq!(rig.statuses(&out), [(cid, Status::SUCCESS)]);
    };
    fill(&mut rig, 1, 0, 1);
    fill(&mut rig, 2, 8, 2);
    let mut copy = |cid: u16, sources: &[(u64, u16)], to: u64| {
        let mut ranges = Vec::new();
        for (lba, blocks) in sources {
            let range =
                CopyRange { reserved: 0.into(), lba: (*lba).into(), blocks: (blocks - 1).into(), rest: [0; 14] };
            ranges.extend_from_slice(range.as_bytes());
        }
        let command = Command::new(io::COPY, cid, NSID).with_dword(10, to as u32);
        let command = command.with_dword(12, sources.len() as u32 - 1).with_data(ranges.len() as u32, true);
        let pdu = rig.capsule(command, &ranges);
        let (out, _) = rig.feed(&pdu);
        assert_eq!(rig.statuses(&out), [(cid, Status::SUCCESS)]);
        rig.device.contents()[to as usize * 512..][..sources.iter().map(|s| usize::from(s.1) * 512).sum::<usize>()]
            .to_vec()
    };
    // By the device, one range after the other.
    assert_eq!(copy(3, &[(8, 8), (0, 8)], 16), [[2; 4096], [1; 4096]].concat());
    // Parts of blocks, and what overlaps: by reading and writing.
    assert_eq!(copy(4, &[(7, 2)], 33), [[1; 512], [2; 512]].concat());
    assert_eq!(copy(5, &[(0, 16)], 8), [[1; 4096], [2; 4096]].concat());
}
