#!/usr/bin/env bash
# Other people's programs over NFS, by the kernel's own client: pjdfstest, fsx, git and a C project's build, tar, SQLite, mappings.
# PROGRAMS names some of them (pjdfstest fsx tree sqlite mmap), VERSIONS some of 4.2, 4.1, 3. LONG=1 has more of each, and all versions.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/nfs-lib.sh"

mkdir -p "$work/share"
for program in "pjdfstest 0.2.2" "fsx 0.3.2"; do
    # shellcheck disable=SC2086
    cp "$("$root/scripts/fs-tests/tool" $program)" "$work/share/"
done
cp "$root"/scripts/fs-tests/{mapped.py,writer.py,pjdfstest-config.sh} "$here/pjdfstest.expected" "$work/share/"

# A real C project, with a Makefile and a test of its own: bzip2, which a crate that is compiled anyway brings. As a git repository.
bzip2=$(cargo metadata --manifest-path "$root/Cargo.toml" --locked --format-version 1 |
    jq -r '.packages[] | select(.name == "bzip2-sys") | .manifest_path' | sed 's,/Cargo.toml$,,')/bzip2-1.0.8
[ -e "$bzip2/Makefile" ] || die "the sources of bzip2 are not in $bzip2"
export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t
git init -q -b main "$work/bzip2"
cp "$bzip2"/* "$work/bzip2/"
chmod u+w "$work/bzip2"/*
for part in README LICENSE '*.c' .; do
    git -C "$work/bzip2" add "$part"
    git -C "$work/bzip2" commit -q -m "$part"
done
git clone -q --bare --no-hardlinks "$work/bzip2" "$work/share/bzip2.git"

limit=900
[ -z "$long" ] || limit=7200
fsd_test --mem 1536 --timeout "${TIMEOUT:-$limit}" --env PROGRAMS="${PROGRAMS:-}" --env VERSIONS="${VERSIONS:-}" --env PJDFSTEST="${PJDFSTEST:-}"
