//! `/dev/nbdN` as user space sees it: what sysfs says of it, whether somebody uses it, when it is ready.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// `_IOR(0x12, 114, u64)`.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272u32 as libc::Ioctl;
/// How often a state that must come is looked for.
const PAUSE: Duration = Duration::from_millis(20);

/// Number N of a device `/dev/nbdN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device(pub u32);

impl Device {
    /// Reads `/dev/nbd3` or `nbd3`.
    pub fn parse(text: &str) -> Option<Self> {
        let number = text.strip_prefix("/dev/").unwrap_or(text).strip_prefix("nbd")?;
        number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse().ok())?.map(Self)
    }

    /// All that the kernel has, by number.
    pub fn all() -> Vec<Self> {
        let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let mut all: Vec<Self> = entries.filter_map(|entry| Self::parse(entry.file_name().to_str()?)).collect();
        all.sort_by_key(|device| device.0);
        all
    }

    /// Its node.
    pub fn path(self) -> PathBuf {
        format!("/dev/nbd{}", self.0).into()
    }

    fn attribute(self, name: &str) -> Option<String> {
        let text = fs::read_to_string(format!("/sys/block/nbd{}/{name}", self.0)).ok()?;
        Some(text.trim_end().to_owned())
    }

    /// Whether it is set up.
    pub fn is_connected(self) -> bool {
        // The file is there exactly while it is.
        self.attribute("pid").is_some()
    }

    /// The text it was set up with, if by netlink.
    pub fn backend(self) -> Option<String> {
        self.attribute("backend").filter(|backend| !backend.is_empty())
    }

    /// Its size in bytes.
    pub fn size(self) -> Option<u64> {
        self.attribute("size")?.parse::<u64>().ok().map(|sectors| sectors * 512)
    }

    /// Where it is mounted.
    pub fn mounts(self) -> Vec<String> {
        mounts_of(&self.to_string())
    }

    /// By what it is known under /sys/block and [`super::place::RUN_DIR`].
    pub fn name(self) -> String {
        format!("nbd{}", self.0)
    }

    /// Opens it for itself alone: EBUSY while it is mounted, or otherwise claimed.
    ///
    /// # Errors
    /// What opening failed with.
    pub fn claim(self) -> io::Result<File> {
        claim(&self.path())
    }

    /// Waits until its node is there and says the size.
    ///
    /// # Errors
    /// It does not come, or not in time.
    pub fn wait_ready(self, size: u64, patience: Duration) -> io::Result<()> {
        wait_ready(&self.path(), size, patience)
    }

    /// Waits until it is no longer set up; whether that came about in time.
    pub fn wait_gone(self, backend: Option<&str>, patience: Duration) -> bool {
        let begun = Instant::now();
        while self.is_connected() && self.backend().as_deref() == backend {
            if begun.elapsed() >= patience {
                return false;
            }
            std::thread::sleep(PAUSE);
        }
        true
    }
}

/// Where the device with this node, or a partition of it, is mounted.
pub fn mounts_of(node: &str) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let of_it = |source: &str| source.strip_prefix(node).is_some_and(|rest| rest.is_empty() || rest.starts_with('p'));
    let lines = mounts.lines().filter_map(|line| line.split_once(' '));
    lines
        .filter(|(source, _)| of_it(source))
        .filter_map(|(_, rest)| rest.split(' ').next().map(str::to_owned))
        .collect()
}

/// Opens a device for itself alone: EBUSY while it is mounted, or otherwise claimed.
///
/// # Errors
/// What opening failed with.
pub fn claim(node: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(node)
}

/// Waits until a device's node is there and says the size.
///
/// # Errors
/// It does not come, or not in time.
pub fn wait_ready(node: &Path, size: u64, patience: Duration) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        let state = File::open(node).and_then(|file| size_of_device(&file));
        match state {
            Ok(found) if found == size => return Ok(()),
            Ok(_) | Err(_) if begun.elapsed() < patience => std::thread::sleep(PAUSE),
            Ok(found) => return Err(io::Error::other(format!("it has {found} bytes instead of {size}"))),
            Err(error) => return Err(error),
        }
    }
}

fn size_of_device(file: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: the ioctl writes one u64 to `size`, which is alive over the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(size) }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "/dev/nbd{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert_eq!(Device::parse("/dev/nbd0"), Some(Device(0)));
        assert_eq!(Device::parse("nbd15"), Some(Device(15)));
        for wrong in ["/dev/nbd", "/dev/sda", "/dev/nbd0p1", "nbd-1", "nbd+1", "/dev//nbd1"] {
            assert_eq!(Device::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Device(3).to_string(), "/dev/nbd3");
    }
}
