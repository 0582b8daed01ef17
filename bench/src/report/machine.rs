//! The machine a number belongs to.

use std::fs;

use serde::{Deserialize, Serialize};

/// What decides how fast things are here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// As the kernel names it.
    pub cpu: String,
    /// Processors we may use.
    pub cores: usize,
    /// In GiB, rounded.
    pub memory_gib: u64,
    /// Kernel release.
    pub kernel: String,
    /// Device under the working directory, and its model where it has one.
    pub disk: String,
    /// Filesystem of the working directory.
    pub filesystem: String,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        let (disk, filesystem) = disk().unwrap_or_else(|| ("unknown".to_owned(), "unknown".to_owned()));
        Self {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: field("/proc/meminfo", "MemTotal")
                .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
                .map_or(0, |kib| (kib + (1 << 19)) >> 20),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            disk,
            filesystem,
        }
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        format!(
            "{} cores of {}, {} GiB of memory, Linux {}, {} on {}",
            self.cores, self.cpu, self.memory_gib, self.kernel, self.filesystem, self.disk
        )
    }
}

fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Device and filesystem of the mount with the longest path above the working directory.
fn disk() -> Option<(String, String)> {
    let here = std::env::current_dir().ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .filter(|mount| mount.len() > 2 && here.starts_with(mount[1]))
        .max_by_key(|mount| mount[1].len())?;
    let device = fs::canonicalize(mount[0]).ok();
    let name = device.as_deref().and_then(|path| path.file_name()?.to_str()).unwrap_or(mount[0]);
    let whole = name.trim_end_matches(|last: char| last.is_ascii_digit());
    let model =
        [name, whole].iter().find_map(|disk| fs::read_to_string(format!("/sys/block/{disk}/device/model")).ok());
    let disk = match model {
        Some(model) => format!("{name} ({})", model.trim()),
        None if name.starts_with("vd") => format!("{name} (virtio)"),
        None => name.to_owned(),
    };
    Some((disk, mount[2].to_owned()))
}
