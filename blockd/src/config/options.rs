//! Every setting of `blockd serve`.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{ByteSize, Interval};
use crate::store::StoreConfig;

/// Settings of the daemon. Names of fields, with dashes, are the flags and the keys of the file.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Config {
    /// Directory for the log, the tables and the caches; made when absent. Its disk decides how fast a flush is
    #[arg(
        long,
        value_name = "DIR",
        default_value = "blockd-data",
        env = "BLOCKD_DATA",
        help_heading = "Where data lives"
    )]
    pub data: PathBuf,

    /// The bucket: dir:PATH, s3://BUCKET or s3://BUCKET/PREFIX [default: dir:<data>/bucket]
    #[arg(long, value_name = "URL", help_heading = "Where data lives")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,

    /// Serve only these volumes, separated by commas [default: every volume in the store]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', help_heading = "Where data lives")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Vec<String>>,

    /// URL of an S3-compatible server [default: as the AWS configuration says]
    #[arg(long, value_name = "URL", help_heading = "S3")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3_endpoint: Option<String>,

    /// Region of the bucket [default: as the AWS configuration says]
    #[arg(long, value_name = "REGION", help_heading = "S3")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3_region: Option<String>,

    /// Profile of the AWS configuration to take credentials from [default: as the AWS configuration says]
    #[arg(long, value_name = "NAME", help_heading = "S3")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3_profile: Option<String>,

    /// Put the bucket into the path of requests, not the host name [default: with an endpoint true, else false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", help_heading = "S3")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3_path_style: Option<bool>,

    /// How long one request may take, beside what its size needs
    #[arg(long, value_name = "TIME", default_value = "10s", help_heading = "S3")]
    pub s3_timeout: Interval,

    /// How long another host leaves a volume alone after this one was last heard of. Renewed five times in that time
    #[arg(long, value_name = "TIME", default_value = "5m", help_heading = "Ownership")]
    pub lease: Interval,

    /// When stopped, send everything to the bucket and let go of all volumes, so that another host can have them
    #[arg(long, help_heading = "Ownership")]
    pub release_on_stop: bool,

    /// Unix socket for NBD clients, or none [default: <data>/nbd.sock]
    #[arg(long, value_name = "PATH", help_heading = "Network")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd_unix: Option<Listen<PathBuf>>,

    /// TCP addresses for NBD clients, separated by commas, or none. NBD has no passwords: who reaches it can write
    #[arg(
        long,
        value_name = "ADDR,...",
        default_value = "127.0.0.1:10809",
        value_delimiter = ',',
        help_heading = "Network"
    )]
    pub nbd_tcp: Vec<Listen<SocketAddr>>,

    /// TCP addresses for NVMe/TCP hosts, separated by commas, or none. Without --nvme-host who reaches it can write
    #[arg(long, value_name = "ADDR,...", default_value = "none", value_delimiter = ',', help_heading = "Network")]
    pub nvme: Vec<Listen<SocketAddr>>,

    /// Only hosts of these names may connect to a volume over NVMe/TCP. May be given several times
    #[arg(long, value_name = "NAME=NQN", help_heading = "Network")]
    pub nvme_host: Vec<VolumeNqn>,

    /// Name of a volume among NVMe/TCP hosts, in place of the one made from its identity
    #[arg(long, value_name = "NAME=NQN", help_heading = "Network")]
    pub nvme_nqn: Vec<VolumeNqn>,

    /// Leave snapshots out of what NVMe/TCP hosts discover, so that a host that connects to all it finds does not connect
    /// to them; by their names they can be reached all the same
    #[arg(long, help_heading = "Network")]
    pub nvme_hide_snapshots: bool,

    /// TCP address for Prometheus (GET /metrics), or none; the admin socket always has it
    #[arg(long, value_name = "ADDR", default_value = "none", help_heading = "Network")]
    pub metrics: Listen<SocketAddr>,

    /// Unix socket for the other blockd commands [default: <data>/admin.sock]
    #[arg(long, value_name = "PATH", help_heading = "Network")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin: Option<PathBuf>,

    /// Most log one volume may use: how much it can be behind the bucket before its writers wait. Space is taken as needed
    #[arg(long, value_name = "SIZE", default_value = "4GiB", help_heading = "Write-ahead log")]
    pub log_size: ByteSize,

    /// Size of a log segment; cannot be changed while volumes have a log
    #[arg(long, value_name = "SIZE", default_value = "64MiB", help_heading = "Write-ahead log")]
    pub log_segment: ByteSize,

    /// How the log is written: by the ring of the thread that serves the socket, or by a thread of its own
    #[arg(long, value_name = "SHAPE", default_value = "ring", help_heading = "Write-ahead log")]
    pub log_shape: LogShape,

    /// How old a write may grow before it is sent to the bucket, however little there is to send
    #[arg(long, value_name = "TIME", default_value = "5s", help_heading = "Destaging")]
    pub destage_age: Interval,

    /// Payload of a chunk, for volumes created without a size of their own
    #[arg(long, value_name = "SIZE", default_value = "16MiB", help_heading = "Destaging")]
    pub chunk_size: ByteSize,

    /// Chunks after which a copy of the translation table goes to the bucket, so that another host need not read the
    /// headers of all of them
    #[arg(
        long,
        value_name = "N",
        default_value = "256",
        value_parser = clap::value_parser!(u32).range(1..),
        help_heading = "Destaging"
    )]
    pub checkpoint_chunks: u32,

    /// Time after which it goes there if anything changed
    #[arg(long, value_name = "TIME", default_value = "10m", help_heading = "Destaging")]
    pub checkpoint_age: Interval,

    /// Bytes per second that one volume's compaction may read and write to get dead space in the bucket back; 0 turns it off
    #[arg(long, value_name = "SIZE", default_value = "64MiB", help_heading = "Space in the bucket")]
    pub compaction_rate: ByteSize,

    /// Compaction works while chunks take more than this many times what lives in them. Lower takes less space and more
    /// traffic
    #[arg(long, value_name = "N", default_value = "1.5", help_heading = "Space in the bucket")]
    pub compaction_ratio: f64,

    /// How long dead chunks are kept after a checkpoint has proved them dead; longer than a read or a follower may take
    #[arg(long, value_name = "TIME", default_value = "1m", help_heading = "Space in the bucket")]
    pub delete_grace: Interval,

    /// How long objects that only old checkpoints need are kept; longer than an opening or a follower takes to fetch one
    #[arg(long, value_name = "TIME", default_value = "5m", help_heading = "Space in the bucket")]
    pub checkpoint_grace: Interval,

    /// How often a view VOLUME@latest looks for what its volume's owner has added to the bucket; a third of delete-grace at
    /// most
    #[arg(long, value_name = "TIME", default_value = "2s", help_heading = "Volumes of other hosts")]
    pub follow_interval: Interval,

    /// How long a read waits for a bucket that is away; then it fails, which a filesystem takes for a broken disk
    #[arg(long, value_name = "TIME", default_value = "10m", help_heading = "Memory and caches")]
    pub read_patience: Interval,

    /// Memory for writes that are not in the bucket yet, all volumes together; beyond it they are read from the log
    /// [default: a 16th of the memory]
    #[arg(long, value_name = "SIZE", help_heading = "Memory and caches")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_memory: Option<ByteSize>,

    /// Memory for recently read blocks, all volumes together [default: an 8th of the memory]
    #[arg(long, value_name = "SIZE", help_heading = "Memory and caches")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_cache: Option<ByteSize>,

    /// Of what a client reads in order, the most that is kept in memory behind it; the rest is in the read cache, and kept in
    /// memory when it is read a second time [default: a 16th of block-cache, at least 64MiB]
    #[arg(long, value_name = "SIZE", help_heading = "Memory and caches")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_sequential: Option<ByteSize>,

    /// Memory for the translation tables, all volumes together
    #[arg(long, value_name = "SIZE", default_value = "64MiB", help_heading = "Memory and caches")]
    pub table_memory: ByteSize,

    /// Disk space for what was read from the bucket; 0 turns it off [default: 16GiB, on a dir: store 0]
    #[arg(long, value_name = "SIZE", help_heading = "Memory and caches")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_cache: Option<ByteSize>,

    /// Memory in front of the read cache
    #[arg(long, value_name = "SIZE", default_value = "32MiB", help_heading = "Memory and caches")]
    pub read_cache_memory: ByteSize,

    /// What unlocks an encrypted volume: its key file. May be given for several volumes
    #[arg(long, value_name = "NAME=PATH", help_heading = "Encryption")]
    pub key_file: Vec<VolumeFile>,

    /// What unlocks an encrypted volume: a file with its passphrase. May be given for several volumes
    #[arg(long, value_name = "NAME=PATH", help_heading = "Encryption")]
    pub passphrase_file: Vec<VolumeFile>,

    /// Threads that serve sockets and the log [default: half of the processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "Threads")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reactors: Option<u16>,

    /// Threads for compression, tables and requests to the store [default: one per processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "Threads")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workers: Option<u16>,

    /// What is logged to stderr
    #[arg(long, value_name = "LEVEL", default_value = "info", help_heading = "Messages")]
    pub log_level: LogLevel,
}

impl Config {
    /// The store, given or embedded.
    pub fn store_url(&self) -> String {
        let embedded = || format!("dir:{}", self.data.join("bucket").display());
        self.store.clone().unwrap_or_else(embedded)
    }

    /// The store and how to reach it, as the store itself wants it said. A relative directory counts from the working
    /// directory.
    pub fn store_config(&self) -> StoreConfig {
        let url = self.store_url();
        let absolute = url.strip_prefix("dir:").and_then(|dir| std::path::absolute(dir).ok());
        let on_s3 = url.starts_with("s3://");
        StoreConfig {
            endpoint: self.s3_endpoint.clone(),
            region: self.s3_region.clone(),
            path_style: self.s3_path_style,
            profile: self.s3_profile.clone(),
            request_timeout_s: on_s3.then_some(self.s3_timeout.0.as_secs()),
            ..StoreConfig::new(absolute.map_or(url, |dir| format!("dir:{}", dir.display())))
        }
    }

    /// Path of the NBD Unix socket, if there is to be one.
    pub fn nbd_unix_path(&self) -> Option<PathBuf> {
        match &self.nbd_unix {
            None => Some(self.data.join("nbd.sock")),
            Some(listen) => listen.on().cloned(),
        }
    }

    /// Addresses for NBD over TCP.
    pub fn nbd_tcp_addrs(&self) -> Vec<SocketAddr> {
        self.nbd_tcp.iter().filter_map(|l| l.on().copied()).collect()
    }

    /// Addresses for NVMe/TCP.
    pub fn nvme_addrs(&self) -> Vec<SocketAddr> {
        self.nvme.iter().filter_map(|l| l.on().copied()).collect()
    }

    /// The hosts that may connect to a volume over NVMe/TCP, if not all may.
    pub fn nvme_hosts(&self, volume: &str) -> Option<Vec<String>> {
        let hosts: Vec<String> =
            self.nvme_host.iter().filter(|host| host.volume == volume).map(|host| host.nqn.clone()).collect();
        (!hosts.is_empty()).then_some(hosts)
    }

    /// Path of the admin socket.
    pub fn admin_path(&self) -> PathBuf {
        admin_path(&self.data, self.admin.as_deref())
    }

    /// Disk space of the read cache; 0 means none.
    pub fn read_cache_size(&self) -> ByteSize {
        let default = if self.on_s3() { ByteSize::gib(16) } else { ByteSize(0) };
        self.read_cache.unwrap_or(default)
    }

    fn on_s3(&self) -> bool {
        self.store_url().starts_with("s3://")
    }

    /// Memory for writes that are not in the bucket yet.
    pub fn dirty_memory_size(&self) -> ByteSize {
        self.dirty_memory.unwrap_or_else(|| memory_share(16, ByteSize::gib(4)))
    }

    /// Memory for recently read blocks.
    pub fn block_cache_size(&self) -> ByteSize {
        self.block_cache.unwrap_or_else(|| memory_share(8, ByteSize::gib(16)))
    }

    /// What is kept of what a client reads in order.
    pub fn keep_sequential_size(&self) -> ByteSize {
        self.keep_sequential.unwrap_or_else(|| ByteSize(self.block_cache_size().0 / 16).max(ByteSize::mib(64)))
    }

    /// Chunks a volume stores at the same time. On S3 each waits for the network; in a directory more of them only
    /// make the log wait for the disk.
    pub fn puts_max(&self) -> usize {
        if self.on_s3() { 4 } else { 2 }
    }

    /// Number of reactor threads.
    pub fn reactor_count(&self) -> usize {
        self.reactors.map_or_else(|| (processors() / 2).max(1), usize::from)
    }

    /// Number of worker threads.
    pub fn worker_count(&self) -> usize {
        self.workers.map_or_else(processors, usize::from)
    }

    /// The same settings with every default spelt out.
    pub fn resolved(&self) -> Self {
        let count = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        Self {
            store: Some(self.store_url()),
            nbd_unix: Some(self.nbd_unix_path().map_or(Listen::None, Listen::On)),
            admin: Some(self.admin_path()),
            dirty_memory: Some(self.dirty_memory_size()),
            block_cache: Some(self.block_cache_size()),
            keep_sequential: Some(self.keep_sequential_size()),
            read_cache: Some(self.read_cache_size()),
            reactors: Some(count(self.reactor_count())),
            workers: Some(count(self.worker_count())),
            ..self.clone()
        }
    }

    /// Says what does not go together, by the names of the settings.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn check(&self) -> Result<(), String> {
        let block = crate::types::BLOCK_SIZE;
        if self.log_segment < ByteSize::mib(1) || !self.log_segment.0.is_multiple_of(block) {
            return Err(format!(
                "log-segment is {}; it must be at least 1MiB and a multiple of {block} bytes",
                self.log_segment
            ));
        }
        // One segment is being filled, one is destaged, one is ready to be taken.
        if self.log_size.0 / self.log_segment.0 < 3 {
            return Err(format!(
                "log-size is {}; it must hold at least three segments of {} (log-segment)",
                self.log_size, self.log_segment
            ));
        }
        check_chunk_size(self.chunk_size)?;
        if let Some(size) = self.dirty_memory
            && size < ByteSize::mib(1)
        {
            return Err(format!("dirty-memory is {size}; it must be at least 1MiB"));
        }
        if self.destage_age.0.is_zero() {
            return Err("destage-age must be longer than 0s".into());
        }
        let day = std::time::Duration::from_secs(86400);
        if !(std::time::Duration::from_secs(1)..=day).contains(&self.lease.0) {
            return Err(format!("lease is {}; it must be from 1s to 24h", self.lease));
        }
        if !(1.1..=10.0).contains(&self.compaction_ratio) {
            return Err(format!("compaction-ratio is {}; it must be from 1.1 to 10", self.compaction_ratio));
        }
        if self.delete_grace.0 < std::time::Duration::from_secs(30) {
            return Err(format!("delete-grace is {}; it must be at least 30s", self.delete_grace));
        }
        if self.checkpoint_grace.0 < std::time::Duration::from_secs(10) {
            return Err(format!("checkpoint-grace is {}; it must be at least 10s", self.checkpoint_grace));
        }
        if self.follow_interval.0.is_zero() || self.follow_interval.0 > self.delete_grace.0 / 3 {
            return Err(format!(
                "follow-interval is {}; it must be more than nothing and at most a third of delete-grace ({})",
                self.follow_interval, self.delete_grace
            ));
        }
        if self.s3_timeout.0.as_secs() == 0 {
            return Err("s3-timeout must be at least 1s".into());
        }
        let mut named = std::collections::BTreeSet::new();
        for file in self.key_file.iter().chain(&self.passphrase_file) {
            if !named.insert(&file.volume) {
                return Err(format!(
                    "key-file and passphrase-file name more than one file for volume {:?}; one unlocks it",
                    file.volume
                ));
            }
        }
        let (mut volumes, mut names) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
        for name in &self.nvme_nqn {
            if name.nqn == crate::export::nvme::DISCOVERY_NQN {
                return Err("nvme-nqn gives a volume the name of the discovery subsystem; choose another".into());
            }
            if !volumes.insert(&name.volume) || !names.insert(&name.nqn) {
                return Err(format!("nvme-nqn names volume {:?} or {} twice", name.volume, name.nqn));
            }
        }
        if self.nbd_unix_path().is_none() && self.nbd_tcp_addrs().is_empty() && self.nvme_addrs().is_empty() {
            return Err("nbd-unix, nbd-tcp and nvme are all none, so nobody could attach a volume".into());
        }
        Ok(())
    }
}

/// What a chunk may carry, in bytes as a manifest counts them. Smaller ones cost too many requests, larger ones too much
/// memory and too long a wait.
///
/// # Errors
/// A sentence for the user.
pub fn check_chunk_size(size: ByteSize) -> Result<u32, String> {
    let fits =
        (ByteSize::mib(1)..=ByteSize::mib(64)).contains(&size) && size.0.is_multiple_of(crate::types::BLOCK_SIZE);
    let bytes = u32::try_from(size.0).ok().filter(|_| fits);
    bytes.ok_or_else(|| format!("the chunk size is {size}; it must be from 1MiB to 64MiB and a multiple of 4KiB"))
}

/// Where the admin socket of the daemon on `data` is.
pub fn admin_path(data: &Path, given: Option<&Path>) -> PathBuf {
    given.map_or_else(|| data.join("admin.sock"), Path::to_owned)
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// One `part`th of the memory this process may use, from 64 MiB to `most`, in whole MiB.
fn memory_share(part: u64, most: ByteSize) -> ByteSize {
    let limit = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // SAFETY: plain queries without pointers.
    let (pages, page) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let machine = u64::try_from(pages).unwrap_or(0).saturating_mul(u64::try_from(page).unwrap_or(0));
    // In a container the machine's memory is not ours.
    let ours = limit("/sys/fs/cgroup/memory.max").map_or(machine, |limit| limit.min(machine));
    ByteSize::mib((ours / part) >> 20).clamp(ByteSize::mib(64), most)
}

/// A place to listen, or the word `none`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen<T> {
    /// Do not listen.
    None,
    /// Listen here.
    On(T),
}

impl<T> Listen<T> {
    /// The place, if any.
    pub fn on(&self) -> Option<&T> {
        match self {
            Self::None => None,
            Self::On(place) => Some(place),
        }
    }
}

impl FromStr for Listen<PathBuf> {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "" => Err("write the path of a socket, or none".into()),
            path => Ok(Self::On(PathBuf::from(path))),
        }
    }
}

impl FromStr for Listen<SocketAddr> {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            addr => addr.parse().map(Self::On).map_err(|_| {
                format!("{addr:?} is not an address with a port, such as 127.0.0.1:10809 or [::1]:10809, nor none")
            }),
        }
    }
}

impl fmt::Display for Listen<PathBuf> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::On(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Display for Listen<SocketAddr> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::On(addr) => addr.fmt(f),
        }
    }
}

impl<T> Serialize for Listen<T>
where
    Self: fmt::Display,
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, T> Deserialize<'de> for Listen<T>
where
    Self: FromStr<Err = String>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A file that belongs to a volume, written `NAME=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeFile {
    /// The volume's name.
    pub volume: String,
    /// The file.
    pub path: PathBuf,
}

impl FromStr for VolumeFile {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('=').filter(|(_, path)| !path.is_empty());
        let (volume, path) = parts.ok_or_else(|| format!("{text:?} is not of the form NAME=PATH"))?;
        crate::manifest::check_name(volume).map_err(|e| e.to_string())?;
        Ok(Self { volume: volume.to_owned(), path: path.into() })
    }
}

impl fmt::Display for VolumeFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.volume, self.path.display())
    }
}

impl Serialize for VolumeFile {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for VolumeFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A volume and the NVMe name of something that belongs to it, `NAME=NQN`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeNqn {
    /// The volume's name.
    pub volume: String,
    /// The NVMe name.
    pub nqn: String,
}

impl FromStr for VolumeNqn {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (volume, nqn) = text.split_once('=').ok_or_else(|| format!("{text:?} is not of the form NAME=NQN"))?;
        crate::manifest::check_name(volume).map_err(|e| e.to_string())?;
        crate::export::nvme::check_nqn(nqn)?;
        Ok(Self { volume: volume.to_owned(), nqn: nqn.to_owned() })
    }
}

impl fmt::Display for VolumeNqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.volume, self.nqn)
    }
}

impl Serialize for VolumeNqn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for VolumeNqn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// See `--log-shape`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogShape {
    /// The thread that serves the socket writes the log through its own ring.
    Ring,
    /// One thread writes the logs of all volumes.
    Thread,
}

/// See `--log-level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Only what failed.
    Error,
    /// And what may fail soon.
    Warn,
    /// And what changed.
    Info,
    /// And every connection and chunk.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// As a filter for `tracing`. Libraries below are kept to warnings until somebody debugs.
    pub fn filter(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "warn,blockd=info",
            Self::Debug => "info,blockd=debug",
            Self::Trace => "trace",
        }
    }
}
