//! A directory store that several daemons share.

use std::path::PathBuf;

use super::daemon::Daemon;

/// See the module.
pub struct Shared {
    pub dir: tempfile::TempDir,
    pub url: String,
    args: Vec<String>,
}

impl Shared {
    /// All daemons get these arguments.
    pub fn new(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("dir:{}", dir.path().join("bucket").display());
        Self { dir, url, args: args.iter().map(|arg| (*arg).to_owned()).collect() }
    }

    /// The data directory of a host.
    pub fn data(&self, host: &str) -> PathBuf {
        self.dir.path().join(host)
    }

    /// Starts the daemon of a host.
    pub fn serve(&self, host: &str, more: &[&str]) -> Daemon {
        let mut args = vec!["--store", &self.url];
        args.extend(self.args.iter().map(String::as_str));
        args.extend(more);
        Daemon::start(&self.data(host), &args)
    }

    /// Objects whose keys begin so.
    pub fn objects(&self, prefix: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut dirs = vec![self.dir.path().join("bucket").join(prefix)];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).into_iter().flatten().map(Result::unwrap) {
                match entry.file_type().unwrap().is_dir() {
                    true => dirs.push(entry.path()),
                    false => found.push(entry.path()),
                }
            }
        }
        found
    }
}
