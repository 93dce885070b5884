"""New weights for a running vLLM: the extension of its worker processes, loaded by ``worker_extension_cls``.

vLLM's ``reload_weights`` reads a Hugging Face folder into the running model. On a CPU that is not enough: linear layers
keep a copy packed by oneDNN, and where head and embedding are tied, the head's copy keeps the old weights, as no weight
of its own is loaded. The model then answers with neither the old nor the new weights' tokens. The head is repacked
here; the caller must check with a probe that it worked, since nothing else shows it.
"""

from __future__ import annotations

from typing import Any

#: The class that vLLM loads, by its public name (:mod:`capipe.models.vllm_sync`), and the method to call.
EXTENSION, RELOAD = "capipe.models.vllm_sync.WeightSync", "capipe_reload"


class WeightSync:
    """Methods added to vLLM's worker. ``model_runner`` is the worker's own."""

    model_runner: Any

    def capipe_reload(self, path: str) -> None:
        """Load the weights of the folder ``path`` and empty the caches computed with the old ones."""
        self.model_runner.reload_weights(weights_path=path)
        model = self.model_runner.get_model()
        _pack_tied_heads(model)


def _pack_tied_heads(model: Any) -> None:
    """Repack heads that share the embedding's weight (vLLM on CPUs only)."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
