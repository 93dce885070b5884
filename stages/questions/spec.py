"""`capipe qa` and `capipe eval` as stages."""

from __future__ import annotations

from ...manifests.artifact_spec import ArtifactSpec
from ...manifests.schema import CHECKED, GRADE, QUESTIONS, SCREEN
from ..annotate.spec import CAPTIONS
from ..stage_spec import CHECKPOINT, MARKED, SHARDS, Output, OutputFolder, StageSpec, keys

WRITTEN = ArtifactSpec("questions", "quiz questions written", QUESTIONS, shown="questions")
SCREENED = ArtifactSpec("screen", "questions screened", SCREEN, shown="screened questions")
GRADED = ArtifactSpec(
    "grade",
    "questions answered from captions alone",
    GRADE,
    shown="answers",
    repeated="(open_)?questions|open_questions_text|(caption|status|tokens)_.*",
)

CHECKED_CAPTIONS = ArtifactSpec("checked", "captions checked sentence by sentence", CHECKED, repeated="caption_.*")

QA = StageSpec(
    "qa",
    "capipe.pipeline.commands.qa:qa",
    {"shards": (SHARDS,), "import": (), "model": (CHECKPOINT,), "screen-model": (CHECKPOINT,), "marks": MARKED},
    {"questions": ""},
    (
        Output(WRITTEN, "written"),
        Output(SCREENED, "screened", lambda config, inputs: config.get("screen") != "none"),
    ),
    (
        OutputFolder(
            "written",
            without=keys(
                "screen screen-model screen-engine screen-arg with-image without-image blind guess-margin "
                "presentations reader-mode reader-prompt"
            ),
        ),
        OutputFolder("screened"),
    ),
    skips="marks",
    check="capipe.pipeline.commands.qa:check",
)
EVAL = StageSpec(
    "eval",
    "capipe.pipeline.commands.eval:evaluate",
    {
        "shards": (SHARDS,),
        "questions": ("questions",),
        "captions": ("captions",),
        "model": (CHECKPOINT,),
        "marks": MARKED,
    },
    {"evaluation": ""},
    (
        Output(CAPTIONS, "captions", lambda config, inputs: "captions" not in inputs),
        Output(CHECKED_CAPTIONS, "checked", lambda config, inputs: "vlm" in config),
        Output(GRADED, "graded"),
    ),
    (
        OutputFolder(
            "captions",
            without=keys(
                "questions reader reader-engine reader-arg reader-mode presentations generic words controls clip "
                "cosine language-model captions vlm vlm-engine vlm-mode vlm-arg"
            ),
        ),
        OutputFolder("graded", without=keys("clip cosine language-model vlm vlm-engine vlm-mode vlm-arg")),
        OutputFolder(
            "checked",
            without=keys("reader reader-engine reader-arg reader-mode presentations words clip cosine language-model"),
            given="vlm",
        ),
        OutputFolder(None),
    ),
    skips="marks",
    check="capipe.pipeline.commands.eval:check",
)
