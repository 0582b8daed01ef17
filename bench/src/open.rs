//! `bench open` and `bench checkpoint`: volumes on a new host, and what it costs to be ready for that.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blockd::buf::AlignedBuf;
use blockd::checkpoint::make::Ask;
use blockd::checkpoint::{Keeper, Made, collect};
use blockd::chunk::{ChunkDraft, ChunkName, Codec, Piece};
use blockd::manifest::{self, EpochStart, Manifest};
use blockd::outgoing::Outgoing;
use blockd::store::{self, CountedStore, ObjectStore, PutMode, StoreConfig};
use blockd::table::{Table, TableHome, random_chunk, simulate};
use blockd::types::{BLOCK, BLOCK_SIZE, VolumeId};
use blockd::volume::{Blocking, Effect, OpenOptions, Outcome, ReadNow, Token, Tuning, Volume, wall_ms};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const MEMORY_BYTES: usize = 256 << 20;
/// Blocks of each chunk after the checkpoint.
const CHUNK_BLOCKS: u64 = 4096;

/// Options of `bench open`.
#[derive(Debug, clap::Args)]
pub struct OpenArgs {
    /// The bucket: dir:PATH or s3://BUCKET[/PREFIX] [default: a directory below --dir].
    #[arg(long)]
    store: Option<String>,
    /// Address of an S3-compatible store.
    #[arg(long)]
    endpoint: Option<String>,
    /// Size of the volume, in GiB.
    #[arg(long, default_value_t = 1024)]
    volume_gib: u64,
    /// Of these, so many hold random single blocks, in GiB.
    #[arg(long, default_value_t = 100)]
    mapped_gib: u64,
    /// Chunks after the checkpoint, each of 16 MiB of random 4 KiB writes.
    #[arg(long, default_value_t = 128)]
    chunks: u64,
    /// Where the two hosts keep their files.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
}

/// Options of `bench checkpoint`.
#[derive(Debug, clap::Args)]
pub struct CostArgs {
    /// Size of the volume that is overwritten at random, in GiB.
    #[arg(long, default_value_t = 16)]
    volume_gib: u64,
    /// Of these, so many hold random single blocks when it begins, in GiB; 0 for an empty volume.
    #[arg(long, default_value_t = 0)]
    mapped_gib: u64,
    /// Bytes written, in GiB.
    #[arg(long, default_value_t = 32)]
    written_gib: u64,
    /// `checkpoint-chunks`.
    #[arg(long, default_value_t = 256)]
    checkpoint_chunks: u64,
    /// Where the table and the bucket are.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
}

/// A store, and whatever of it must be removed at the end.
async fn open_store(url: Option<&str>, endpoint: Option<&str>, dir: &std::path::Path) -> Result<Arc<CountedStore>> {
    let url = match url {
        Some(url) => url.to_owned(),
        None => {
            let bucket = dir.join("bucket");
            std::fs::create_dir_all(&bucket)?;
            format!("dir:{}", bucket.canonicalize()?.display())
        }
    };
    store::open(&StoreConfig { endpoint: endpoint.map(str::to_owned), ..StoreConfig::new(url) }).await
}

async fn make_volume(store: &dyn ObjectStore, gib: u64) -> Result<Manifest> {
    let id = VolumeId::random();
    let manifest = Manifest {
        codec: Codec::None,
        created_ms: wall_ms(),
        epochs: vec![EpochStart { epoch: 1, first_seq: 1, first_lsn: 1, owner: [1; 16], opened_ms: wall_ms() }],
        ..Manifest::new(id, format!("bench-{id}"), gib << 30)
    };
    manifest::create(store, &manifest).await?;
    Ok(manifest)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Fills a table as months of random writes would have, copies it to the bucket, and opens the volume from there.
pub fn open(args: &OpenArgs) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("open-").tempdir_in(&args.dir)?;
    runtime()?.block_on(async {
        let store = open_store(args.store.as_deref(), args.endpoint.as_deref(), dir.path()).await?;
        let manifest = make_volume(store.as_ref(), args.volume_gib).await?;
        let result = open_on_two_hosts(args, dir.path(), &store, &manifest).await;
        let (now, _) = manifest::load(store.as_ref(), &manifest.name).await?;
        let last_epoch = now.epochs.last().map_or(0, |last| last.epoch);
        blockd::volume::delete(store.as_ref(), &manifest.name, last_epoch, None, |_, _| {}).await?;
        result
    })
}

async fn open_on_two_hosts(
    args: &OpenArgs,
    dir: &std::path::Path,
    store: &Arc<CountedStore>,
    manifest: &Manifest,
) -> Result<()> {
    let id = manifest.id;
    let home = TableHome::Dir { dir: dir.join("first"), memory_bytes: MEMORY_BYTES };
    let table = Arc::new(home.open(id)?);
    let blocks = manifest.size / BLOCK_SIZE;
    let applied = simulate(&table, blocks, (args.mapped_gib << 30) / BLOCK_SIZE, 1)?;
    let mut keeper = Keeper::new(&manifest.name, id, 1, None, None, None);
    let begun = Instant::now();
    let ask = Ask {
        store: store.as_ref(),
        table: &table,
        blocking: Blocking::Threads,
        budget_bytes: None,
        now_ms: wall_ms(),
        stop: &|| false,
    };
    let Made::Durable { sent_bytes, .. } = keeper.make(ask).await? else { bail!("the checkpoint is too dear") };
    println!("checkpoint sent            {:10.1} MiB in {:.2} s", mib(sent_bytes), begun.elapsed().as_secs_f64());
    drop(table);

    // What was written since, for real.
    let mut rng = SmallRng::seed_from_u64(2);
    let mut written = Vec::new();
    for seq in applied.seq + 1..=applied.seq + args.chunks {
        let mut lbas: Vec<u64> = (0..CHUNK_BLOCKS).map(|_| rng.random_range(0..blocks)).collect();
        lbas.sort_unstable();
        lbas.dedup();
        let lsn = applied.lsn + 1 + (seq - applied.seq - 1) * CHUNK_BLOCKS;
        let block = |lba: u64| {
            let mut data = AlignedBuf::zeroed(BLOCK);
            data[..8].copy_from_slice(&(seq << 32 | lba).to_le_bytes());
            Piece::Data { lba, data: data.into() }
        };
        let draft = ChunkDraft {
            name: ChunkName { volume: id, epoch: 1, seq },
            first_lsn: lsn,
            last_lsn: lsn + CHUNK_BLOCKS - 1,
            codec: Codec::Lz4,
            created_ms: wall_ms(),
            pieces: lbas.iter().map(|lba| block(*lba)).collect(),
        };
        store.put(&draft.name.key(), draft.encode(None)?.bytes, PutMode::Create).await?;
        written.push((seq, lbas));
    }
    let (seq, lbas) = written.last().context("there must be a chunk after the checkpoint")?;

    let before = store.counters();
    let begun = Instant::now();
    let options = OpenOptions {
        store: store.clone(),
        name: manifest.name.clone(),
        dir: dir.join("second"),
        owner: [2; 16],
        log_bytes: 64 << 20,
        segment_bytes: 16 << 20,
        table_memory_bytes: 64 << 20,
        frame_cache: None,
        tuning: Tuning::default(),
        rebuild: false,
        progress: Arc::default(),
        keys: None,
        last_epoch: 1,
    };
    let (mut volume, report) = Volume::open(options).await?;
    let opened = begun.elapsed();
    read_one(&mut volume, lbas[0], seq << 32 | lbas[0]).await?;
    let first_read = begun.elapsed();
    let after = store.counters();
    println!("table came from            {:?}", report.table);
    println!("headers applied            {:10}", report.chunks_applied);
    println!("requests                   {:10} GETs, {} PUTs", after.gets - before.gets, after.puts - before.puts);
    println!("bytes from the bucket      {:10.1} MiB", mib(after.bytes_read - before.bytes_read));
    println!("open                       {:10.2} s", opened.as_secs_f64());
    println!("first read answered after  {:10.2} s", first_read.as_secs_f64());
    drop(volume);
    Ok(())
}

/// Reads one block, which begins with `expected`, as a driver would.
async fn read_one(volume: &mut Volume, lba: u64, expected: u64) -> Result<()> {
    let mut out = Outgoing::new();
    match volume.read(Token(1), lba * BLOCK_SIZE, BLOCK as u32, &mut out) {
        ReadNow::Ready { .. } => {}
        ReadNow::Failed(error) => bail!("the read failed: {error}"),
        ReadNow::Pending => loop {
            match volume.next_effect() {
                Some(Effect::Spawn(job)) => {
                    let done = job.await;
                    volume.job_done(done);
                }
                Some(Effect::Complete(done)) if done.token == Token(1) => {
                    let Outcome::Data(data) = done.result.map_err(|e| anyhow::anyhow!("the read failed: {e}"))? else {
                        bail!("a read was answered without data");
                    };
                    out = data.bytes;
                    break;
                }
                Some(_) => {}
                None => tokio::time::sleep(Duration::from_micros(100)).await,
            }
        },
    }
    ensure!(out.to_vec()[..8] == expected.to_le_bytes(), "the read returned something else");
    Ok(())
}

/// Applies chunk after chunk of random writes to a table, and makes checkpoints of it as an open volume does.
pub fn cost(args: &CostArgs) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("checkpoint-").tempdir_in(&args.dir)?;
    runtime()?.block_on(async {
        let store = open_store(None, None, dir.path()).await?;
        let manifest = make_volume(store.as_ref(), args.volume_gib).await?;
        let home = TableHome::Dir { dir: dir.path().join("host"), memory_bytes: 64 << 20 };
        let table = Arc::new(home.open(manifest.id)?);
        let blocks = manifest.size / BLOCK_SIZE;
        let mut keeper = Keeper::new(&manifest.name, manifest.id, 1, None, None, None);
        if args.mapped_gib > 0 {
            simulate(&table, blocks, (args.mapped_gib << 30) / BLOCK_SIZE, 1)?;
            // What stood there before is no cost of what is written now.
            attempt(&mut keeper, &store, &table, None).await?;
        }
        count(args, &store, &manifest, &table, &mut keeper).await
    })
}

async fn attempt(
    keeper: &mut Keeper,
    store: &Arc<CountedStore>,
    table: &Arc<Table>,
    budget_bytes: Option<u64>,
) -> Result<Made> {
    let ask = Ask {
        store: store.as_ref(),
        table,
        blocking: Blocking::Threads,
        budget_bytes,
        now_ms: wall_ms(),
        stop: &|| false,
    };
    Ok(keeper.make(ask).await?)
}

async fn count(
    args: &CostArgs,
    store: &Arc<CountedStore>,
    manifest: &Manifest,
    table: &Arc<Table>,
    keeper: &mut Keeper,
) -> Result<()> {
    let mut rng = SmallRng::seed_from_u64(3);
    let (mut written, mut since, mut chunks, mut cost) = (0u64, 0u64, 0u64, 0u64);
    let (mut sent, mut made, mut longest) = (0u64, 0u64, 0u64);
    let blocks = manifest.size / BLOCK_SIZE;
    while written < args.written_gib << 30 {
        let seq = table.applied().seq + 1;
        let mut index = random_chunk(manifest.id, 1, seq, blocks, &mut rng);
        // The simulation counts LSNs in its own way.
        index.first_lsn = table.applied().lsn + 1;
        index.last_lsn = index.first_lsn + CHUNK_BLOCKS - 1;
        table.apply(&index)?;
        written += CHUNK_BLOCKS * BLOCK_SIZE;
        since += index.object_len();
        chunks += 1;
        // The rule of an open volume.
        let rule = blockd::volume::CheckpointRule { changes: chunks, bytes: since, cost, waiting: 0 };
        let Some(budget) = rule.due(args.checkpoint_chunks) else { continue };
        match attempt(keeper, store, table, budget).await? {
            Made::TooDear { bytes } => cost = bytes,
            Made::Durable { sent_bytes, garbage, .. } => {
                collect::collect(store.as_ref(), &manifest.name, 1, None, &garbage).await?;
                longest = longest.max(chunks);
                (sent, made) = (sent + sent_bytes, made + 1);
                (since, chunks, cost) = (0, 0, 0);
            }
        }
    }
    println!("written                 {:10.1} GiB of random 4 KiB over {} GiB", mib(written) / 1024.0, args.volume_gib);
    println!("table files             {:10.1} MiB", mib(table.stats().file_bytes));
    println!("checkpoints             {made:10}, at most {longest} chunks apart");
    println!(
        "sent for them           {:10.1} MiB, {:.2} % of what was written",
        mib(sent),
        100.0 * sent as f64 / written as f64
    );
    println!("chunks since the last   {chunks:10}");
    Ok(())
}
