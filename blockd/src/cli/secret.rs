//! Passphrases and key files: from flags, the environment, or whoever sits at the terminal.

use std::env;
use std::io::{self, IsTerminal};
use std::path::Path;

use anyhow::{Context, bail};
use zeroize::Zeroizing;

use crate::crypt::Secret;

/// The environment variable for the passphrase that unlocks a volume.
pub(super) const CURRENT: &str = "BLOCKD_PASSPHRASE";
/// The one for the passphrase it is to get.
pub(super) const NEW: &str = "BLOCKD_NEW_PASSPHRASE";

/// The secret that files, or else the environment variable `variable`, give.
pub(super) fn given(passphrase: Option<&Path>, key: Option<&Path>, variable: &str) -> anyhow::Result<Option<Secret>> {
    if let Some(path) = passphrase {
        return Ok(Some(Secret::passphrase_file(path)?));
    }
    if let Some(path) = key {
        return Ok(Some(Secret::key_file(path)?));
    }
    match env::var(variable) {
        Ok(text) => Ok(Some(Secret::passphrase(Zeroizing::new(text)).context(variable.to_owned())?)),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => bail!("{variable} is not text"),
    }
}

/// Asks for a passphrase.
pub(super) fn ask(prompt: &str) -> anyhow::Result<Secret> {
    Ok(Secret::passphrase(read(prompt, CURRENT)?)?)
}

/// Asks for a new passphrase, twice. `variable` could have given it.
pub(super) fn choose(prompt: &str, variable: &str) -> anyhow::Result<Secret> {
    let first = read(prompt, variable)?;
    if first != read("The same once more", variable)? {
        bail!("the two passphrases differ; nothing was done");
    }
    Ok(Secret::passphrase(first)?)
}

fn read(prompt: &str, variable: &str) -> anyhow::Result<Zeroizing<String>> {
    if !io::stdin().is_terminal() {
        bail!(
            "there is no terminal to ask for a passphrase at; say --passphrase-file or --key-file, or set {variable}"
        );
    }
    let text = rpassword::prompt_password(format!("{prompt}: ")).context("cannot read the passphrase")?;
    Ok(Zeroizing::new(text))
}
