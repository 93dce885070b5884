"""Public name of the worker extension for vLLM servers that training loads weights into (``--worker-extension-cls``).

The class is defined in :mod:`.engines.vllm.weight_sync`.
"""

from .engines.vllm.weight_sync import WeightSync

__all__ = ["WeightSync"]
