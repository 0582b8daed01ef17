//! What a check says.

use serde::Serialize;

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The manifest.
    Manifest,
    /// An object of the checkpoint is missing or not what it was.
    Checkpoint,
    /// This host's translation table is of no use, or does not agree with the bucket.
    LocalTable,
    /// A chunk is not there.
    ChunkMissing,
    /// A chunk's header is damaged.
    ChunkDamaged,
    /// A chunk does not say what the table says of it.
    ChunkDisagrees,
    /// A part of a chunk's payload is damaged.
    FrameDamaged,
    /// An object that nothing refers to.
    Orphan,
}

/// Something wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub kind: Kind,
    /// The object, or the directory.
    pub object: String,
    /// What is wrong, and what to do where that cannot be repaired.
    pub detail: String,
    /// Whether `--repair` can do something about it without risk.
    pub repairable: bool,
    /// What it did, or why it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repair: Option<String>,
    /// Whether it is as good as new.
    pub repaired: bool,
}

/// Everything a check found out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The volume.
    pub volume: String,
    /// Its permanent identity.
    pub id: String,
    /// The newest chunk of its history in the bucket.
    pub last_seq: u64,
    /// The newest LSN there.
    pub last_lsn: u64,
    /// The chunk up to which the checkpoint goes; 0 without one.
    pub checkpoint_seq: u64,
    /// Files of the checkpoint that are sound.
    pub checkpoint_files: u64,
    /// Chunks that hold blocks of the volume, and their bytes.
    pub live_chunks: u64,
    /// See `live_chunks`.
    pub live_bytes: u64,
    /// Chunks of the history that hold nothing the volume still needs, and their bytes.
    pub dead_chunks: u64,
    /// See `dead_chunks`.
    pub dead_bytes: u64,
    /// Objects that nothing refers to yet or any more, too young to be called orphans.
    pub pending_objects: u64,
    /// Blocks the table maps.
    pub mapped_blocks: u64,
    /// Frames whose every byte was verified.
    pub frames_verified: u64,
    /// What else should be known.
    pub notes: Vec<String>,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

impl Report {
    pub(super) fn new(volume: &str) -> Self {
        Self { volume: volume.to_owned(), ..Self::default() }
    }

    pub(super) fn add(&mut self, kind: Kind, object: impl Into<String>, detail: impl Into<String>, repairable: bool) {
        let (object, detail) = (object.into(), detail.into());
        self.findings.push(Finding { kind, object, detail, repairable, repair: None, repaired: false });
    }

    /// Whether nothing is wrong, or nothing any more.
    pub fn is_clean(&self) -> bool {
        self.findings.iter().all(|finding| finding.repaired)
    }
}
