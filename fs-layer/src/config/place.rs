//! Where the filesystem's disk is.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::disk::nbd::{BadUrl, NbdUrl};

/// The flags that say where the disk is. One of `--disk`, `--nbd` and `--store`; without any, the bucket in the data
/// directory.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Place {
    /// Directory of this fsd: its admin socket and, with a bucket, the log and caches of the engine; made when absent
    #[arg(long, value_name = "DIR", default_value = "fsd-data", env = "FSD_DATA", help_heading = "Where the disk is")]
    pub data: PathBuf,

    /// A bucket: a directory, dir:PATH, s3://BUCKET or s3://BUCKET/PREFIX. The block engine runs in this process
    /// [default: dir:<data>/bucket]
    #[arg(long, value_name = "URL", help_heading = "Where the disk is")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,

    /// Name of the volume in the bucket
    #[arg(long, value_name = "NAME", default_value = "fs", help_heading = "Where the disk is")]
    pub volume: String,

    /// A setting of `blockd serve` for the engine, as there but without dashes, for instance log-size=8GiB or
    /// s3-endpoint=URL. May be given several times
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Where the disk is")]
    pub engine: Vec<String>,

    /// A volume of a blockd elsewhere, or any NBD export: nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH
    #[arg(long, value_name = "URL", conflicts_with = "store", help_heading = "Where the disk is")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd: Option<String>,

    /// Connections to the NBD server
    #[arg(long, value_name = "N", default_value = "8", value_parser = clap::value_parser!(u16).range(1..=64), help_heading = "Where the disk is")]
    pub nbd_connections: u16,

    /// A file or block device
    #[arg(long, value_name = "PATH", conflicts_with_all = ["store", "nbd"], help_heading = "Where the disk is")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<PathBuf>,
}

/// The same, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Where {
    /// A file or block device.
    File(PathBuf),
    /// An NBD server.
    Nbd(NbdUrl),
    /// A bucket, as blockd writes it.
    Store(String),
}

/// Flags that do not say where the disk is.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Several places.
    #[error("the disk can be in one place only: give one of store, nbd and disk")]
    Several,
    /// Not an NBD server.
    #[error(transparent)]
    Nbd(#[from] BadUrl),
}

impl Place {
    /// Where the disk is.
    pub fn find(&self) -> Result<Where, PlaceError> {
        // Flags alone are checked by clap, but a file adds to them.
        match (&self.disk, &self.nbd, &self.store) {
            (Some(path), None, None) => Ok(Where::File(path.clone())),
            (None, Some(url), None) => Ok(Where::Nbd(url.parse()?)),
            (None, None, Some(store)) if store.contains("://") || store.starts_with("dir:") => {
                Ok(Where::Store(store.clone()))
            }
            (None, None, Some(dir)) => Ok(Where::Store(format!("dir:{dir}"))),
            (None, None, None) => Ok(Where::Store(format!("dir:{}", self.data.join("bucket").display()))),
            _ => Err(PlaceError::Several),
        }
    }

    /// Makes all paths whole.
    pub fn make_absolute(&mut self) -> std::io::Result<()> {
        self.data = std::path::absolute(&self.data)?;
        if let Some(disk) = &mut self.disk {
            *disk = std::path::absolute(&*disk)?;
        }
        if let Some(store) = self.store.as_mut().filter(|store| !store.contains("://")) {
            let dir = store.strip_prefix("dir:").unwrap_or(store);
            *store = format!("dir:{}", std::path::absolute(dir)?.display());
        }
        Ok(())
    }

    /// The socket that `fsd status` asks.
    pub fn admin_path(&self) -> PathBuf {
        self.data.join("fsd.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_place_at_most() {
        let place = |disk: Option<&str>, nbd: Option<&str>, store: Option<&str>| Place {
            data: "d".into(),
            disk: disk.map(Into::into),
            nbd: nbd.map(Into::into),
            store: store.map(Into::into),
            ..Place::default()
        };
        assert_eq!(place(None, None, None).find().unwrap(), Where::Store("dir:d/bucket".into()));
        assert_eq!(place(None, None, Some("/b")).find().unwrap(), Where::Store("dir:/b".into()));
        assert_eq!(place(None, None, Some("s3://b/p")).find().unwrap(), Where::Store("s3://b/p".into()));
        assert_eq!(place(Some("/f"), None, None).find().unwrap(), Where::File("/f".into()));
        assert!(matches!(place(None, Some("nbd://h/e"), None).find().unwrap(), Where::Nbd(_)));
        assert!(matches!(place(None, Some("h/e"), None).find(), Err(PlaceError::Nbd(_))));
        assert!(matches!(place(Some("/f"), None, Some("/b")).find(), Err(PlaceError::Several)));
    }
}
