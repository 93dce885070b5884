"""The name by which users start vLLM servers that training loads weights into: ``--worker-extension-cls``.

The class stands in :mod:`.engines.vllm.weight_sync`.
"""

from .engines.vllm.weight_sync import WeightSync

__all__ = ["WeightSync"]
