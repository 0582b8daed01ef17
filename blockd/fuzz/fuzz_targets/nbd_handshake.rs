//! A client that negotiates anything, and all decoders of the protocol.
#![no_main]

use std::sync::LazyLock;

use blockd::export::nbd::handshake::negotiate;
use blockd::export::nbd::proto::{self, InfoQuery, MetaQuery, OptionReply, ReplyHeader};
use blockd::export::nbd::server::{Export, Exports};
use blockd::reactor::{RamDevice, ReactorHandle, ReactorOptions};
use libfuzzer_sys::fuzz_target;
use tokio::runtime::Runtime;

struct Two([Export; 2]);

impl Exports for Two {
    fn list(&self) -> Vec<String> {
        self.0.iter().map(|export| export.name.clone()).collect()
    }

    fn find(&self, name: &str) -> Option<Export> {
        self.0.iter().find(|export| export.name == name).cloned()
    }
}

static SERVER: LazyLock<(Runtime, Two)> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let reactor = ReactorHandle::spawn(ReactorOptions::default(), runtime.handle().clone()).expect("io_uring");
    let key = runtime.block_on(reactor.add_device(Box::new(RamDevice::new(4096)))).expect("a device");
    let export = |name: &str, read_only| Export {
        name: name.to_owned(),
        description: "about it".to_owned(),
        size: 4096,
        read_only,
        reactor: reactor.clone(),
        key,
    };
    let exports = Two([export("vol", false), export("ro", true)]);
    (runtime, exports)
});

fuzz_target!(|data: &[u8]| {
    decoders(data);
    let (runtime, exports) = &*SERVER;
    let mut sent = Vec::new();
    let outcome = runtime.block_on(async {
        let mut client = tokio::io::join(data, &mut sent);
        negotiate(&mut client, exports, "fuzz").await
    });
    if let Ok(Some((export, params))) = outcome {
        assert_eq!(params.export, export.name);
        assert_eq!(params.read_only, export.name == "ro");
        assert!(params.base_allocation.is_none() || params.structured);
    }
    check(&sent);
});

/// Reads the server's side as a client does: a greeting, replies to options, at the end perhaps the answer to
/// EXPORT_NAME.
fn check(sent: &[u8]) {
    let (greeting, mut rest) = proto::take::<proto::Greeting>(sent).expect("a greeting");
    greeting.check().expect("a good greeting");
    while let Some((reply, tail)) = proto::take::<OptionReply>(rest) {
        if reply.check().is_err() {
            break;
        }
        rest = &tail[reply.len.get() as usize..];
    }
    let name_answers = [0, proto::ExportInfo::SIZE, proto::ExportInfo::SIZE + proto::EXPORT_NAME_PADDING];
    assert!(name_answers.contains(&rest.len()), "{} bytes are left", rest.len());
}

fn decoders(data: &[u8]) {
    if let Ok(query) = InfoQuery::decode(data) {
        assert_eq!(query.encode(), data);
    }
    if let Ok(query) = MetaQuery::decode(data) {
        assert_eq!(query.encode(), data);
    }
    if let Ok((id, name)) = proto::decode_meta_context(data) {
        assert_eq!(proto::encode_meta_context(id, &name), data);
    }
    let _ = proto::decode_chunk_error(data);
    let _ = proto::decode_block_status(data);
    let _ = ReplyHeader::take(data);
}
