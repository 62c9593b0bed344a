"""Peaks of memory, and what is free."""

import mmap

from dijiang.common import memory


def test_peak_memory_sees_what_was_freed_again():
    with memory.PeakMemory() as peak:
        pages = mmap.mmap(-1, 1 << 26)  # torch might reuse memory that is resident already
        for start in range(0, 1 << 26, mmap.PAGESIZE):
            pages[start] = 1
        pages.close()
    assert 0.9 * (1 << 26) < peak.bytes < 1.5 * (1 << 26)


def test_peak_memory_of_a_block_that_takes_nothing():
    with memory.PeakMemory() as peak:
        pass
    assert 0 <= peak.bytes < 1 << 22


def test_available_memory_is_a_part_of_all():
    assert 0 < memory.available_bytes() < memory.total_bytes()


def test_the_peak_of_the_process_covers_what_it_holds():
    resident = memory.linux_bytes(memory.RESET_PEAK.with_name("status"), "VmRSS")
    assert 0.9 * resident < memory.peak_bytes() < memory.total_bytes()
