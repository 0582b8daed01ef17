#!/usr/bin/env bash
# A C project made here: committed and cloned with git, built, run, packed and unpacked, all inside the mount.
# Usage: tree.sh [FILES]
. "$(dirname "$0")/lib.sh"

files=${1:-60}
fs_make
fs_mount
mkdir "$mnt/origin"
cd "$mnt/origin"
{
    echo '#include <stdio.h>'
    for n in $(seq "$files"); do echo "int part_$n(int);"; done
    echo 'int main(void) { int sum = 0;'
    for n in $(seq "$files"); do echo "    sum = part_$n(sum);"; done
    echo '    printf("%d\n", sum); return 0; }'
} >main.c
for n in $(seq "$files"); do
    mkdir -p "src/d$((n % 7))"
    echo "int part_$n(int sum) { return sum + $n; }" >"src/d$((n % 7))/part_$n.c"
done
cat >Makefile <<'MAKE'
SOURCES := main.c $(wildcard src/*/*.c)
OBJECTS := $(SOURCES:.c=.o)
program: $(OBJECTS)
	$(CC) -o $@ $^
clean:
	rm -f $(OBJECTS) program
MAKE
export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t
git init -q -b main .
git -c core.fsync=all add .
git commit -q -m first
git clone -q "$mnt/origin" "$mnt/clone"
cd "$mnt/clone"
git fsck --full --strict 2>&1 | grep -v '^notice' || true
make -s -j2 CFLAGS=-O0
[ "$(./program)" = $((files * (files + 1) / 2)) ] || { echo "the program computes something else" >&2; exit 1; }
[ -z "$(make -s -n program)" ] || [ "$(make -n program)" = "make: 'program' is up to date." ] || { echo "make would build again: times are wrong" >&2; exit 1; }
make -s clean
git -C "$mnt/clone" diff --quiet
tar -C "$mnt" -cf "$mnt/origin.tar" origin
mkdir "$mnt/unpacked"
tar -C "$mnt/unpacked" -xf "$mnt/origin.tar"
diff -r "$mnt/origin" "$mnt/unpacked/origin"
cp -r --reflink=auto "$mnt/origin" "$mnt/copied"
diff -r "$mnt/origin" "$mnt/copied"
rm -rf "$mnt/clone" "$mnt/unpacked" "$mnt/origin.tar" "$mnt/copied"
sums=$(cd "$mnt/origin" && find . -type f -not -path './.git/*' -exec sha256sum {} + | sort)
cd /
fs_umount
fs_check
fs_mount
[ "$sums" = "$(cd "$mnt/origin" && find . -type f -not -path './.git/*' -exec sha256sum {} + | sort)" ]
fs_umount
echo "$files source files cloned, built, packed, copied"
