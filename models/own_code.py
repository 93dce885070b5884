"""Models that bring Python files of their own (``auto_map`` in their configuration): never run, never asked about.

Every load says ``trust_remote_code=False``. Libraries that load by transformers for us may not say so; transformers
would then ask on standard input, and run what it was told to by whatever stands there.
"""

from __future__ import annotations

NEEDS_CODE = "trust_remote_code"  # in transformers' error about it
ADVICE = (
    "it needs code of its own, which lies beside its weights and is not run; take a model that transformers knows by "
    "itself, or serve it where you trust it (vllm serve MODEL --trust-remote-code) and give the URL by --engine"
)


def ask_nothing() -> None:
    """Have transformers refuse such a model, whoever loads it in this process."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds for an answer


def reason_in_words(error: Exception, *, whole: bool = False) -> str:
    """Why a model does not load: what the error says, its first line or the ``whole``.

    transformers' own advice about such a model is an argument that nobody can give here.
    """
    if NEEDS_CODE in str(error):
        return ADVICE
    text = str(error) or type(error).__name__
    return text if whole else text.splitlines()[0]
