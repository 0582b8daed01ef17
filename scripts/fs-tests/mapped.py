"""One process writes a file through a mapping, another sees it, through a mapping and by reading, in order.

Usage: mapped.py FILE writer|reader ROUNDS, both at once. The file has 64 pages.
"""
import mmap
import os
import struct
import sys
import time

path, role, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
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
        last, deadline = 0, time.time() + 120
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
