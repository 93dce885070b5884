"""Ways of decoding that an engine does not have are refused before anything is started."""

from __future__ import annotations

import pytest

from capipe.errors import BadInput
from capipe.models.engines.base import Sampling, unsupported
from capipe.models.engines.decoding import engine_kind
from capipe.models.engines.loading import EngineConfig, check_servers

from ...scripted import Scripted
from ..chat_server import Double, completion, serving

BEAMS, PAIRS = Sampling(beams=5), Sampling(no_repeat_ngram=2)


def test_beams_and_banned_ngrams_are_for_transformers() -> None:
    for sampling in (BEAMS, PAIRS):
        assert engine_kind("auto", sampling) == engine_kind("transformers", sampling) == "transformers"
        assert engine_kind("my_engine:make", sampling) == "my_engine:make"  # it knows what it can
    for kind, who in (("vllm", "vLLM"), ("http://127.0.0.1:8000", "a server")):
        assert engine_kind(kind, Sampling(min_tokens=4, repetition_penalty=1.05)) == kind
        with pytest.raises(BadInput, match=f"--beams 5: {who} does not decode so; give --engine transformers"):
            engine_kind(kind, BEAMS)
        with pytest.raises(BadInput, match=f"--no-repeat-ngram 2: {who}"):
            engine_kind(kind, PAIRS)
    assert engine_kind("auto", Sampling()) == "auto"


@pytest.mark.parametrize(("owner", "refused"), [("vllm", False), ("sglang", False), ("somebody", True)])
def test_servers_are_asked_what_they_are_where_it_matters(owner: str, refused: bool) -> None:
    with serving(Double(lambda n, body: completion("x"), owner=owner)) as url:
        config = EngineConfig(url)
        check_servers(config, Sampling())
        if not refused:
            return check_servers(config, Sampling(min_tokens=4))
        for sampling, option in (
            (Sampling(min_tokens=4), "--min-tokens 4"),
            (Sampling(repetition_penalty=1.05), "1.05"),
        ):
            with pytest.raises(BadInput, match=f"{option}: the server is neither vLLM nor SGLang"):
                check_servers(config, sampling)


def test_an_engine_that_says_nothing_supports_all() -> None:
    assert unsupported(Scripted(), BEAMS) is None
