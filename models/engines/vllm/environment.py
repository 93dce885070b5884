"""The environment variables that vLLM's processes start with."""

from __future__ import annotations

import os
import warnings

# vLLM reads these when it is imported. Nobody may choose another start method: a forked engine holds copies of this
# process's pipes, so that whoever waits at their other ends never hears of a death, and does not follow us to ours.
REQUIRED = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
# Whoever set these by hand keeps what they set.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch._library",  # which misses triton where we hid it
    "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",  # it asks torch for each of its names
}


def prepare_environment() -> None:
    """Have vLLM spawn its processes, quiet it, keep its reports at home. Call it before anything imports vLLM."""
    os.environ.update(REQUIRED)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # here; children read the variable
