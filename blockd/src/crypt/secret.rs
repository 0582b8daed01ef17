//! What opens a volume: something its owner knows, or something its owner has.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use aws_lc_rs::digest;
use zeroize::Zeroizing;

/// Fewest bytes of a key file. It is not stretched, so it must hold a whole key.
const KEY_FILE_MIN: u64 = 32;
/// Most bytes read of a passphrase's file or a key file: somebody may name the wrong one, such as a disk.
const FILE_MAX: u64 = 64 << 20;

/// A passphrase or the contents of a key file.
#[derive(Clone)]
pub enum Secret {
    /// Something to remember; it is stretched by Argon2id.
    Passphrase(Zeroizing<String>),
    /// SHA-256 of a file of random bytes.
    KeyFile(Zeroizing<[u8; 32]>),
}

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("cannot read the {what} {path}: {source}")]
    Read {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Too little to keep anything secret.
    #[error(
        "the key file {path} has {len} bytes; it must have at least {KEY_FILE_MIN} random ones (`head -c 32 /dev/urandom > FILE`)"
    )]
    Short {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// Surely the wrong file.
    #[error("the {what} {path} has more than 64 MiB; is it the right file?")]
    Long {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Nothing.
    #[error("an empty passphrase protects nothing")]
    Empty,
    /// Not text.
    #[error("the passphrase file {0} is not text; use it as a key file if that is what it is")]
    NotText(PathBuf),
}

impl Secret {
    /// A passphrase as typed.
    pub fn passphrase(text: Zeroizing<String>) -> Result<Self, SecretError> {
        if text.is_empty() { Err(SecretError::Empty) } else { Ok(Self::Passphrase(text)) }
    }

    /// The passphrase in a file, without the newline at its end.
    pub fn passphrase_file(path: &Path) -> Result<Self, SecretError> {
        let mut bytes = Zeroizing::new(Vec::new());
        read(path, "passphrase file", |part| bytes.extend_from_slice(part))?;
        let text = std::str::from_utf8(&bytes).map_err(|_| SecretError::NotText(path.to_owned()))?;
        let text = text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text));
        Self::passphrase(Zeroizing::new(text.to_owned()))
    }

    /// The contents of a key file.
    pub fn key_file(path: &Path) -> Result<Self, SecretError> {
        let mut hash = digest::Context::new(&digest::SHA256);
        let len = read(path, "key file", |part| hash.update(part))?;
        if len < KEY_FILE_MIN {
            return Err(SecretError::Short { path: path.to_owned(), len });
        }
        let mut key = Zeroizing::new([0; 32]);
        key.copy_from_slice(hash.finish().as_ref());
        Ok(Self::KeyFile(key))
    }

    /// What it is, for messages.
    pub fn what(&self) -> &'static str {
        match self {
            Self::Passphrase(_) => "passphrase",
            Self::KeyFile(_) => "key file",
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.what())
    }
}

/// Hands the contents of a file to `take`, piece by piece; returns its length.
fn read(path: &Path, what: &'static str, mut take: impl FnMut(&[u8])) -> Result<u64, SecretError> {
    let failed = |source| SecretError::Read { what, path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut part = Zeroizing::new([0; 4096]);
    let mut len = 0;
    loop {
        let n = match file.read(&mut part[..]) {
            Ok(0) => return Ok(len),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        };
        len += n as u64;
        if len > FILE_MAX {
            return Err(SecretError::Long { what, path: path.to_owned() });
        }
        take(&part[..n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_give_the_secret_that_is_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for (content, expected) in [("open sesame\n", "open sesame"), ("a\r\n", "a"), (" a \n\n", " a \n"), ("a", "a")]
        {
            std::fs::write(&path, content).unwrap();
            let Secret::Passphrase(text) = Secret::passphrase_file(&path).unwrap() else { panic!() };
            assert_eq!(*text, expected);
        }
        for (content, why) in [(&b"\n"[..], "empty"), (b"\xff", "not text")] {
            std::fs::write(&path, content).unwrap();
            assert!(Secret::passphrase_file(&path).unwrap_err().to_string().contains(why));
        }
        std::fs::write(&path, [7; 31]).unwrap();
        assert!(matches!(Secret::key_file(&path), Err(SecretError::Short { len: 31, .. })));
        std::fs::write(&path, [7; 10_000]).unwrap();
        let Secret::KeyFile(key) = Secret::key_file(&path).unwrap() else { panic!() };
        assert_eq!(&key[..], digest::digest(&digest::SHA256, &[7; 10_000]).as_ref());
        assert!(Secret::key_file(Path::new("/nowhere")).unwrap_err().to_string().contains("/nowhere"));
        assert!(matches!(Secret::key_file(Path::new("/dev/zero")), Err(SecretError::Long { .. })));
        assert_eq!(format!("{:?}", Secret::key_file(&path).unwrap()), "Secret(key file)");
    }
}
