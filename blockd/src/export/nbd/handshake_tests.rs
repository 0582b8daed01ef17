//! Negotiation over a pipe in memory.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::handshake::{HandshakeError, negotiate};
use super::proto::{
    self, BASE_ALLOCATION, ExportInfo, Greeting, InfoExport, InfoQuery, MetaQuery, OptionHeader, OptionReply, info,
    option, option_reply, transmission,
};
use super::server::{Export, Exports};
use super::session::SessionParams;
use crate::reactor::{RamDevice, ReactorHandle, ReactorOptions};

struct Two(Vec<Export>);

impl Exports for Two {
    fn list(&self) -> Vec<String> {
        self.0.iter().map(|export| export.name.clone()).collect()
    }

    fn find(&self, name: &str) -> Option<Export> {
        self.0.iter().find(|export| export.name == name).cloned()
    }
}

type Outcome = Result<Option<(Export, SessionParams)>, HandshakeError>;

/// A client before the greeting, and what the server makes of it.
async fn start(names: &[&str]) -> (DuplexStream, tokio::task::JoinHandle<Outcome>, ReactorHandle) {
    let runtime = tokio::runtime::Handle::current();
    let reactor = ReactorHandle::spawn(ReactorOptions::default(), runtime).unwrap();
    let key = reactor.add_device(Box::new(RamDevice::new(4096))).await.unwrap();
    let export = |name: &&str| Export {
        name: (*name).into(),
        description: "about it".into(),
        size: 4096,
        read_only: *name == "ro",
        reactor: reactor.clone(),
        key,
    };
    let exports = Two(names.iter().map(export).collect());
    let (client, mut server) = duplex(1 << 20);
    let task = tokio::spawn(async move { negotiate(&mut server, &exports, "test").await });
    (client, task, reactor)
}

async fn receive<T: FromZeros + FromBytes + IntoBytes>(client: &mut DuplexStream) -> T {
    let mut value = T::new_zeroed();
    client.read_exact(value.as_mut_bytes()).await.unwrap();
    value
}

async fn greet(client: &mut DuplexStream, flags: u32) {
    receive::<Greeting>(client).await.check().unwrap();
    client.write_all(&flags.to_be_bytes()).await.unwrap();
}

/// Sends an option and collects replies up to the last.
async fn ask(client: &mut DuplexStream, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let header = OptionHeader::new(number, data.len() as u32);
    client.write_all(header.as_bytes()).await.unwrap();
    client.write_all(data).await.unwrap();
    let mut replies = Vec::new();
    loop {
        let reply: OptionReply = receive(client).await;
        reply.check().unwrap();
        assert_eq!(reply.option.get(), number);
        let mut data = vec![0; reply.len.get() as usize];
        client.read_exact(&mut data).await.unwrap();
        let last = reply.is_error() || reply.kind.get() == option_reply::ACK;
        replies.push((reply.kind.get(), data));
        if last {
            return replies;
        }
    }
}

async fn kind(client: &mut DuplexStream, number: u32, data: &[u8]) -> u32 {
    ask(client, number, data).await.last().unwrap().0
}

fn info_query(name: &str) -> Vec<u8> {
    let name = name.into();
    InfoQuery { name, wanted: vec![info::NAME, info::DESCRIPTION] }.encode()
}

fn meta_query(export: &str, queries: &[&str]) -> Vec<u8> {
    MetaQuery { export: export.into(), queries: queries.iter().map(|query| (*query).into()).collect() }.encode()
}

#[tokio::test]
async fn go_settles_export_replies_and_context() {
    let (mut client, task, reactor) = start(&["a", "ro"]).await;
    greet(&mut client, 3).await;
    assert_eq!(kind(&mut client, option::STRUCTURED_REPLY, &[]).await, option_reply::ACK);
    let context = ask(&mut client, option::SET_META_CONTEXT, &meta_query("a", &["x:y", BASE_ALLOCATION])).await;
    assert_eq!(context.len(), 2);
    assert_eq!(proto::decode_meta_context(&context[0].1), Ok((1, BASE_ALLOCATION.into())));
    let replies = ask(&mut client, option::GO, &info_query("a")).await;
    let (info, _) = proto::take::<InfoExport>(&replies[0].1).unwrap();
    assert_eq!(info.size.get(), 4096);
    let wanted = transmission::SEND_DF | transmission::SEND_FAST_ZERO | transmission::CAN_MULTI_CONN;
    assert_eq!(info.flags.get() & (wanted | transmission::READ_ONLY), wanted);
    assert!(replies.iter().any(|(_, data)| data == b"\0\x02about it"));
    assert!(replies.iter().any(|(_, data)| data == b"\0\x01a"));
    let (export, params) = task.await.unwrap().unwrap().unwrap();
    assert_eq!(export.name, "a");
    assert!(params.structured && !params.read_only);
    assert_eq!(params.base_allocation, Some(1));
    reactor.stop().await;
}

#[tokio::test]
async fn a_context_holds_only_for_the_export_it_was_chosen_for() {
    let (mut client, task, reactor) = start(&["a", "ro"]).await;
    greet(&mut client, 3).await;
    let query = meta_query("a", &[BASE_ALLOCATION]);
    assert_eq!(kind(&mut client, option::SET_META_CONTEXT, &query).await, option_reply::ERR_INVALID);
    kind(&mut client, option::STRUCTURED_REPLY, &[]).await;
    kind(&mut client, option::SET_META_CONTEXT, &query).await;
    kind(&mut client, option::GO, &info_query("ro")).await;
    let (_, params) = task.await.unwrap().unwrap().unwrap();
    assert_eq!(params.base_allocation, None);
    assert!(params.read_only);
    reactor.stop().await;
}

#[tokio::test]
async fn options_that_fail_leave_the_conversation_intact() {
    let (mut client, task, reactor) = start(&["a", "ro"]).await;
    greet(&mut client, 3).await;
    assert_eq!(kind(&mut client, 77, b"??").await, option_reply::ERR_UNSUP);
    assert_eq!(kind(&mut client, option::STARTTLS, &[]).await, option_reply::ERR_UNSUP);
    assert_eq!(kind(&mut client, option::LIST, b"x").await, option_reply::ERR_INVALID);
    assert_eq!(kind(&mut client, option::GO, b"x").await, option_reply::ERR_INVALID);
    assert_eq!(kind(&mut client, option::GO, &info_query("b")).await, option_reply::ERR_UNKNOWN);
    // Two exports: the empty name means neither.
    assert_eq!(kind(&mut client, option::INFO, &info_query("")).await, option_reply::ERR_UNKNOWN);
    assert_eq!(kind(&mut client, option::INFO, &vec![0; 100_000]).await, option_reply::ERR_TOO_BIG);
    let listed = ask(&mut client, option::LIST, &[]).await;
    assert_eq!(listed.len(), 3);
    assert_eq!(listed[0].1, b"\0\0\0\x01aabout it");
    kind(&mut client, option::STRUCTURED_REPLY, &[]).await;
    assert_eq!(ask(&mut client, option::LIST_META_CONTEXT, &meta_query("a", &[])).await.len(), 2);
    assert_eq!(ask(&mut client, option::LIST_META_CONTEXT, &meta_query("a", &["base:"])).await.len(), 2);
    assert_eq!(ask(&mut client, option::LIST_META_CONTEXT, &meta_query("a", &["qemu:"])).await.len(), 1);
    assert_eq!(kind(&mut client, option::ABORT, &[]).await, option_reply::ACK);
    assert!(task.await.unwrap().unwrap().is_none());
    reactor.stop().await;
}

#[tokio::test]
async fn an_old_client_gets_the_only_export_by_the_empty_name() {
    for (flags, padding) in [(1, 124), (3, 0)] {
        let (mut client, task, reactor) = start(&["a"]).await;
        greet(&mut client, flags).await;
        let header = OptionHeader::new(option::EXPORT_NAME, 0);
        client.write_all(header.as_bytes()).await.unwrap();
        let info: ExportInfo = receive(&mut client).await;
        assert_eq!(info.size.get(), 4096);
        assert_eq!(info.flags.get() & transmission::SEND_DF, 0);
        let (_, params) = task.await.unwrap().unwrap().unwrap();
        assert!(!params.structured);
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, vec![0; padding]);
        reactor.stop().await;
    }
}

#[tokio::test]
async fn foreign_protocols_are_dropped() {
    let (mut client, task, reactor) = start(&["a"]).await;
    client.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").await.unwrap();
    assert!(matches!(task.await.unwrap(), Err(HandshakeError::Proto(_))));
    reactor.stop().await;
}

#[tokio::test]
async fn an_unknown_export_name_hangs_up() {
    let (mut client, task, reactor) = start(&["a"]).await;
    greet(&mut client, 3).await;
    let header = OptionHeader::new(option::EXPORT_NAME, 1);
    client.write_all(header.as_bytes()).await.unwrap();
    client.write_all(b"b").await.unwrap();
    assert!(matches!(task.await.unwrap(), Err(HandshakeError::UnknownExport(name)) if name == "b"));
    reactor.stop().await;
}

#[tokio::test]
async fn a_silent_client_is_dropped() {
    let (mut client, task, reactor) = start(&["a"]).await;
    greet(&mut client, 3).await;
    client.write_all(&OptionHeader::new(option::GO, 50).as_bytes()[..9]).await.unwrap();
    assert!(matches!(task.await.unwrap(), Err(HandshakeError::Timeout)));
    reactor.stop().await;
}
