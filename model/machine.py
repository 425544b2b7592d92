"""What this process may use of its machine: memory, cores, instructions; limits of its cgroup heeded."""

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_machine_memory(), _cgroup_memory()]
    return min(size for size in free if size is not None)


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores by affinity and by CPU quota (cgroup v2), at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        pass
    return max(cores, 1)


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's features by their Linux names; empty where they cannot be read."""
    try:
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def _machine_memory() -> int:
    """MemAvailable of proc(5), or a careful guess where there is no /proc."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def _cgroup_memory(cgroup: Path = CGROUP) -> int | None:
    """What a container's limit leaves (cgroup v2), None without a limit."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        return None if limit == "max" else max(int(limit) - used, 0)
    except (OSError, ValueError):
        return None
