"""What the process may use: affinity, cgroup limits and processor flags, by files that say so."""

import os
from pathlib import Path

import pytest
import torch

from model import machine
from model.machine import available_memory, processor_flags, usable_cores


def cgroup_with(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


class TestUsableCores:
    @pytest.fixture(autouse=True)
    def eight_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    @pytest.mark.parametrize(
        ("cpu_max", "cores"),
        [
            ("max 100000\n", 8),
            ("200000 100000\n", 2),
            ("150000 100000\n", 2),  # a part of a core is worth a thread
            ("50000 100000\n", 1),
            ("1000 100000\n", 1),
            ("25000 10000\n", 3),
            ("6400000 100000\n", 8),  # more than there are
        ],
    )
    def test_the_quota_of_the_cgroup(self, tmp_path: Path, cpu_max: str, cores: int) -> None:
        assert usable_cores(cgroup_with(tmp_path, cpu_max=cpu_max)) == cores

    @pytest.mark.parametrize("cpu_max", ["", "max", "a b\n", "100000 0 7\n"])
    def test_a_file_that_says_nothing(self, tmp_path: Path, cpu_max: str) -> None:
        assert usable_cores(cgroup_with(tmp_path, cpu_max=cpu_max)) == 8

    @pytest.mark.parametrize("cpu_max", ["100000 0\n", "-1 100000\n"])
    def test_numbers_that_make_no_sense(self, tmp_path: Path, cpu_max: str) -> None:
        assert usable_cores(cgroup_with(tmp_path, cpu_max=cpu_max)) >= 1

    def test_no_cgroup(self, tmp_path: Path) -> None:
        assert usable_cores(tmp_path / "none") == 8

    def test_affinity_below_the_quota(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
        assert usable_cores(cgroup_with(tmp_path, cpu_max="400000 100000\n")) == 1

    def test_a_system_without_affinity(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "sched_getaffinity")
        monkeypatch.setattr(os, "cpu_count", lambda: 6)
        assert usable_cores(tmp_path) == 6
        monkeypatch.setattr(os, "cpu_count", lambda: None)
        assert usable_cores(tmp_path) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_real_affinity_is_read(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores(tmp_path) == len(before)


class TestProcessorFlags:
    def test_the_first_processor_s(self, tmp_path: Path) -> None:
        file = tmp_path / "cpuinfo"
        file.write_text(
            "processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t: x\n\nprocessor\t: 1\nflags\t\t: fpu\n"
        )
        assert processor_flags(file) == {"fpu", "avx2", "fma"}

    def test_other_processors_and_systems_have_none(self, tmp_path: Path) -> None:
        file = tmp_path / "cpuinfo"
        file.write_text("processor\t: 0\nFeatures\t: fp asimd\n")  # arm64
        assert processor_flags(file) == frozenset()
        assert processor_flags(tmp_path / "missing") == frozenset()


class TestMemory:
    def test_the_cgroup_s_limit_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "_machine_memory", lambda: 1000)
        for limit, current, want in (
            ("max\n", "5", None),
            ("900", "300", 600),
            ("900", "950", 0),
            ("x", "5", None),
        ):
            folder = cgroup_with(tmp_path, memory_max=limit, memory_current=current)
            assert machine._cgroup_memory(folder) == want
        for left, want in ((None, 1000), (600, 600), (5000, 1000)):
            monkeypatch.setattr(machine, "_cgroup_memory", lambda left=left: left)
            assert available_memory(torch.device("cpu")) == want
