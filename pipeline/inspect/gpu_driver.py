"""Query of this machine's GPU driver: version, supported CUDA, memory of each GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

QUERY = ("--query-gpu=index,name,driver_version,memory.free,memory.total", "--format=csv,noheader,nounits")
SECONDS = 20.0  # timeout of nvidia-smi: a hanging driver is reported, too
MIB, GIB = 1 << 20, 1 << 30
#: CUDA version of the torch and vLLM wheels of `capipe[vllm]`, and the first driver that supports it.
WHEELS_CUDA, WHEELS_DRIVER = (13, 0), "580"
CUDA_12_DRIVER = "525"
LEAST_FREE = 0.9  # of a GPU's memory: vLLM's default request

Version = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """``free``, ``total``: bytes; None if the driver does not report them (memory shared with the CPU)."""

    index: int
    name: str
    free: int | None
    total: int | None


@dataclass(frozen=True)
class Driver:
    """``cuda``: newest supported CUDA version."""

    version: str
    cuda: Version | None
    gpus: tuple[Gpu, ...]


def found_driver() -> Driver | str | None:
    """Query the driver by NVML if installed, else by nvidia-smi; its error text if it fails; None without a driver."""
    by_library = _by_nvml()
    if by_library is not None:
        return by_library
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        query, banner = _output(*QUERY), _output()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stdout", None) or str(error)
        return " ".join(said.split())[:200]
    return parse_smi(query, banner)


def _output(*arguments: str) -> str:
    command = ["nvidia-smi", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def parse_smi(query: str, banner: str) -> Driver | None:
    """Parse the output of `nvidia-smi` for :data:`QUERY` and without arguments; None if it lists no GPU."""
    rows = [[cell.strip() for cell in line.split(",")] for line in query.splitlines() if line.count(",") >= 4]
    if not rows:
        return None
    gpus = tuple(Gpu(int(row[0]), ", ".join(row[1:-3]), _bytes(row[-2]), _bytes(row[-1])) for row in rows)
    cuda = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)", banner)
    return Driver(rows[0][-3], (int(cuda[1]), int(cuda[2])) if cuda else None, gpus)


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) * MIB if mebibytes.isdigit() else None


def _by_nvml() -> Driver | None:
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = _nvml_memory(pynvml, handle)
            gpus.append(Gpu(index, _text(pynvml.nvmlDeviceGetName(handle)), *memory))
        version = _text(pynvml.nvmlSystemGetDriverVersion())
        return Driver(version, (cuda // 1000, cuda % 1000 // 10), tuple(gpus)) if gpus else None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _nvml_memory(pynvml: object, handle: object) -> tuple[int | None, int | None]:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)  # type: ignore[attr-defined]
    except pynvml.NVMLError:  # type: ignore[attr-defined]
        return None, None
    return int(memory.free), int(memory.total)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def unfit(driver: Driver, torch_cuda: str | None) -> str | None:
    """Reason that the installed wheels cannot use the driver, with the fix; None if they can.

    ``torch_cuda``: CUDA version of the installed torch, None for a CPU build. Within one major version any driver
    works, except for features of later minor versions.
    """
    needed = WHEELS_CUDA if torch_cuda is None else _version(torch_cuda)
    late = driver.cuda is not None and driver.cuda[0] < needed[0]
    first = WHEELS_DRIVER if needed[0] >= WHEELS_CUDA[0] else CUDA_12_DRIVER
    update = f"update the driver to {first} or newer" if late else ""
    has = f"this driver supports CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
    if torch_cuda is None:
        install = "torch is built for CPUs: pip install 'capipe[vllm]' in another environment"
        return f"{install}, whose wheels are for CUDA {needed[0]}; {has}: {update} first" if late else install
    if not late:
        return None
    return f"torch is built for CUDA {torch_cuda}, {has}: {update}, or install wheels of torch and vLLM for that CUDA"


def _version(text: str) -> Version:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def memory_line(gpu: Gpu) -> str:
    """One-line description of a GPU: name and free memory."""
    if gpu.free is None or gpu.total is None:
        return f"{gpu.name}, memory not told"
    return f"{gpu.name}, {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"


def taken(gpu: Gpu) -> str | None:
    """Advice on memory held by other processes; None if vLLM's default request fits."""
    if gpu.free is None or gpu.total is None or gpu.free >= LEAST_FREE * gpu.total:
        return None
    share = int(100 * gpu.free / gpu.total) / 100
    return f"something holds the rest (nvidia-smi names it): end it, or give --gpu-memory {share:.2f} at most"
