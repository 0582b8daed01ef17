//! `/dev/ublkbN` as user space sees it, and what it is attached to.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::super::place::{self, Lock};

/// How often a state that must come is looked for.
const PAUSE: Duration = Duration::from_millis(20);

/// Number N of a device `/dev/ublkbN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device(pub u32);

/// What a device is attached to, and by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The keeper's process.
    pub pid: i32,
    /// The volume's name.
    pub volume: String,
    /// Where it is served.
    pub server: String,
}

impl Device {
    /// Reads `/dev/ublkb3` or `ublkb3`.
    pub fn parse(text: &str) -> Option<Self> {
        let number = text.strip_prefix("/dev/").unwrap_or(text).strip_prefix("ublkb")?;
        // Numbers are signed in the kernel's interface.
        let number = number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse().ok())?;
        number.filter(|number| i32::try_from(*number).is_ok()).map(Self)
    }

    /// By what it is known under /sys/block and [`place::RUN_DIR`].
    pub fn name(self) -> String {
        format!("ublkb{}", self.0)
    }

    /// Its node.
    pub fn path(self) -> PathBuf {
        self.to_string().into()
    }

    /// Whether somebody has it, whether or not it can be used already.
    pub fn exists(self) -> bool {
        Path::new(&format!("/sys/class/ublk-char/ublkc{}", self.0)).exists()
    }

    /// Whether it can be used.
    pub fn is_live(self) -> bool {
        Path::new("/sys/block").join(self.name()).exists()
    }

    /// What it is attached to, if by a living keeper of ours.
    pub fn attachment(self) -> Option<Attachment> {
        let mut lines = place::held_lines(&self.name())?.into_iter();
        Some(Attachment { pid: lines.next()?.parse().ok()?, volume: lines.next()?, server: lines.next()? })
    }

    /// Writes down in the keeper's lock what [`Self::attachment`] tells.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn note(lock: &mut Lock, volume: &str, server: &str) -> std::io::Result<()> {
        lock.note(&format!("{volume}\n{server}"))
    }

    /// All that keepers of ours have, by number.
    pub fn attached() -> Vec<(Self, Attachment)> {
        let entries = fs::read_dir(place::RUN_DIR).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| Self::parse(entry.file_name().to_str()?.strip_suffix(".pid")?));
        let mut all: Vec<_> = names.filter_map(|device| Some((device, device.attachment()?))).collect();
        all.sort_by_key(|(device, _)| device.0);
        all
    }

    /// Waits until it cannot be used any more; whether that came about in time.
    pub fn wait_gone(self, patience: Duration) -> bool {
        wait_until(patience, || !self.is_live())
    }

    /// Waits until its keeper has ended; whether that came about in time.
    pub fn wait_let_go(self, patience: Duration) -> bool {
        wait_until(patience, || self.attachment().is_none())
    }
}

fn wait_until(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !done() {
        if begun.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
    true
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "/dev/ublkb{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert_eq!(Device::parse("/dev/ublkb0"), Some(Device(0)));
        assert_eq!(Device::parse("ublkb15"), Some(Device(15)));
        for wrong in ["/dev/ublkb", "/dev/nbd0", "/dev/ublkc0", "/dev/ublkb0p1", "ublkb-1", "ublkb4294967295"] {
            assert_eq!(Device::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Device(3).to_string(), "/dev/ublkb3");
    }
}
