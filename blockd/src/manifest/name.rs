//! What a volume may be called.

use super::format::MAX_NAME;

/// A name that no volume can have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot name a volume: use 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit")]
pub struct InvalidName(String);

/// Checks that `name` can name a volume. `@` is reserved for snapshots.
pub fn check_name(name: &str) -> Result<(), InvalidName> {
    let good = (1..=MAX_NAME).contains(&name.len())
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if good { Ok(()) } else { Err(InvalidName(name.to_owned())) }
}

/// A name of `len` bytes at the start of `bytes`, and what follows it.
pub(super) fn take(bytes: &[u8], len: u8) -> Option<(String, &[u8])> {
    let (name, rest) = bytes.split_at_checked(len.into())?;
    Some((String::from_utf8(name.to_vec()).ok()?, rest))
}
