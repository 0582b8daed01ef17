//! The daemon's settings, through the file and the command line.

use std::io::Write;

use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::file::keys;
use super::*;

fn parse(args: &[&str]) -> (Config, ArgMatches) {
    let args = std::iter::once("serve").chain(args.iter().copied());
    let matches = Config::augment_args(Command::new("serve")).get_matches_from(args);
    (Config::from_arg_matches(&matches).unwrap(), matches)
}

fn merge(args: &[&str], text: &str) -> Result<Config, ConfigError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let (cli, matches) = parse(args);
    merge_file(&cli, &matches, file.path())
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let text = "log-size = \"1GiB\"\nblock-cache = 33554432\ns3-path-style = true\nnbd-tcp = [\"none\"]";
    let config = merge(&["--log-size", "2GiB", "--s3-path-style=false"], text).unwrap();
    assert_eq!(config.log_size, ByteSize::gib(2));
    assert_eq!(config.block_cache, Some(ByteSize::mib(32)));
    assert_eq!(config.s3_path_style, Some(false));
    assert!(config.nbd_tcp_addrs().is_empty());
    assert_eq!(config.chunk_size, ByteSize::mib(16));
}

#[test]
fn a_flag_that_repeats_the_default_still_wins() {
    let config = merge(&["--log-size", "4GiB"], "log-size = \"1GiB\"").unwrap();
    assert_eq!(config.log_size, ByteSize::gib(4));
}

#[test]
fn settings_without_a_default_come_from_the_file() {
    let text = "store = \"s3://b/p\"\nreactors = 3\nvolumes = [\"a\", \"b\"]\nnbd-unix = \"none\"";
    let config = merge(&["--store", "dir:/x"], text).unwrap();
    assert_eq!(config.store_url(), "dir:/x");
    assert_eq!(config.reactor_count(), 3);
    assert_eq!(config.volumes.as_deref(), Some(&["a".to_owned(), "b".to_owned()][..]));
    assert_eq!(config.nbd_unix_path(), None);
}

#[test]
fn files_of_volumes_are_lists() {
    let text = "key-file = [\"a=/k\", \"b=/x=y\"]";
    let config = merge(&["--passphrase-file", "c=p", "--passphrase-file", "d=q"], text).unwrap();
    assert_eq!(config.key_file[1], VolumeFile { volume: "b".into(), path: "/x=y".into() });
    assert_eq!(config.passphrase_file.len(), 2);
    for wrong in ["key-file = [\"a\"]", "key-file = [\"=/k\"]", "key-file = [\"a=\"]", "key-file = [\"a/b=c\"]"] {
        assert!(matches!(merge(&[], wrong), Err(ConfigError::Value { .. })), "{wrong}");
    }
}

#[test]
fn unknown_keys_are_named_with_their_file() {
    let error = merge(&[], "log-size = \"1GiB\"\nlog_size = \"1GiB\"").unwrap_err();
    let ConfigError::UnknownKey { key, path } = &error else { panic!("{error}") };
    assert_eq!(key, "log_size");
    assert!(error.to_string().contains(path.to_str().unwrap()));
}

#[test]
fn wrong_values_are_shown_even_when_a_flag_overrides_them() {
    let error = merge(&["--log-size", "2GiB"], "log-size = \"many\"").unwrap_err().to_string();
    assert!(error.contains("many") && error.contains("line 1"), "{error}");
    let error = merge(&[], "data = 7").unwrap_err();
    assert!(matches!(error, ConfigError::Value { .. }), "{error}");
    let error = merge(&[], "data = ").unwrap_err();
    assert!(matches!(error, ConfigError::Syntax { .. }), "{error}");
}

#[test]
fn the_effective_configuration_reads_back_the_same() {
    let (config, _) = parse(&["--data", "/d", "--reactors", "2", "--nbd-unix", "none"]);
    let resolved = config.resolved();
    let text = toml::to_string(&resolved).unwrap();
    assert_eq!(toml::from_str::<Config>(&text).unwrap(), resolved);
    assert_eq!(resolved.resolved(), resolved);
}

#[test]
fn the_example_file_names_every_setting_with_its_default() {
    let example = include_str!("../../blockd.example.toml");
    let is_setting =
        |line: &&str| line.strip_prefix('#').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
    let text: String = example.lines().filter(is_setting).map(|line| format!("{}\n", &line[1..])).collect();
    let table: toml::Table = toml::from_str(&text).unwrap();
    let mut missing = keys::<Config>();
    missing.retain(|key| !table.contains_key(key));
    assert_eq!(missing, Vec::<String>::new(), "settings without an example");
    let written: Config = toml::from_str(&text).unwrap();
    let (default, _) = parse(&[]);
    for (key, value) in toml::Table::try_from(&default).unwrap() {
        assert_eq!(toml::Table::try_from(&written).unwrap()[&key], value, "{key}");
    }
}

#[test]
fn settings_that_do_not_go_together_are_refused() {
    for (args, word) in [
        (&["--log-size", "64MiB"][..], "log-size"),
        (&["--log-segment", "2MiB", "--log-size", "5MiB"], "log-size"),
        (&["--log-segment", "1000001"], "log-segment"),
        (&["--dirty-memory", "1"], "dirty-memory"),
        (&["--destage-age", "0s"], "destage-age"),
        (&["--compaction-ratio", "1"], "compaction-ratio"),
        (&["--delete-grace", "1s"], "delete-grace"),
        (&["--checkpoint-grace", "1s"], "checkpoint-grace"),
        (&["--chunk-size", "65MiB"], "chunk size"),
        (&["--chunk-size", "4KiB"], "chunk size"),
        (&["--s3-timeout", "900ms"], "s3-timeout"),
        (&["--nbd-tcp", "none", "--nbd-unix", "none"], "nbd-unix"),
        (&["--key-file", "a=/k", "--passphrase-file", "a=/p"], "\"a\""),
    ] {
        let error = parse(args).0.check().unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    assert_eq!(parse(&[]).0.check(), Ok(()));
}
