//! The TOML file, and how it meets the command line.

use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why the settings could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("the configuration file {path} is not valid TOML: {source}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The cause, with its line.
        source: Box<toml::de::Error>,
    },
    /// A key nobody knows.
    #[error(
        "unknown key {key:?} in the configuration file {path}; keys are the long flags of the command's --help, without the \
         dashes before them"
    )]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A value that does not fit its key.
    #[error("the configuration file {path} has a wrong value: {source}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The cause, with its line.
        source: Box<toml::de::Error>,
    },
}

/// Completes `cli`, parsed from `matches`, with the settings of the file at `path` that were given neither on the
/// command line nor in the environment.
///
/// # Errors
/// When the file cannot be read, is not TOML, or has a key or value that is not known.
pub fn merge_file<T>(cli: &T, matches: &ArgMatches, path: &Path) -> Result<T, ConfigError>
where
    T: Args + Serialize + DeserializeOwned,
{
    let path = || path.to_owned();
    let wrong = |source| ConfigError::Value { path: path(), source: Box::new(source) };
    let text = std::fs::read_to_string(path()).map_err(|source| ConfigError::Read { path: path(), source })?;
    let file: toml::Table =
        toml::from_str(&text).map_err(|source| ConfigError::Syntax { path: path(), source: Box::new(source) })?;
    let known = keys::<T>();
    if let Some(key) = file.keys().find(|key| !known.contains(key)) {
        return Err(ConfigError::UnknownKey { path: path(), key: key.clone() });
    }
    let mut merged = toml::Table::try_from(cli).expect("every setting can be written as TOML");
    // The file's own keys come first, so that messages name its lines; the rest makes it whole. A value that the
    // command line overrides must be right all the same.
    let rest: toml::Table = merged
        .iter()
        .filter(|(key, _)| !file.contains_key(*key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let checked: T = toml::from_str(&format!("{text}\n{rest}")).map_err(wrong)?;
    for (key, value) in toml::Table::try_from(&checked).expect("every setting can be written as TOML") {
        let source = matches.value_source(&key.replace('-', "_"));
        if !matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            merged.insert(key, value);
        }
    }
    merged.try_into().map_err(wrong)
}

/// Every key a file may have.
pub(super) fn keys<T: Args>() -> Vec<String> {
    let command = T::augment_args(Command::new("settings"));
    command.get_arguments().map(|arg| arg.get_id().as_str().replace('_', "-")).collect()
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;
    use serde::Deserialize;

    use super::super::ByteSize;
    use super::*;

    #[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Settings {
        #[arg(long, default_value = "1GiB")]
        cache_size: ByteSize,
        #[arg(long)]
        read_only: bool,
        #[arg(long)]
        #[serde(skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    }

    fn merge(args: &[&str], text: &str) -> Result<Settings, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        let args = std::iter::once("settings").chain(args.iter().copied());
        let matches = Settings::augment_args(Command::new("settings")).get_matches_from(args);
        merge_file(&Settings::from_arg_matches(&matches).unwrap(), &matches, &path)
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let merged = merge(&["--cache-size", "1GiB"], "cache-size = \"2GiB\"\nread-only = true\nname = \"a\"").unwrap();
        assert_eq!(merged, Settings { cache_size: ByteSize(1 << 30), read_only: true, name: Some("a".into()) });
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let error = merge(&[], "cache_size = \"1GiB\"").unwrap_err();
        assert!(matches!(&error, ConfigError::UnknownKey { key, .. } if key == "cache_size"), "{error}");
        let error = merge(&["--cache-size", "2GiB"], "cache-size = \"many\"").unwrap_err().to_string();
        assert!(error.contains("many") && error.contains("line 1"), "{error}");
        assert!(matches!(merge(&[], "name = "), Err(ConfigError::Syntax { .. })));
    }
}
