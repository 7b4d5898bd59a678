"""Freed memory is used again where a program asks for that, and can be handed back."""

import platform

import pytest
from running import python

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's heap")

FAULTS = """
import resource
import torch
from moe_compress.heap import reuse_freed

torch.set_num_threads(1)
{prepare}
def filled():
    torch.ones(16 << 20 >> 2)  # 16 MiB: 4096 pages
    torch.ones(48 << 20 >> 2)

for _ in range(5):
    filled()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    filled()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
RELEASED = """
import torch
from moe_compress.heap import release_freed, reuse_freed

def resident():
    pages = open("/proc/self/statm").read().split()[1]
    return int(pages) >> 8  # MiB, at 4 KiB a page

torch.set_num_threads(1)
reuse_freed()
before = resident()
torch.ones(100 << 20 >> 2)
kept = resident()
release_freed()
print(kept - before, resident() - before)
"""


def printed(program: str) -> list[int]:
    return [int(number) for number in python("-c", program).split()]


def test_freed_blocks_are_used_again():
    """Pages are faulted in once, not at every allocation."""
    (again,), (anew,) = (printed(FAULTS.format(prepare=p)) for p in ("reuse_freed()", ""))
    assert anew > 50_000
    assert again < 5_000


def test_what_is_kept_is_handed_back():
    kept, left = printed(RELEASED)
    assert kept > 90
    assert left < 10
