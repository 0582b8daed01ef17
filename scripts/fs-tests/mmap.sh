#!/usr/bin/env bash
# Mapped files: what one process writes through a mapping, others see through mappings, reads, and after a remount.
. "$(dirname "$0")/lib.sh"

fs_make
fs_mount
cat >"$work/mapped.py" <<'PYTHON'
import mmap, os, struct, sys, time
path, role, rounds = sys.argv[1], sys.argv[2], 2000
pages = 64
with open(path, "r+b") as file:
    memory = mmap.mmap(file.fileno(), pages * 4096)
    if role == "writer":
        for number in range(1, rounds + 1):
            page = number * 37 % pages
            memory[page * 4096 + 8:page * 4096 + 16] = struct.pack("<Q", number)
            memory[0:8] = struct.pack("<Q", number)
            if number % 500 == 0:
                memory.flush()
        memory.flush()
    else:
        last, deadline = 0, time.time() + 60
        while last < rounds:
            (number,) = struct.unpack("<Q", memory[0:8])
            assert number >= last, (number, last)
            page = number * 37 % pages
            (there,) = struct.unpack("<Q", memory[page * 4096 + 8:page * 4096 + 16])
            assert number == 0 or there >= number, (number, there)
            if number:
                (read,) = struct.unpack("<Q", os.pread(file.fileno(), 8, page * 4096 + 8))
                assert read >= number, (read, number)
            last = number
            assert time.time() < deadline, "the writer is not seen"
PYTHON
truncate -s $((64 * 4096)) "$mnt/mapped"
python3 "$work/mapped.py" "$mnt/mapped" reader &
reader=$!
python3 "$work/mapped.py" "$mnt/mapped" writer
wait $reader
before=$(sha256sum <"$mnt/mapped")
fs_umount
fs_check
fs_mount
[ "$before" = "$(sha256sum <"$mnt/mapped")" ] || { echo "what was written through a mapping is lost" >&2; exit 1; }
fs_umount
echo "2000 writes through a mapping, seen by another process and after a remount"
