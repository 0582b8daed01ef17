//! Memory of a daemon that serves a big, thoroughly fragmented volume.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use blockd::buf::AlignedBuf;
use blockd::chunk::{ChunkDraft, ChunkName, Codec, Piece};
use blockd::export::nbd::client::Request;
use blockd::store::{self, ObjectStore, PutMode, StoreConfig};
use blockd::table::{Applied, Table, simulate};
use blockd::types::{BLOCK, BLOCK_SIZE, VolumeId};

use crate::report::{Better, Case};
use crate::server::{BlockdOptions, Kind, Server};

/// The case's name.
pub const NAME: &str = "memory, 1 TiB volume with 100 GiB of random 4 KiB blocks";
const VOLUME_BYTES: u64 = 1 << 40;
const MAPPED_BYTES: u64 = 100 << 30;
/// Memory the simulation may use, in bytes.
const SIMULATION_MEMORY: usize = 256 << 20;
/// Most bytes of one block status request.
const STATUS_BYTES: u64 = 1 << 31;

/// Fills the table of a fresh volume as months of random writes would have, and weighs the daemon that serves it: idle,
/// and after the allocation of the whole volume was asked for.
pub fn run(options: &BlockdOptions, dir: &Path) -> Result<Vec<Case>> {
    let dir = tempfile::Builder::new().prefix("memory-").tempdir_in(dir)?;
    let mut server = Server::create(Kind::Blockd(options.clone()), dir.path(), VOLUME_BYTES, false)?;
    let id = volume_id(&server.volume_status(options)?.id)?;
    server.stop()?;
    let table = dir.path().join(format!("data/volumes/{id}/table"));
    ensure!(table.is_dir(), "there is no table in {}", table.display());
    let table = Table::open(&table, SIMULATION_MEMORY, id)?;
    let applied = simulate(&table, VOLUME_BYTES / BLOCK_SIZE, MAPPED_BYTES / BLOCK_SIZE, 1)?;
    drop(table);
    put_last_chunk(&dir.path().join("data/bucket"), id, applied)?;
    server.start()?;
    let idle = resident_mib(&server)?;
    let runs = walk(&server).with_context(|| format!("blockd said:\n{}", server.log_tail()))?;
    // The simulation maps about a tenth of the blocks at random: most of them are runs of their own.
    ensure!(runs > MAPPED_BYTES / BLOCK_SIZE, "the daemon knows of {runs} runs only");
    let walked = resident_mib(&server)?;
    let case = |what: &str, value| {
        Case::new(format!("{NAME}, {what}"), "MiB", Some(value), ("the limit", 300.0), Some(1.0), Better::Less)
    };
    Ok(vec![case("idle", idle), case("after its whole block status", walked)])
}

/// Puts the chunk that the table says was the last, because opening a volume looks for it. The ones before it are not
/// looked at as long as nobody reads.
fn put_last_chunk(bucket: &Path, volume: VolumeId, applied: Applied) -> Result<()> {
    let name = ChunkName { volume, epoch: 1, seq: applied.seq };
    let draft = ChunkDraft {
        name,
        first_lsn: applied.lsn,
        last_lsn: applied.lsn,
        codec: Codec::Lz4,
        created_ms: 0,
        pieces: vec![Piece::Data { lba: 0, data: AlignedBuf::zeroed(BLOCK).into() }],
    };
    let bytes = draft.encode(None)?.bytes;
    let url = format!("dir:{}", bucket.canonicalize()?.display());
    tokio::runtime::Runtime::new()?.block_on(async {
        let store = store::open(&StoreConfig::new(url)).await?;
        store.put(&name.key(), bytes, PutMode::Create).await?;
        Ok(())
    })
}

fn volume_id(hex: &str) -> Result<VolumeId> {
    let bytes = u128::from_str_radix(hex, 16).with_context(|| format!("{hex:?} is no volume id"))?;
    Ok(VolumeId(bytes.to_be_bytes()))
}

fn resident_mib(server: &Server) -> Result<f64> {
    let pid = server.pid().context("the server does not run")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.context("no VmRSS")? / 1024.0)
}

/// Asks for the allocation of everything; the number of runs.
fn walk(server: &Server) -> Result<u64> {
    let mut client = server.connect()?;
    let (mut at, mut runs) = (0, 0);
    while at < VOLUME_BYTES {
        let len = STATUS_BYTES.min(VOLUME_BYTES - at) as u32;
        client.submit(Request::BlockStatus { offset: at, len })?;
        let (_, result) = client.next_reply()?;
        let blockd::export::nbd::client::ReplyData::Extents(extents) = result? else {
            anyhow::bail!("no extents in answer to a block status");
        };
        runs += extents.len() as u64;
        at += extents.iter().map(|extent| u64::from(extent.len)).sum::<u64>();
    }
    Ok(runs)
}
