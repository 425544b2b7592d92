"""Memory of weights and cache: where it begins, what it shares, when it goes, and how large its pages are."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import memory

MIB = 1 << 20


def large_kibibytes() -> int:
    """Of this process's memory, what lies in large pages."""
    return int(re.findall(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[0])


def test_everything_begins_at_a_cache_line_and_is_zero() -> None:
    for shape, dtype in (((3,), torch.int8), ((5, 7), torch.float32), ((33, 2), torch.bfloat16)):
        made = memory.zeros(shape, dtype)
        assert (made.shape, made.dtype) == (shape, dtype)
        assert made.data_ptr() % memory.LINE == 0
        assert not made.any()


def test_nothing_is_given_twice() -> None:
    """Small ones and those of a region and more, each filled with its own number."""
    sizes = [1, 63, 64, 65, MIB, memory.REGION - 1, memory.REGION, memory.REGION + 1, 3 * MIB]
    made = [memory.zeros((size,), torch.uint8) for size in sizes]
    for number, part in enumerate(made, 1):
        assert not part.any()
        part.fill_(number)
    for number, part in enumerate(made, 1):
        assert int(part.min()) == int(part.max()) == number


def test_a_region_goes_with_the_last_tensor_in_it() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4096

    gc.collect()  # what other tests left would go meanwhile
    size = 8 * memory.REGION
    before = mapped()
    whole = memory.zeros((size,), torch.uint8)
    part = whole[:10]
    del whole
    gc.collect()
    assert mapped() - before >= size
    del part
    gc.collect()
    assert mapped() - before < size / 2


def test_pages_are_large() -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists() or "[never]" in modes.read_text():
        pytest.skip("this system gives no large pages")
    before = large_kibibytes()
    made = [memory.zeros((MIB // 2,), torch.uint8).fill_(1) for _ in range(256)]  # none fills a page alone
    assert large_kibibytes() - before > 0.8 * 128 * 1024
    assert len(made) == 256


GIVING_BACK = """
import re
import subprocess
import sys
from pathlib import Path
from model.lean import give_back, import_torch

import_torch()
import torch

def mapped():
    return int(re.findall(r"RssFile:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0])

before = mapped()
give_back()
after = mapped()
assert torch.ones(3, 3).mm(torch.ones(3, 3)).sum() == 27
print(before - after)
"""


def test_code_that_only_a_start_runs_is_given_back() -> None:
    """And comes again when it is called."""
    done = subprocess.run([sys.executable, "-c", GIVING_BACK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20_000, "kB"
