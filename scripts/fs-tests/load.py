"""Load for kill.sh: processes that make, write, rename and remove files, and note outside the mount what was synced.

A note is one line, written after the fsync of the file and of its directory returned: `+ NAME CONTENTS-NUMBER` or `- NAME`.
Each process has names of its own, so the last note on a name says what must be there; the operation that was under way when
fsd was killed has no note, and may have happened or not: it is noted with `?` before it begins.

Usage: load.py run MOUNT LOG SEED WORKERS [STOP]; load.py verify MOUNT LOG. Without STOP the load ends when fsd is gone. With it, it ends
when there is such a file, and must see no error before, as over NFS: clients wait for the server.
"""
import glob
import multiprocessing
import os
import random
import sys


def contents(number):
    size = random.Random(number).choice([0, 10, 3000, 4096, 5000, 70000, 300000])
    return random.Random(number + 1).randbytes(size)


def sync_dir(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def work(mount, log, seed, worker, stop=None):
    choose = random.Random(seed * 100 + worker)
    base = os.path.join(mount, f"w{worker}")
    out = open(f"{log}.{worker}", "a", buffering=1)
    try:
        os.makedirs(base, exist_ok=True)
        sync_dir(mount)
        number = seed * 1000000 + worker * 100000
        while stop is None or not os.path.exists(stop):
            number += 1
            name = f"f{choose.randrange(40)}"
            path = os.path.join(base, name)
            kind = choose.random()
            if kind < 0.15 and os.path.exists(path):
                out.write(f"? {name} -1\n")
                os.unlink(path)
                sync_dir(base)
                out.write(f"- {name}\n")
            elif kind < 0.6:
                # The usual way to replace a file: a new one, synced, then renamed over it.
                new = path + ".new"
                with open(new, "xb" if stop else "wb") as file:
                    file.write(contents(number))
                    file.flush()
                    os.fsync(file.fileno())
                if stop:
                    # Each of these done twice would be an error.
                    os.link(new, path + ".link")
                    os.unlink(path + ".link")
                    os.mkdir(path + ".dir")
                    os.symlink("somewhere", path + ".dir/symlink")
                    os.unlink(path + ".dir/symlink")
                    os.rmdir(path + ".dir")
                out.write(f"? {name} {number}\n")
                os.rename(new, path)
                sync_dir(base)
                out.write(f"+ {name} {number}\n")
            else:
                # In place: until the fsync anything of the old and new contents may be there.
                out.write(f"? {name} *\n")
                with open(path, "wb") as file:
                    file.write(contents(number))
                    file.flush()
                    os.fsync(file.fileno())
                sync_dir(base)
                out.write(f"+ {name} {number}\n")
    except OSError as error:
        # ENOTCONN, ECONNABORTED, EIO: fsd is gone.
        if stop or error.errno not in (107, 103, 5, 2, 6):
            raise


def verify(mount, log):
    for path in glob.glob(log + ".*"):
        worker = path.rsplit(".", 1)[1]
        known, maybe = {}, {}
        for line in open(path):
            if not line.endswith("\n"):
                break
            mark, name, *rest = line.split()
            if mark == "?":
                maybe.setdefault(name, set()).add(rest[0])
            else:
                known[name] = rest[0] if mark == "+" else "-1"
                maybe.pop(name, None)
        for name in known.keys() | maybe.keys():
            allowed = {known.get(name, "-1")} | maybe.get(name, set())
            if "*" in allowed:
                continue
            try:
                found = open(os.path.join(mount, f"w{worker}", name), "rb").read()
            except FileNotFoundError:
                found = None
            for number in allowed:
                if (found is None and number == "-1") or (found is not None and number != "-1" and found == contents(int(number))):
                    break
            else:
                size = None if found is None else len(found)
                sys.exit(f"w{worker}/{name}: found {size} bytes, expected one of {allowed}")
        # From now on this is what counts: whatever the operation under way did, it did.
        for name in maybe:
            try:
                os.unlink(os.path.join(mount, f"w{worker}", name))
            except FileNotFoundError:
                pass
            with open(path, "a") as out:
                out.write(f"- {name}\n")
        if maybe:
            sync_dir(os.path.join(mount, f"w{worker}"))


if __name__ == "__main__":
    if sys.argv[1] == "verify":
        verify(*sys.argv[2:4])
    else:
        mount, log, seed, workers = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
        stop = sys.argv[6] if len(sys.argv) > 6 else None
        processes = [multiprocessing.Process(target=work, args=(mount, log, seed, n, stop)) for n in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        sys.exit(any(process.exitcode for process in processes))
