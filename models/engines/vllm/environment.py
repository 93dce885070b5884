"""Environment variables for vLLM's processes."""

from __future__ import annotations

import os
import warnings

# vLLM reads these when it is imported. The start method is fixed: a forked engine would hold copies of this process's
# pipes, so that their other ends never see this process die, and would not end with it.
REQUIRED = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
# Defaults: values set by the user are kept.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch._library",  # which warns of triton, where we hid it
    "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",  # it asks torch for each of its names
}


def prepare_environment() -> None:
    """Make vLLM spawn its processes, log less and send no usage reports. Call it before anything imports vLLM."""
    os.environ.update(REQUIRED)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # here; children read the variable


def allow_handles() -> None:
    """Let vLLM pickle what it sends to its own engine process, as CUDA's memory handles need; before it starts."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
