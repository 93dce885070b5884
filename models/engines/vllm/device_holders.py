"""Who else has the device that an engine could not start on: by pid, so that somebody can end it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

MIB = 1 << 20


def device_holders(on_gpu: bool) -> list[str]:
    """Engines of vLLM's whose owner is gone, and on GPUs whatever else computes on ours, in words; never an error."""
    import psutil

    with contextlib.suppress(psutil.Error):
        own = {os.getpid(), *(each.pid for each in psutil.Process().children(recursive=True))}
        found = {pid: f"pid {pid} ({name}, an engine whose owner is gone)" for pid, name in orphaned_engines()}
        if on_gpu:
            for pid, mebibytes in _computing():
                found.setdefault(pid, f"pid {pid} ({_name(pid)})")
                found[pid] += f" with {mebibytes} MiB of GPU memory" if mebibytes is not None else ""
        return [text for pid, text in sorted(found.items()) if pid not in own]
    return []


def orphaned_engines() -> list[tuple[int, str]]:
    """vLLM's processes that init, or what stands in for it, has taken in: pid and name."""
    import psutil

    found = []
    for process in psutil.process_iter(["name", "ppid"]):
        name, parent = process.info["name"] or "", process.info["ppid"]
        if name.startswith("VLLM") and (parent == 1 or _name(parent) == "systemd"):
            found.append((process.pid, name))
    return found


def _computing() -> Iterator[tuple[int, int | None]]:
    """Pids on the GPUs that this process sees, with their MiB where the driver tells them."""
    from vllm.third_party import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            for handle in _handles(pynvml):
                for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    used = each.usedGpuMemory
                    yield each.pid, None if used is None else used // MIB
        finally:
            pynvml.nvmlShutdown()


def _handles(pynvml: Any) -> list[Any]:
    """NVML counts all GPUs, CUDA those of CUDA_VISIBLE_DEVICES, which has numbers or UUIDs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [
        pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]


def _name(pid: int) -> str:
    import psutil

    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "a process of another container"
