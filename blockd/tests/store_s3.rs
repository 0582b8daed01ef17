//! The S3 store against a real server, directly and through a proxy that makes trouble.
//!
//! Needs the environment that `scripts/dev-s3 env` prints; without it every test says that it was skipped.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockd::store::{ObjectStore, PutMode, S3Options, S3Store, StoreConfig, StoreErrorKind};
use bytes::Bytes;
use common::proxy::{Outage, Proxy, Trouble, start_yes_man};
use common::{conformance, pattern};

/// Options for a part of the test bucket that nobody else uses, or `None` without a server.
fn options() -> Option<S3Options> {
    let (Ok(endpoint), Ok(bucket)) = (std::env::var("BLOCKD_TEST_S3_ENDPOINT"), std::env::var("BLOCKD_TEST_S3_BUCKET"))
    else {
        eprintln!("skipped: no S3 server; run  eval \"$(scripts/dev-s3 start)\"  first");
        return None;
    };
    let prefix = format!("test-{}", uuid::Uuid::new_v4().simple());
    Some(S3Options {
        endpoint: Some(endpoint),
        path_style: true,
        // Short, so that tests of failures end soon; everything here is on one host.
        request_timeout: Duration::from_secs(3),
        ..S3Options::new(bucket, prefix)
    })
}

/// The store behind a proxy, probed and with the requests of that forgotten.
async fn proxied(options: S3Options) -> (Proxy, S3Store) {
    let (proxy, store) = proxied_unprobed(options).await;
    store.verify_conditional_writes().await.unwrap();
    proxy.forget();
    (proxy, store)
}

/// The store behind a proxy, not probed: it then uploads big objects in parts, even where the server does not check the
/// condition at the end of an upload.
async fn proxied_unprobed(options: S3Options) -> (Proxy, S3Store) {
    let upstream = options.endpoint.as_deref().unwrap().strip_prefix("http://").unwrap();
    let proxy = Proxy::start(upstream.parse().expect("the test endpoint is http://ADDRESS:PORT")).await;
    let options = S3Options { endpoint: Some(proxy.url()), ..options };
    (proxy, S3Store::connect(options).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms() {
    let Some(mut options) = options() else { return };
    options.multipart_above = 16 << 20;
    options.part_size = 5 << 20;
    options.request_timeout = Duration::from_secs(10);
    let store = S3Store::connect(options).await;
    store.verify_conditional_writes().await.unwrap();
    conformance::check_all(Arc::new(store), (17 << 20) + 123).await;
}

#[tokio::test]
async fn opens_from_configuration_and_counts_requests() {
    let Some(options) = options() else { return };
    let config = StoreConfig {
        endpoint: options.endpoint.clone(),
        ..StoreConfig::new(format!("s3://{}/{}", options.bucket, options.prefix))
    };
    let store = blockd::store::open(&config).await.unwrap();
    let before = store.counters();
    store.put("a", pattern(1, 1000), PutMode::Create).await.unwrap();
    assert_eq!(store.get("a").await.unwrap().0, pattern(1, 1000));
    let after = store.counters();
    assert_eq!(after.put_class_requests - before.put_class_requests, 1);
    assert_eq!(after.get_class_requests - before.get_class_requests, 1);
    assert!(after.cost_usd > before.cost_usd);
    assert_eq!(store.list("", None).await.unwrap().len(), 1, "the probe left something behind");
}

#[tokio::test]
async fn a_lost_answer_is_no_conflict() {
    let Some(options) = options() else { return };
    let (proxy, store) = proxied(options).await;
    for (n, trouble) in [Trouble::LoseResponse, Trouble::HideBehind500].into_iter().enumerate() {
        let key = format!("key{n}");
        proxy.next("PUT", trouble);
        let created = store.put(&key, pattern(1, 100_000), PutMode::Create).await.unwrap();
        assert_eq!((proxy.count("PUT"), proxy.count("HEAD")), (1, 1), "{trouble:?}");
        assert_eq!(store.get(&key).await.unwrap(), (pattern(1, 100_000), created.clone()));
        proxy.forget();

        proxy.next("PUT", trouble);
        let replaced = store.put(&key, pattern(2, 1000), PutMode::Replace(created.clone())).await.unwrap();
        assert_eq!(store.get(&key).await.unwrap(), (pattern(2, 1000), replaced));
        proxy.forget();

        // A real conflict stays one, also when the answer that says so is lost.
        proxy.next("PUT", trouble);
        let refused = store.put(&key, pattern(3, 1000), PutMode::Create).await.unwrap_err();
        assert_eq!(refused.kind, StoreErrorKind::Precondition, "{trouble:?}");
        proxy.next("PUT", trouble);
        let refused = store.put(&key, pattern(3, 1000), PutMode::Replace(created)).await.unwrap_err();
        assert_eq!(refused.kind, StoreErrorKind::Precondition, "{trouble:?}");
        assert_eq!(store.get(&key).await.unwrap().0, pattern(2, 1000));
        proxy.forget();
    }
}

#[tokio::test]
async fn requests_that_never_arrived_are_sent_again() {
    let Some(options) = options() else { return };
    let (proxy, store) = proxied(options).await;
    for (n, trouble) in [Trouble::DropRequest, Trouble::SlowDown, Trouble::ServerError].into_iter().enumerate() {
        let key = format!("key{n}");
        for _ in 0..2 {
            proxy.next("PUT", trouble);
        }
        store.put(&key, pattern(1, 1000), PutMode::Create).await.unwrap();
        assert_eq!(proxy.count("PUT"), 3, "{trouble:?}");
        proxy.next("GET", trouble);
        assert_eq!(store.get(&key).await.unwrap().0, pattern(1, 1000));
        proxy.next("HEAD", trouble);
        store.head(&key).await.unwrap();
        proxy.next("GET", trouble);
        assert_eq!(store.list(&key, None).await.unwrap().len(), 1);
        proxy.next("POST", trouble);
        store.delete(&[key]).await.unwrap();
        proxy.forget();
    }
}

#[tokio::test]
async fn a_cut_answer_is_never_a_short_read() {
    let Some(options) = options() else { return };
    let (proxy, store) = proxied(options).await;
    store.put("key", pattern(1, 300_000), PutMode::Create).await.unwrap();
    proxy.next("GET", Trouble::CutResponse);
    assert_eq!(store.get("key").await.unwrap().0, pattern(1, 300_000));
    proxy.next("GET", Trouble::CutResponse);
    assert_eq!(store.get_range("key", 1000..250_000).await.unwrap(), pattern(1, 300_000).slice(1000..250_000));
    assert_eq!(proxy.count("GET"), 4);
}

#[tokio::test]
async fn multipart_survives_lost_answers() {
    let Some(mut options) = options() else { return };
    options.multipart_above = 6 << 20;
    options.part_size = 5 << 20;
    let (proxy, store) = proxied_unprobed(options).await;
    let body = pattern(1, 11 << 20);
    store.put("key", body.clone(), PutMode::Create).await.unwrap();
    assert_eq!((proxy.count("PUT"), proxy.count("POST")), (3, 2));
    let (read, version) = store.get("key").await.unwrap();
    assert!(read == body);
    assert_eq!(store.head("key").await.unwrap().version, version);
    proxy.forget();

    proxy.next("PUT", Trouble::LoseResponse);
    proxy.next("PUT", Trouble::SlowDown);
    // The first POST that gets through begins the upload, the second ends it.
    proxy.next("POST", Trouble::SlowDown);
    let troubles = [Trouble::LoseResponse, Trouble::HideBehind500, Trouble::DropRequest];
    for (n, trouble) in troubles.into_iter().enumerate() {
        proxy.next_of("POST", "uploadId=", trouble);
        let key = format!("other{n}");
        store.put(&key, body.clone(), PutMode::Create).await.unwrap();
        assert!(store.get(&key).await.unwrap().0 == body);
        proxy.forget();
        let refused = store.put(&key, body.clone(), PutMode::Create).await;
        assert_eq!(refused.unwrap_err().kind, StoreErrorKind::Precondition);
    }
}

#[tokio::test]
async fn an_outage_is_a_transient_error_in_time_and_then_over() {
    let Some(mut options) = options() else { return };
    options.request_timeout = Duration::from_millis(600);
    let (proxy, store) = proxied(options).await;
    store.put("key", pattern(1, 1000), PutMode::Create).await.unwrap();
    for outage in [Outage::Closing, Outage::Hanging] {
        proxy.set_outage(outage);
        let begun = Instant::now();
        let (put, get, list) = tokio::join!(
            store.put("other", pattern(2, 1000), PutMode::Create),
            store.get_range("key", 10..20),
            store.list("", None)
        );
        for error in [put.unwrap_err(), get.unwrap_err(), list.unwrap_err()] {
            assert!(error.is_transient(), "{error}");
        }
        let took = begun.elapsed();
        assert!(took > Duration::from_millis(600) && took < Duration::from_secs(15), "{outage:?} took {took:?}");
    }
    proxy.set_outage(Outage::None);
    proxy.set_delay(Duration::from_millis(50));
    store.put("other", pattern(2, 1000), PutMode::Create).await.unwrap();
    assert_eq!(store.get_range("key", 10..20).await.unwrap(), pattern(1, 1000).slice(10..20));
}

async fn opening(options: S3Options) -> String {
    let store = S3Store::connect(options).await;
    format!("{:#}", store.verify_conditional_writes().await.expect_err("this must not open"))
}

#[tokio::test]
async fn what_is_wrong_is_said_at_the_start() {
    let Some(mut options) = options() else { return };
    options.request_timeout = Duration::from_millis(600);
    let endpoint = |url: String| S3Options { endpoint: Some(url), ..options.clone() };

    let text = opening(S3Options { bucket: "no-such-bucket-here".to_owned(), ..options.clone() }).await;
    assert!(text.contains("there is no such bucket"), "{text}");

    let upstream = options.endpoint.as_deref().unwrap().strip_prefix("http://").unwrap();
    let proxy = Proxy::start(upstream.parse().unwrap()).await;
    proxy.next("PUT", Trouble::BreakSignature);
    let text = opening(endpoint(proxy.url())).await;
    assert!(text.contains("Denied") && text.contains("secret key is wrong"), "{text}");

    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let text = opening(endpoint(format!("http://{unused}"))).await;
    assert!(text.contains("Unavailable") && text.contains(&unused.to_string()), "{text}");

    let text = opening(endpoint(start_yes_man().await)).await;
    assert!(text.contains("ignores If-None-Match"), "{text}");
}

#[tokio::test]
async fn readers_see_bytes_of_a_plain_http_client() {
    let Some(options) = options() else { return };
    let store = S3Store::connect(options).await;
    store.put("key with spaces/and+plus", Bytes::from_static(b"x"), PutMode::Create).await.unwrap();
    let listed = store.list("key w", None).await.unwrap();
    assert_eq!(listed[0].key, "key with spaces/and+plus");
    assert_eq!(store.get(&listed[0].key).await.unwrap().0, Bytes::from_static(b"x"));
    store.delete(&[listed[0].key.clone()]).await.unwrap();
    assert_eq!(store.list("", None).await.unwrap(), []);
}
