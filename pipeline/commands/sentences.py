"""The step of `capipe filter` that checks captions sentence by sentence, before rows are selected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...errors import BadInput
from ...manifests.artifact import Artifact
from ...manifests.schema import BASE, SENTENCES
from .options.engine_choice import EngineChoice
from .run_job import Exit, run_withdrawing

if TYPE_CHECKING:
    from ...manifests.withdrawal.uid_set import UidSet
    from ...models.yes_no import YesNoConfig

FOLDER = "sentences"  # of the answers, in --out
_IDENTITY = [field.name for field in BASE]
#: Columns of the answers, with Arrow's names of their types.
COLUMNS: Mapping[str, str] = {field.name: str(field.type) for field in SENTENCES if field.name not in _IDENTITY}


def check_sentences(
    choice: EngineChoice,
    config: YesNoConfig,
    shards: str,
    out: str,
    beside: Mapping[str, Artifact],
    drop: UidSet | None,
    retry: bool,
) -> Exit:
    """Check the captions of the shards, and of the annotate artifact ``beside`` them, into the artifact ``out``.

    Loads no model if all are checked. Answers of another model, or about other captions, are refused and not replaced.
    """
    from ...stages.filter.sentences import passed_on
    from ..jobs.rows.engine import plan
    from ..jobs.rows.sentences import SentenceStage, sentence_room

    placement = choice.placement()
    stage = SentenceStage(config, choice.setup(placement, sentence_room(config)))
    job = plan(stage, shards, out, beside=beside, retry=retry, share=choice.run.share)
    return run_withdrawing(job, placement, drop, SENTENCES, passed_on)


def refuse_others(given: str | None, captions: str | None, scores: str) -> None:
    """Raise BadInput unless the captions ``given``, whose sentences are checked, are those that were scored.

    ``captions``: their fingerprint, None if original ones alone were; ``scores``: place of the scores.
    """
    if (None if given is None else Artifact.open(given).fingerprint) == captions:
        return
    if given is None:
        raise BadInput(f"--vlm: name by --captions those that --scores {scores} are of; their sentences are checked")
    raise BadInput(f"--captions {given}: not those that --scores {scores} are of; --vlm is to check the same")
