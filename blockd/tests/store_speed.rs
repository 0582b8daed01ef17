//! How fast stores move chunks. Not run by default:
//! `cargo test --release -p blockd --test store_speed -- --ignored --nocapture`

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockd::store::{DirStore, ObjectStore, PutMode, S3Options, S3Store};
use common::pattern;
use futures::stream::{self, StreamExt};

/// Processor time of this process so far, seconds.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let ticks: u64 =
        stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2).map(|t| t.parse::<u64>().unwrap()).sum();
    ticks as f64 / 100.0
}

async fn measure(store: Arc<dyn ObjectStore>, name: &str, size: usize, count: usize, at_once: usize) {
    let body = pattern(size as u64, size);
    let keys: Vec<String> = (0..count).map(|n| format!("speed/{size}/{:02x}/{n}", n % 16)).collect();
    let report = |what: &str, begun: Instant, cpu: f64| {
        let s = begun.elapsed().as_secs_f64();
        let mb = (size * count) as f64 / 1e6;
        println!(
            "{name:4} {what:3} {:6} KiB x{at_once:2}: {:7.0} MB/s {:6.0} /s, cpu {:.2} s per GB",
            size >> 10,
            mb / s,
            count as f64 / s,
            (cpu_s() - cpu) / mb * 1e3
        );
    };
    let (begun, cpu) = (Instant::now(), cpu_s());
    let puts = stream::iter(&keys).map(|key| {
        let (store, key, body) = (store.clone(), key.clone(), body.clone());
        async move { tokio::spawn(async move { store.put(&key, body, PutMode::Create).await }).await.unwrap().unwrap() }
    });
    puts.buffer_unordered(at_once).collect::<Vec<_>>().await;
    report("put", begun, cpu);
    let (begun, cpu) = (Instant::now(), cpu_s());
    let gets = stream::iter(&keys).map(|key| {
        let (store, key) = (store.clone(), key.clone());
        async move { tokio::spawn(async move { store.get(&key).await }).await.unwrap().unwrap() }
    });
    gets.buffer_unordered(at_once).collect::<Vec<_>>().await;
    report("get", begun, cpu);
    store.delete(&keys).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures; run it alone"]
async fn speed_of_dir_store() {
    let top = std::env::var_os("BLOCKD_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(top).unwrap();
    let store = Arc::new(DirStore::open(dir.path()).unwrap());
    measure(store.clone(), "dir", 16 << 20, 128, 8).await;
    measure(store.clone(), "dir", 16 << 20, 32, 1).await;
    measure(store.clone(), "dir", 1 << 20, 512, 8).await;
    measure(store, "dir", 4 << 10, 4000, 16).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures; run it alone"]
async fn speed_of_s3_store() {
    let (Ok(endpoint), Ok(bucket)) = (std::env::var("BLOCKD_TEST_S3_ENDPOINT"), std::env::var("BLOCKD_TEST_S3_BUCKET"))
    else {
        println!("skipped: no S3 server; run  eval \"$(scripts/dev-s3 start)\"  first");
        return;
    };
    let options = S3Options {
        endpoint: Some(endpoint),
        path_style: true,
        request_timeout: Duration::from_secs(30),
        ..S3Options::new(bucket, format!("speed-{}", uuid::Uuid::new_v4().simple()))
    };
    let store = Arc::new(S3Store::connect(options).await);
    measure(store.clone(), "s3", 16 << 20, 48, 4).await;
    measure(store.clone(), "s3", 4 << 20, 128, 4).await;
    measure(store, "s3", 4 << 10, 2000, 16).await;
}
