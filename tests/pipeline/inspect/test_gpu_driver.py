"""What `capipe doctor` makes of a driver's answers: as nvidia-smi prints them, and where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from capipe.pipeline.commands.doctor import _gpus
from capipe.pipeline.inspect import gpu_driver
from capipe.pipeline.inspect.gpu_driver import MIB, Driver, Gpu, found_driver, memory_line, parse_smi, taken, unfit

QUERY = """\
0, NVIDIA H100 80GB HBM3, 580.95.05, 81079, 81559
1, NVIDIA H100 80GB HBM3, 580.95.05, 9432, 81559
"""
BANNER = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
"""
OLD = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4     |"
SHARED = "0, NVIDIA GB10, 580.95.05, [N/A], [N/A]\n"  # its memory is the CPU's


def driver(cuda: tuple[int, int] | None) -> Driver:
    return Driver("5", cuda, ())


def test_a_driver_is_read() -> None:
    found = parse_smi(QUERY, BANNER)
    assert found == Driver(
        "580.95.05",
        (13, 0),
        (
            Gpu(0, "NVIDIA H100 80GB HBM3", 81079 * MIB, 81559 * MIB),
            Gpu(1, "NVIDIA H100 80GB HBM3", 9432 * MIB, 81559 * MIB),
        ),
    )
    assert parse_smi(QUERY, OLD) is not None and parse_smi(QUERY, OLD).cuda == (12, 4)  # type: ignore[union-attr]
    assert parse_smi(SHARED, "CUDA UMD Version: 13.1") == Driver(
        "580.95.05", (13, 1), (Gpu(0, "NVIDIA GB10", None, None),)
    )
    assert parse_smi("No devices were found\n", BANNER) is None
    assert parse_smi(QUERY, "") == Driver("580.95.05", None, found.gpus)


def test_memory_is_told_and_what_others_hold() -> None:
    free, held = parse_smi(QUERY, BANNER).gpus  # type: ignore[union-attr]
    assert memory_line(free) == "NVIDIA H100 80GB HBM3, 79.2 of 79.6 GiB free" and taken(free) is None
    assert memory_line(held) == "NVIDIA H100 80GB HBM3, 9.2 of 79.6 GiB free"
    assert "give --gpu-memory 0.11 at most" in str(taken(held))
    shared = parse_smi(SHARED, BANNER).gpus[0]  # type: ignore[union-attr]
    assert memory_line(shared) == "NVIDIA GB10, memory not told" and taken(shared) is None


def test_drivers_and_wheels() -> None:
    assert unfit(driver((13, 0)), "13.0") is None
    assert unfit(driver((13, 0)), "13.2") is None  # any driver of a major version runs its later ones
    assert unfit(driver((12, 2)), "12.8") is None
    assert unfit(driver((13, 1)), "12.8") is None
    assert unfit(driver(None), "13.0") is None
    late = unfit(driver((12, 4)), "13.0")
    assert late is not None and "torch is built for CUDA 13.0, this driver supports CUDA 12.4" in late
    assert "580 or newer" in late
    assert "525 or newer" in str(unfit(driver((11, 8)), "12.8"))
    cpu = unfit(driver((13, 0)), None)
    assert cpu == "torch is built for CPUs: pip install 'capipe[vllm]' in another environment"
    both = unfit(driver((12, 4)), None)
    assert both is not None and "CUDA 13" in both and "update the driver to 580 or newer first" in both


def fake_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(gpu_driver, "_by_nvml", lambda: None)


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "query").write_text(QUERY)
    (tmp_path / "banner").write_text(OLD)
    fake_smi(tmp_path, f'if [ "$2" ]; then cat {tmp_path}/query; else cat {tmp_path}/banner; fi', monkeypatch)
    monkeypatch.setattr("capipe.pipeline.commands.doctor._torch_cuda", lambda: "13.0")
    lines = list(_gpus())
    assert [each.name for each in lines] == ["gpu driver", "gpu 0", "gpu 1"]
    assert lines[0].found == "580.95.05, for CUDA up to 12.4" and lines[0].mend is not None and lines[0].required
    assert lines[1].mend is None and lines[2].mend is not None and not lines[2].required


def test_a_driver_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, "echo 'NVIDIA-SMI has failed: no communication with the driver.'; exit 9", monkeypatch)
    assert found_driver() == "NVIDIA-SMI has failed: no communication with the driver."
    (finding,) = _gpus()
    assert "does not answer (NVIDIA-SMI has failed" in finding.found and finding.mend is not None


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_driver, "_by_nvml", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = _gpus()
    assert finding.found == "none: this machine has no GPU that CUDA could use" and finding.mend is None


def test_nvml_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception): ...

    def memory(index: int) -> SimpleNamespace:
        if index:
            raise NVMLError
        return SimpleNamespace(free=7, total=9)

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetCudaDriverVersion=lambda: 12080,
        nvmlSystemGetDriverVersion=lambda: b"570.1",
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda index: f"GPU {index}",
        nvmlDeviceGetMemoryInfo=memory,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert found_driver() == Driver("570.1", (12, 8), (Gpu(0, "GPU 0", 7, 9), Gpu(1, "GPU 1", None, None)))
