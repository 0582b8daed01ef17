//! The program as a user meets it, without a daemon: usage, settings, and what is said when nothing answers.

use std::path::Path;
use std::process::{Command, Output};

fn blockd(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockd"));
    command.env_remove("BLOCKD_DATA").env_remove("BLOCKD_ADMIN").env_remove("NOTIFY_SOCKET");
    command.args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Exit code 1 and one line that has all of `words`.
fn assert_fails(args: &[&str], words: &[&str]) {
    let output = blockd(args);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
    assert!(said.starts_with("blockd: "), "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?}: no {word:?} in: {said}");
    }
}

#[test]
fn help_teaches_and_wrong_usage_is_2() {
    let help = blockd(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(stdout(&help).contains("blockd volume create disk --size 100GiB"));
    let serve = stdout(&blockd(&["serve", "--help"]));
    for word in ["Write-ahead log:", "Memory and caches:", "--log-size <SIZE>", "[default: 4GiB]", "s3://bucket"] {
        assert!(serve.contains(word), "no {word:?} in {serve}");
    }
    for args in [&["wash"][..], &["volume", "create", "x", "--size", "lots"], &["serve", "--frobnicate"]] {
        assert_eq!(blockd(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn without_a_daemon_commands_say_how_to_start_one() {
    let tmp = tempfile::tempdir().unwrap();
    let data = path(tmp.path());
    for command in [&["status"][..], &["volume", "list"], &["volume", "delete", "x", "--yes"]] {
        let args = [command, &["--data", data]].concat();
        assert_fails(&args, &["no blockd answers on", "admin.sock", &format!("blockd serve --data {data}")]);
    }
}

#[test]
fn the_effective_configuration_can_be_printed_and_used_again() {
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("blockd.toml");
    std::fs::write(&file, "log-size = \"1GiB\"\ndestage-age = \"2s\"\n").unwrap();
    let args = ["serve", "--config", path(&file), "--destage-age", "7s", "--data", "/d", "--print-config"];
    let printed = stdout(&blockd(&args));
    for line in [
        "data = \"/d\"",
        "store = \"dir:/d/bucket\"",
        "log-size = \"1GiB\"",
        "destage-age = \"7s\"",
        "read-cache = \"0\"",
    ] {
        assert!(printed.lines().any(|l| l == line), "no {line} in\n{printed}");
    }
    std::fs::write(&file, &printed).unwrap();
    let again = blockd(&["serve", "--config", path(&file), "--print-config"]);
    assert_eq!(stdout(&again), printed, "{}", stderr(&again));
}

#[test]
fn the_environment_stands_between_file_and_flags() {
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("blockd.toml");
    std::fs::write(&file, "data = \"/from-file\"\n").unwrap();
    let data = |env: bool, flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockd"));
        command.env_remove("BLOCKD_DATA");
        if env {
            command.env("BLOCKD_DATA", "/from-env");
        }
        let output = command.args(["serve", "--print-config", "--config", path(&file)]).args(flags).output().unwrap();
        stdout(&output).lines().find(|line| line.starts_with("data = ")).map(str::to_owned)
    };
    assert_eq!(data(false, &[]).as_deref(), Some("data = \"/from-file\""));
    assert_eq!(data(true, &[]).as_deref(), Some("data = \"/from-env\""));
    assert_eq!(data(true, &["--data", "/from-flag"]).as_deref(), Some("data = \"/from-flag\""));
}

#[test]
fn wrong_configuration_files_are_named() {
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("blockd.toml");
    assert_fails(&["serve", "--config", path(&file)], &["cannot read", path(&file)]);
    for (text, word) in
        [("colour = 1", "\"colour\""), ("log-size = \"big\"", "big"), ("[log]\nsize = 1", "\"log\""), ("x", "TOML")]
    {
        std::fs::write(&file, text).unwrap();
        assert_fails(&["serve", "--config", path(&file)], &[path(&file), word]);
    }
}

#[test]
fn a_daemon_refuses_what_is_not_its_own() {
    let tmp = tempfile::tempdir().unwrap();
    std::fs::write(tmp.path().join("precious"), "").unwrap();
    let data = path(tmp.path());
    assert_fails(
        &["serve", "--data", data, "--nbd-tcp", "none"],
        &["cannot open data directory", "precious", "--data"],
    );
    assert_fails(&["serve", "--data", data, "--log-size", "1MiB"], &["log-size"]);
    assert_fails(&["serve", "--data", data, "--store", "ftp://x"], &["ftp://x"]);
}
