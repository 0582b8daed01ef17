//! From a recording to images as of its flushes.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::log::{self, Event};

/// What to look at.
pub struct Plan {
    /// The recording.
    pub recording: PathBuf,
    /// A directory for the images.
    pub dir: PathBuf,
    /// Size of the image in bytes.
    pub size: u64,
    /// Only flushes after this mark count.
    pub after: String,
    /// Look at this many of them, evenly spread; 0 for all.
    pub points: usize,
    /// A program that gets the path of an image, which it may change, and that of a file with the marks before the flush.
    pub check: PathBuf,
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Flushes after the mark.
    pub flushes: usize,
    /// Images looked at.
    pub checked: usize,
}

/// Replays and checks.
///
/// # Errors
/// A check failed, or replaying is impossible.
pub fn run(plan: &Plan) -> Result<Outcome> {
    let flushes = points_of(plan)?;
    let chosen = choose(flushes, plan.points);
    let mut outcome = Outcome { flushes, checked: 0 };
    let base_path = plan.dir.join("base.img");
    let base = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&base_path)?;
    base.set_len(plan.size)?;
    let mut marks = String::new();
    let (mut begun, mut flush) = (false, 0);
    let mut input = open(&plan.recording)?;
    while let Some(event) = log::take(&mut input)? {
        match event {
            Event::Write { offset, data } => base.write_all_at(&data, offset)?,
            Event::Zero { offset, len } => punch(&base, offset, len)?,
            Event::Mark(text) if text == plan.after => begun = true,
            Event::Mark(text) => marks = marks + &text + "\n",
            Event::Flush if begun => {
                if chosen(flush) {
                    check(plan, &base_path, &marks).with_context(|| format!("after flush {flush} of {flushes}"))?;
                    outcome.checked += 1;
                }
                flush += 1;
            }
            Event::Flush => {}
        }
    }
    Ok(outcome)
}

fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(BufReader::with_capacity(1 << 20, file))
}

fn points_of(plan: &Plan) -> Result<usize> {
    let (mut begun, mut flushes) = (false, 0);
    let mut input = open(&plan.recording)?;
    while let Some(event) = log::take(&mut input)? {
        match event {
            Event::Mark(text) if text == plan.after => begun = true,
            Event::Flush if begun => flushes += 1,
            _ => {}
        }
    }
    Ok(flushes)
}

/// Which of `all` points are looked at, when `wanted` of them are enough.
fn choose(all: usize, wanted: usize) -> impl Fn(usize) -> bool {
    let wanted = if wanted == 0 { all } else { wanted.min(all) };
    // The n-th point is taken when n * wanted / all steps up there.
    move |n| wanted > 0 && (n * wanted) % all < wanted
}

fn check(plan: &Plan, base: &Path, marks: &str) -> Result<()> {
    let image = plan.dir.join("cut.img");
    let list = plan.dir.join("marks");
    std::fs::write(&list, marks)?;
    let copied = Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(base).arg(&image).status()?;
    if !copied.success() {
        bail!("cannot copy {}", base.display());
    }
    let checked = Command::new(&plan.check).arg(&image).arg(&list).status()?;
    if !checked.success() {
        bail!("the check failed; the image is {}, the marks before it are {}", image.display(), list.display());
    }
    Ok(())
}

fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (offset, len) = (i64::try_from(offset), i64::try_from(len));
    let (offset, len) = (offset.map_err(io::Error::other)?, len.map_err(io::Error::other)?);
    // SAFETY: plain system call on a descriptor that lives over it.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_spread_evenly() {
        let taken = |all, wanted| (0..all).filter(|&n| choose(all, wanted)(n)).collect::<Vec<_>>();
        assert_eq!(taken(6, 0), [0, 1, 2, 3, 4, 5]);
        assert_eq!(taken(6, 3), [0, 2, 4]);
        assert_eq!(taken(7, 3).len(), 3);
        assert_eq!(taken(2, 9), [0, 1]);
        assert!(taken(0, 9).is_empty());
    }

    #[test]
    fn an_image_holds_what_came_before_the_flush() {
        let tmp = tempfile::tempdir().unwrap();
        let recording = tmp.path().join("recording");
        let mut file = File::create(&recording).unwrap();
        for event in [
            Event::Write { offset: 0, data: vec![1; 8192] },
            Event::Flush,
            Event::Mark("begin".into()),
            Event::Zero { offset: 4096, len: 4096 },
            Event::Mark("known".into()),
            Event::Flush,
            Event::Write { offset: 0, data: vec![2; 4096] },
        ] {
            log::put(&mut file, &event).unwrap();
        }
        let check = tmp.path().join("check");
        std::fs::write(&check, "#!/bin/sh\n[ \"$(cat \"$2\")\" = known ]\n").unwrap();
        std::fs::set_permissions(&check, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let plan = Plan { recording, dir: tmp.path().into(), size: 16384, after: "begin".into(), points: 0, check };
        assert_eq!(run(&plan).unwrap(), Outcome { flushes: 1, checked: 1 });
        let image = std::fs::read(tmp.path().join("cut.img")).unwrap();
        assert_eq!(image.len(), 16384);
        assert!(image[..4096].iter().all(|&byte| byte == 1) && image[4096..].iter().all(|&byte| byte == 0));
    }
}
