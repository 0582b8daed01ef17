//! What the filesystem must look like: a tree in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use fs_layer::layout::NOTED_MAX;
use fs_layer::vfs::{FileKind, Rename};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub kind: FileKind,
    pub mode: u32,
    pub uid: u32,
    pub links: u32,
    pub parent: u64,
    pub data: Arc<Vec<u8>>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub entries: BTreeMap<Vec<u8>, u64>,
}

/// All files by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    pub nodes: BTreeMap<u64, Arc<Node>>,
    /// The last requests that changed names, ascending.
    pub noted: Vec<u64>,
}

pub type Outcome = Option<()>;

impl Model {
    pub fn new() -> Model {
        let mut model = Model::default();
        model.nodes.insert(1, Arc::new(node(FileKind::Directory, 0o755, 1)));
        model
    }

    /// Notes a request, and forgets the oldest of too many.
    pub fn note(&mut self, request: u64) {
        self.noted.push(request);
        if self.noted.len() > NOTED_MAX {
            self.noted.remove(0);
        }
    }

    /// Whether some directory has other entries.
    pub fn names_differ(&self, other: &Model) -> bool {
        self.nodes.iter().any(|(ino, node)| other.node(*ino).is_some_and(|old| old.entries != node.entries))
    }

    pub fn node(&self, ino: u64) -> Option<&Node> {
        self.nodes.get(&ino).map(|node| &**node)
    }

    pub fn edit(&mut self, ino: u64) -> Option<&mut Node> {
        self.nodes.get_mut(&ino).map(Arc::make_mut)
    }

    pub fn is_dir(&self, ino: u64) -> bool {
        self.node(ino).is_some_and(|node| node.kind == FileKind::Directory)
    }

    pub fn files(&self, kind: FileKind) -> Vec<u64> {
        self.nodes.iter().filter(|(_, node)| node.kind == kind).map(|(ino, _)| *ino).collect()
    }

    pub fn make(&mut self, dir: u64, name: &[u8], kind: FileKind, mode: u32, data: &[u8], ino: u64) -> Outcome {
        let parent = self.node(dir).filter(|node| node.kind == FileKind::Directory)?;
        if parent.entries.contains_key(name) {
            return None;
        }
        let mut new = node(kind, mode, dir);
        new.data = Arc::new(data.to_vec());
        let parent = self.edit(dir)?;
        parent.entries.insert(name.to_vec(), ino);
        parent.links += u32::from(kind == FileKind::Directory);
        self.nodes.insert(ino, Arc::new(new));
        Some(())
    }

    pub fn link(&mut self, ino: u64, dir: u64, name: &[u8]) -> Outcome {
        if self.is_dir(ino) || !self.is_dir(dir) || self.node(dir)?.entries.contains_key(name) {
            return None;
        }
        self.edit(ino)?.links += 1;
        self.edit(dir)?.entries.insert(name.to_vec(), ino);
        Some(())
    }

    pub fn remove(&mut self, dir: u64, name: &[u8], directory: bool) -> Outcome {
        let ino = *self.node(dir)?.entries.get(name)?;
        if self.is_dir(ino) != directory || directory && !self.node(ino)?.entries.is_empty() {
            return None;
        }
        self.edit(dir)?.entries.remove(name);
        self.edit(dir)?.links -= u32::from(directory);
        self.drop_name(ino);
        Some(())
    }

    fn drop_name(&mut self, ino: u64) {
        let Some(node) = self.edit(ino) else { return };
        node.links -= 1;
        if node.links == 0 || node.kind == FileKind::Directory {
            self.nodes.remove(&ino);
        }
    }

    fn is_above(&self, above: u64, mut ino: u64) -> bool {
        while ino != 1 {
            if ino == above {
                return true;
            }
            ino = self.nodes[&ino].parent;
        }
        above == 1
    }

    pub fn rename(&mut self, from: (u64, &[u8]), to: (u64, &[u8]), how: Rename) -> Outcome {
        let source = *self.node(from.0)?.entries.get(from.1)?;
        let target = self.node(to.0)?.entries.get(to.1).copied();
        match (how, target) {
            (Rename::NoReplace, Some(_)) | (Rename::Exchange, None) => return None,
            _ => {}
        }
        if self.is_dir(source) && self.is_above(source, to.0) {
            return None;
        }
        if target.is_some_and(|target| self.is_dir(target) && self.is_above(target, from.0)) {
            return None;
        }
        if target == Some(source) {
            return Some(());
        }
        if let Some(target) = target
            && how != Rename::Exchange
            && (self.is_dir(source) != self.is_dir(target) || !self.node(target)?.entries.is_empty())
        {
            return None;
        }
        let is_dir = |model: &Model, ino: u64| u32::from(model.is_dir(ino));
        let moved = is_dir(self, source);
        self.edit(from.0)?.links -= moved;
        self.edit(to.0)?.links += moved;
        self.edit(from.0)?.entries.remove(from.1);
        if let Some(target) = target {
            let other = is_dir(self, target);
            self.edit(to.0)?.links -= other;
            if how == Rename::Exchange {
                self.edit(from.0)?.links += other;
                self.edit(from.0)?.entries.insert(from.1.to_vec(), target);
                self.edit(target)?.parent = from.0;
            } else {
                self.drop_name(target);
            }
        }
        self.edit(to.0)?.entries.insert(to.1.to_vec(), source);
        self.edit(source)?.parent = to.0;
        Some(())
    }

    pub fn write(&mut self, ino: u64, offset: usize, data: &[u8]) -> Outcome {
        let bytes = Arc::make_mut(&mut self.edit(ino)?.data);
        if bytes.len() < offset + data.len() {
            bytes.resize(offset + data.len(), 0);
        }
        bytes[offset..offset + data.len()].copy_from_slice(data);
        Some(())
    }

    pub fn clone_range(&mut self, from: (u64, usize), to: (u64, usize), len: usize) -> Outcome {
        let source = self.node(from.0)?.data.clone();
        let behind = self.node(to.0)?.data.len() > to.1 + len;
        if !len.is_multiple_of(4096) && (from.1 + len != source.len() || behind) {
            return None;
        }
        if from.0 == to.0 && from.1 < to.1 + len && to.1 < from.1 + len {
            return None;
        }
        self.write(to.0, to.1, &source[from.1..from.1 + len])
    }

    pub fn truncate(&mut self, ino: u64, size: usize) -> Outcome {
        Arc::make_mut(&mut self.edit(ino)?.data).resize(size, 0);
        Some(())
    }

    /// Whether names and attributes are the same; data only by its length.
    pub fn same_names(&self, other: &Model) -> bool {
        self.nodes.len() == other.nodes.len()
            && self.nodes.iter().zip(&other.nodes).all(|((a, x), (b, y))| {
                a == b
                    && x.kind == y.kind
                    && x.mode == y.mode
                    && x.uid == y.uid
                    && x.links == y.links
                    && (x.kind != FileKind::Directory || x.parent == y.parent)
                    && x.xattrs == y.xattrs
                    && x.entries == y.entries
                    && x.data.len() == y.data.len()
                    && (x.kind == FileKind::File || x.data == y.data)
            })
    }
}

fn node(kind: FileKind, mode: u32, parent: u64) -> Node {
    Node {
        kind,
        mode,
        uid: 0,
        links: if kind == FileKind::Directory { 2 } else { 1 },
        parent,
        data: Arc::default(),
        xattrs: BTreeMap::new(),
        entries: BTreeMap::new(),
    }
}
