"""Huge pages for the weights of a loaded engine, on Linux.

A decode step reads every weight once. In 4 KB pages that costs a page-table walk per page; in 2 MB pages hardly any,
which is worth up to a tenth of the decode speed where memory is quick. The kernel makes huge pages by itself only where
transparent huge pages are set to "always"; at the more common "madvise" a program must ask. Memory that a library has
allocated can still be asked for afterwards: the kernel then copies it, 2 MB at a time (Linux 6.1 or later).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

MIN_BYTES = 16 << 20
"""Smaller mappings stay as they are: a model that fits the caches gains nothing."""

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def use_huge_pages() -> int:
    """Move this process's large, filled anonymous mappings to huge pages; returns how many bytes were moved.

    Does nothing where the kernel cannot or may not, and where the memory is in huge pages already.
    """
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text(encoding="ascii"):
            return 0
        page = int((_SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
        mappings = list(_filled_mappings(page))
    except OSError:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    moved = 0
    for start, end in mappings:
        address, length = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        if libc.madvise(address, length, _MADV_HUGEPAGE) == 0 and libc.madvise(address, length, _MADV_COLLAPSE) == 0:
            moved += end - start
    return moved


def _filled_mappings(page: int) -> Iterator[tuple[int, int]]:
    """Start and end, in whole huge pages, of mappings of which nearly all is in memory, and not in huge pages.

    A thread's stack, say, is mapped large and mostly empty: huge pages would fill it.
    """
    header = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *$")
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8")):
        match = header.match(block.partition("\n")[0])
        if match is None:
            continue
        start, end = (int(x, 16) for x in match.groups())
        sizes = {key: int(kb) << 10 for key, kb in re.findall(r"^(\w+): +(\d+) kB$", block, re.MULTILINE)}
        filled = sizes.get("Rss", 0) >= 0.9 * (end - start) and sizes.get("AnonHugePages", 0) < 0.5 * (end - start)
        start, end = -(-start // page) * page, end // page * page
        if filled and end - start >= MIN_BYTES:
            yield start, end
