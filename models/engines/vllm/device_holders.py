"""Other processes that hold the device an engine failed to start on, by pid."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

MIB = 1 << 20


def device_holders(on_gpu: bool) -> list[str]:
    """Descriptions of orphaned vLLM engines and, on GPUs, of other processes that compute on ours; never raises."""
    import psutil

    with contextlib.suppress(psutil.Error):
        own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        holders = {pid: f"pid {pid} ({name}, an engine whose owner is gone)" for pid, name in orphaned_engines()}
        if on_gpu:
            for pid, mebibytes in _computing():
                holders.setdefault(pid, f"pid {pid} ({_name(pid)})")
                holders[pid] += f" with {mebibytes} MiB of GPU memory" if mebibytes is not None else ""
        return [text for pid, text in sorted(holders.items()) if pid not in own]
    return []


def orphaned_engines() -> list[tuple[int, str]]:
    """vLLM's processes that were adopted by init (or systemd): pid and name."""
    import psutil

    engines = []
    for process in psutil.process_iter(["name", "ppid"]):
        name, parent = process.info["name"] or "", process.info["ppid"]
        if name.startswith("VLLM") and (parent == 1 or _name(parent) == "systemd"):
            engines.append((process.pid, name))
    return engines


def _computing() -> Iterator[tuple[int, int | None]]:
    """Pids on the GPUs that this process sees, with their MiB where the driver reports them."""
    from vllm.third_party import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            for handle in _handles(pynvml):
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    used = process.usedGpuMemory
                    yield process.pid, None if used is None else used // MIB
        finally:
            pynvml.nvmlShutdown()


def _handles(pynvml: Any) -> list[Any]:
    """Handles of the visible GPUs: NVML counts all, CUDA those of CUDA_VISIBLE_DEVICES, by number or UUID."""
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
