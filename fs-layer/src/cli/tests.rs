use super::*;

#[test]
fn the_commands_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn commands_read_as_documented() {
    for line in [
        "fsd mkfs",
        "fsd mkfs --store s3://bucket/prefix --engine s3-endpoint=http://h --label home",
        "fsd mkfs --disk /tmp/d --size 10GiB --force --yes",
        "fsd mkfs --nbd nbd://h:1/v --journal-size 16MiB --quota 1TiB",
        "fsd mount /mnt --daemon",
        "fsd mount /mnt --disk /dev/sdb --read-only --threads 4 --no-suid --no-dev",
        "fsd mount /mnt --config /etc/fsd.toml --print-config",
        "fsd serve --nfs 0.0.0.0:2049",
        "fsd check --disk /tmp/d --repair --json",
        "fsd status --watch 5 --json --data /d",
        "fsd snapshot create monday --data /d --json",
        "fsd snapshot list",
        "fsd snapshot ls --json",
        "fsd snapshot delete monday",
    ] {
        Cli::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for line in [
        "fsd",
        "fsd mount",
        "fsd mount /mnt --threads 0",
        "fsd mkfs --disk /a --nbd nbd://h/v",
        "fsd mkfs --size many",
        "fsd status --watch never",
        "fsd snapshot",
        "fsd snapshot create",
    ] {
        assert_eq!(Cli::try_parse_from(line.split(' ')).expect_err(line).exit_code(), 2, "{line}");
    }
}

#[test]
fn every_flag_says_what_it_does() {
    for command in Cli::command().get_subcommands() {
        for arg in command.get_arguments() {
            assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
        }
    }
}
