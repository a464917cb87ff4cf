"""What the control groups around this process leave to it: processor time and memory, in containers and under SLURM.

Version 2 has one tree with files such as cpu.max and memory.max, version 1 a tree for each controller with files of
other names. A container often sees its own group as the root, whatever name /proc has for it, so the root is looked at
too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROCESS_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
MEMORY_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def processor_limits() -> Iterator[float]:
    """CPU time per time of the clock that each group may use at most."""
    for folder in _folders("cpu"):
        try:
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota.strip() not in ("max", "-1"):
                yield float(quota) / float(period)
        except (OSError, ValueError):  # not there, or not to be read
            continue


def free_memories() -> Iterator[int]:
    """Bytes that each group with a limit may still take; what files are cached in is free, since it can be dropped."""
    for folder in _folders("memory"):
        for limit, usage in MEMORY_FILES:
            try:
                allowed = (folder / limit).read_text().strip()
                if allowed != "max":
                    taken = int((folder / usage).read_text()) - _cached(folder)
                    yield max(0, int(allowed) - taken)
            except (OSError, ValueError):  # not there, or not to be read
                continue


def _cached(folder: Path) -> int:
    """Bytes of cached files; version 1 counts those of groups within under names that begin with total_."""
    numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    prefix = "total_" if "total_inactive_file" in numbers else ""
    return sum(int(numbers[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))


def _folders(controller: str) -> Iterator[Path]:
    """Of the groups around this process that `controller` may limit, with those around them."""
    if not PROCESS_CGROUPS.is_file():
        return
    for line in PROCESS_CGROUPS.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        group = Path(name.lstrip("/"))
        unified, own = (CGROUPS, CGROUPS / "unified"), (CGROUPS / controllers, CGROUPS / controller)
        for mount in own if controllers else unified:
            yield from (mount / group, *(mount / parent for parent in group.parents))
