//! Telling image formats apart.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde::Serialize;

/// Format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Format {
    /// The disk's bytes, nothing else.
    Raw,
    /// qemu's copy-on-write format, version 2 or 3.
    Qcow2,
    /// What changed in a volume from one snapshot to another.
    #[value(skip)]
    Increment,
}

/// First bytes of formats we know of but do not take.
const OTHERS: [(&[u8], &str); 4] = [(b"KDMV", "VMDK"), (b"vhdxfile", "VHDX"), (b"conectix", "VHD"), (b"<<< ", "VDI")];

/// The format of an existing image: as said, or as its first bytes tell.
pub(super) fn of_image(path: &Path, said: Option<Format>) -> anyhow::Result<Format> {
    if let Some(format) = said {
        return Ok(format);
    }
    let mut magic = [0; 8];
    let read = File::open(path).and_then(|file| read_up_to(file, &mut magic));
    let len = read.with_context(|| format!("cannot read {}", path.display()))?;
    let magic = &magic[..len];
    if magic.starts_with(b"QFI\xfb") {
        return Ok(Format::Qcow2);
    }
    if magic == super::increment::MAGIC {
        return Ok(Format::Increment);
    }
    if let Some((_, name)) = OTHERS.iter().find(|(start, _)| magic.starts_with(start)) {
        let file = path.display();
        bail!(
            "{file} looks like a {name} image; convert it first (`qemu-img convert -O qcow2 {file} image.qcow2`), or say \
             --format raw to take it byte by byte"
        );
    }
    Ok(Format::Raw)
}

fn read_up_to(mut file: File, buf: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buf.len() {
        match file.read(&mut buf[len..])? {
            0 => break,
            n => len += n,
        }
    }
    Ok(len)
}

/// The format of an image to be written: as said, or as its name ends.
pub(super) fn of_name(path: &Path, said: Option<Format>) -> Format {
    let by_name = match path.extension().and_then(|extension| extension.to_str()) {
        Some("qcow2") => Format::Qcow2,
        _ => Format::Raw,
    };
    said.unwrap_or(by_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_known_by_their_first_bytes_not_their_name() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("disk.raw");
        std::fs::write(&path, b"QFI\xfb\0\0\0\x03more").unwrap();
        assert_eq!(of_image(&path, None).unwrap(), Format::Qcow2);
        assert_eq!(of_image(&path, Some(Format::Raw)).unwrap(), Format::Raw);
        std::fs::write(&path, b"").unwrap();
        assert_eq!(of_image(&path, None).unwrap(), Format::Raw);
        std::fs::write(&path, b"vhdxfile").unwrap();
        assert!(of_image(&path, None).unwrap_err().to_string().contains("VHDX"));
        let missing = of_image(&tmp.path().join("nothing"), None).unwrap_err();
        assert!(missing.to_string().contains("nothing"));
    }

    #[test]
    fn targets_are_known_by_their_name() {
        assert_eq!(of_name(Path::new("a.qcow2"), None), Format::Qcow2);
        assert_eq!(of_name(Path::new("a.img"), None), Format::Raw);
        assert_eq!(of_name(Path::new("a.qcow2"), Some(Format::Raw)), Format::Raw);
    }
}
