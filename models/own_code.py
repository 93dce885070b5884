"""Models with custom Python code (``auto_map`` in their configuration): it is never run, without any prompt.

Every load passes ``trust_remote_code=False``. Libraries that load through transformers may not; transformers would then
prompt on standard input, and run the code if the answer is yes.
"""

from __future__ import annotations

NEEDS_CODE = "trust_remote_code"  # in transformers' error about it
ADVICE = (
    "it needs code of its own, which lies beside its weights and is not run; take a model that transformers knows by "
    "itself, or serve it where you trust it (vllm serve MODEL --trust-remote-code) and give the URL by --engine"
)


def ask_nothing() -> None:
    """Make transformers refuse such models without a prompt, in the whole process."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds to wait for an answer


def reason_in_words(error: Exception, *, whole: bool = False) -> str:
    """Reason why a model does not load: the error's message, its first line or the ``whole``.

    transformers' own advice about custom code names an argument that is not available here, so it is replaced.
    """
    if NEEDS_CODE in str(error):
        return ADVICE
    text = str(error) or type(error).__name__
    return text if whole else text.splitlines()[0]
