"""The columns of all artifacts. Readers check their input against these schemas."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from ..errors import ArtifactMismatch

SCHEMA_VERSION = 1

#: Columns of every row. ``uid``: first 32 hex digits of the image bytes' sha256, null if there are no bytes.
BASE = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("uid", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
]

#: What a row cost, of stages that ask an engine; null if nothing was asked, or if the engine does not say.
USAGE = [
    pa.field("prompt_tokens", pa.int64()),  # of all requests, images included, whether or not computed before
    pa.field("image_tokens", pa.int64()),  # those of them that stand for the image
    pa.field("output_tokens", pa.int64()),  # generated: rejected attempts and thoughts included
]
TOKENS, ASKED = "tokens", "rows"  # of a shard's record: sums of these columns, and of how many rows with any
#: Columns that artifacts of earlier versions lack: readers take them as null.
LATER = frozenset(field.name for field in USAGE)

INGEST = pa.schema(
    [
        *BASE,
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.string()),  # 64-bit perceptual hash, 16 hex
        pa.field("width", pa.int32()),  # upright, after EXIF rotation
        pa.field("height", pa.int32()),
        pa.field("format", pa.string()),  # jpg, png, webp, or a name of manifests/files/image_types.py; by content
        pa.field("text", pa.string()),  # the original caption
        pa.field("url", pa.string()),
        pa.field("source", pa.string()),  # the file, tar member or table row of origin
    ]
)

#: Images of which those in further formats were encoded anew: all other columns are of what is stored.
TRANSCODED = pa.schema(
    [
        *INGEST,
        pa.field("original_sha256", pa.string()),  # of the bytes that came; null where they are stored
        pa.field("original_format", pa.string()),
    ]
)

#: Column of exports that encoded images anew: the uid of each image in their source.
SOURCE_UID = "source_uid"

#: Data about an image that dedup keeps between its two passes.
HASHES = pa.schema(
    [
        *BASE,
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("phash", pa.uint64()),  # of the image
        pa.field("inner", pa.uint64()),  # of the image without its margins: equals the phash of a cropped copy
        pa.field("signature", pa.binary(6144)),  # the image in 64x64 cells; see stages/dedup/perceptual_hash.py
        pa.field("look", pa.uint64()),  # digest of the signature
        pa.field("source", pa.string()),  # of a reference image: its location
    ]
)

DEDUP = pa.schema(
    [
        *BASE,
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.string()),  # 16 hex
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("group", pa.string()),  # uid of the group's keeper; the row's own uid if it has no duplicates
        pa.field("copies", pa.int32()),  # rows with identical bytes, this one included
        pa.field("duplicate_of", pa.string()),  # key of the row that is kept instead
        pa.field("matched", pa.string()),  # the reference image that it, or one of its group, duplicates
    ]
)

#: What `capipe dedup` keeps of a text between its passes over texts.
TEXTS = pa.schema(
    [
        *BASE,
        pa.field("text", pa.string()),  # normalized; null if there is none
        pa.field("digest", pa.binary(16)),  # of that
        pa.field("signature", pa.binary(512)),  # MinHash, 256 numbers of 16 bits; see stages/dedup/texts/bands.py
    ]
)

#: Columns of marks by texts; null in rows that are not ok by their images, and in rows without a text.
TEXT_MARKS = pa.schema(
    [
        pa.field("text_group", pa.string()),  # digest of the text around which the group is
        pa.field("text_similarity", pa.float32()),  # Jaccard index of the row's text and that one
        pa.field("text_copies", pa.int32()),  # rows with an equal text, this one included
        pa.field("text_rows", pa.int32()),  # rows of the group
        pa.field("text_rank", pa.int32()),  # of the row in its group, from 1
    ]
)

#: Embedding column that `capipe dedup --embeddings` compares.
EMBEDDING_COLUMN = "image_embedding"


#: Columns of the safety detector, of embeddings and of scores; null if none ran.
SAFETY = [
    pa.field("unsafe", pa.float32()),  # its highest score over its unsafe classes
    pa.field("unsafe_labels", pa.list_(pa.string())),
]


def embedding(width: int, safety: bool = False) -> pa.Schema:
    """Schema of embeddings, one row per row of the shards; null if an image has none.

    ``width``: vector dimension; ``safety``: with the safety detector's columns.
    """
    return pa.schema([*BASE, pa.field(EMBEDDING_COLUMN, pa.list_(pa.float16(), width)), *(SAFETY if safety else ())])


def embedding_width(actual: pa.Schema, where: str) -> int:
    """Dimension of the embeddings in a file. Raises ArtifactMismatch if it has no valid embedding column."""
    position = actual.get_field_index(EMBEDDING_COLUMN)
    problem = "missing"
    if position >= 0:
        kind = actual.field(position).type
        if pa.types.is_fixed_size_list(kind) and kind.list_size >= 1:
            check(actual, embedding(kind.list_size), where)
            return int(kind.list_size)
        problem = f"{kind}, not a fixed_size_list<float16>"
    raise ArtifactMismatch(f"{where}: column {EMBEDDING_COLUMN!r} is {problem}; --embeddings takes an artifact with it")


#: Columns of `capipe ask` begin with this; the name of the question follows.
ASK_COLUMN = "ask_"


def asked(names: Iterable[str]) -> pa.Schema:
    """Schema of answers to yes-or-no questions of these names: the probability of yes, null if it was not scored."""
    return pa.schema([*BASE, *(pa.field(f"{ASK_COLUMN}{name}", pa.float32()) for name in names), *USAGE])


CAPTION = pa.struct(
    [
        pa.field("name", pa.string()),  # the prompt's name, with `#k` for the k-th of several samples
        pa.field("text", pa.string()),
        pa.field("model", pa.string()),
        pa.field("prompt_id", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("n_tokens", pa.int32()),
        pa.field("attempts", pa.int32()),
        pa.field("status", pa.string()),  # of this caption: a row is ok only if all of its captions are
    ]
)

ANNOTATE = pa.schema([*BASE, pa.field("text", pa.string()), pa.field("captions", pa.list_(CAPTION)), *USAGE])

QUESTION_FIELDS = [
    pa.field("id", pa.string()),  # hash of its content; null if nothing could be parsed
    pa.field("kind", pa.string()),
    pa.field("question", pa.string()),
    pa.field("options", pa.list_(pa.string())),
    pa.field("answer", pa.int32()),  # index into options; null if no option is the answer
    pa.field("status", pa.string()),  # a QuestionStatus
    pa.field("error", pa.string()),
]
QUESTION = pa.struct(QUESTION_FIELDS)

QUESTIONS = pa.schema(
    [
        *BASE,
        pa.field("questions", pa.list_(QUESTION)),
        pa.field("raw", pa.list_(pa.string())),  # the raw output (or import), verbatim, one entry per attempt
        pa.field("writer", pa.string()),  # the model, or the file it was imported from
        pa.field("prompt_id", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("n_tokens", pa.int32()),
        pa.field("attempts", pa.int32()),
        *USAGE,
    ]
)

OPEN_QUESTION = pa.struct(
    [
        pa.field("id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("question", pa.string()),
        pa.field("answers", pa.list_(pa.string())),  # the accepted ones
    ]
)
#: Imported questions, those without options in a column of their own, which readers that know none do not see.
QUESTIONS_WITH_OPEN = pa.schema([*QUESTIONS, pa.field("open_questions", pa.list_(OPEN_QUESTION))])

#: An answer is the index of the chosen option, the number of options for "Cannot tell", null if it was not scored.
ANSWERS = pa.list_(pa.int32())
SCREENED_QUESTION = pa.struct(
    [
        *QUESTION_FIELDS,
        pa.field("with_image", ANSWERS),  # one per presentation
        pa.field("without_image", ANSWERS),
        pa.field("image_accuracy", pa.float32()),  # share of presentations answered correctly, null if unscored
        pa.field("text_accuracy", pa.float32()),
        pa.field("guessed", ANSWERS),  # without the image and without the option to abstain; null if it was not asked
        pa.field("guess_accuracy", pa.float32()),
    ]
)
LATER_FIELDS = frozenset({"guessed", "guess_accuracy"})  # of structs: artifacts of earlier versions have none of them
SCREEN = pa.schema(
    [*BASE, pa.field("questions", pa.list_(SCREENED_QUESTION)), pa.field("screener", pa.string()), *USAGE]
)

GRADED_QUESTION = pa.struct(
    [
        pa.field("id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("options", pa.int32()),  # number of options, without "Cannot tell"
        pa.field("answer", pa.int32()),  # index of the correct option
    ]
)
GRADED_CAPTION = pa.struct(
    [
        pa.field("name", pa.string()),  # an annotate caption's name, or blind, empty, generic, self-oracle, oracle
        pa.field("text", pa.string()),  # null for blind
        pa.field("n_tokens", pa.int32()),
        pa.field("status", pa.string()),
        pa.field(
            "answers",
            pa.list_(
                pa.struct(
                    [
                        pa.field("id", pa.string()),  # the question's
                        pa.field("chosen", ANSWERS),  # one per presentation
                        pa.field("right", pa.int32()),  # presentations answered correctly
                        pa.field("abstained", pa.int32()),
                        pa.field("scored", pa.int32()),  # presentations that could be scored
                    ]
                )
            ),
        ),
    ]
)
GRADE = pa.schema(
    [
        *BASE,
        pa.field("questions", pa.list_(GRADED_QUESTION)),
        pa.field("captions", pa.list_(GRADED_CAPTION)),
        pa.field("scene", pa.string()),  # ground truth as JSON, if the image contains it
        *USAGE,
    ]
)

#: Graded captions with answers in words to open-ended questions.
GRADE_WITH_OPEN = pa.schema(
    [
        *GRADE,
        pa.field("open_questions", pa.list_(OPEN_QUESTION)),
        pa.field(
            "open_answers",
            pa.list_(
                pa.struct(
                    [
                        pa.field("name", pa.string()),  # the caption's
                        pa.field("id", pa.string()),  # the question's
                        pa.field("answer", pa.string()),  # null if the model refused, or the request failed
                    ]
                )
            ),
        ),
    ]
)


#: The captions of an evaluation, checked sentence by sentence.
CHECKED = pa.schema(
    [
        *BASE,
        pa.field(
            "captions",
            pa.list_(
                pa.struct(
                    [
                        pa.field("name", pa.string()),  # an annotate caption's name, or oracle, generic
                        pa.field("text", pa.string()),
                        pa.field("sentences", pa.list_(pa.float32())),  # probability of each; null without an answer
                    ]
                )
            ),
        ),
        *USAGE,
    ]
)


def _scored(prefix: str) -> list[pa.Field]:
    """Columns for one caption of an image. Long captions have scores by sentence beside that of the first window."""
    scores = [
        field
        for scorer in ("clip", "itm")
        for field in (
            pa.field(f"{prefix}_{scorer}_score", pa.float32()),  # of the part of the caption that the model reads
            pa.field(f"{prefix}_{scorer}_score_mean", pa.float32()),  # over its sentences
            pa.field(f"{prefix}_{scorer}_score_min", pa.float32()),
            pa.field(f"{prefix}_{scorer}_lowest", pa.int32()),  # index of the sentence with that score
        )
    ]
    return [
        pa.field(f"{prefix}_caption", pa.string()),
        pa.field(f"{prefix}_length", pa.int32()),  # words
        pa.field(f"{prefix}_sentences", pa.int32()),
        pa.field(f"{prefix}_repetition", pa.float32()),  # share of repeated 4-grams (words)
        pa.field(f"{prefix}_language", pa.string()),  # ISO 639-1
        *scores,
    ]


#: ``re_`` is the new caption, ``org_`` the original one; null if there is none or no such scorer.
SCORE = pa.schema(
    [
        *BASE,
        *_scored("re"),
        *_scored("org"),
        *SAFETY,
    ]
)
#: Truth of captions by sentence, as probabilities by a vision-language model; null without that caption, or an answer.
SENTENCES = pa.schema(
    [
        *BASE,
        *(
            field
            for prefix in ("re", "org")
            for field in (
                pa.field(f"{prefix}_vlm_min", pa.float32()),  # of its least likely sentence
                pa.field(f"{prefix}_vlm_mean", pa.float32()),  # over its sentences
                pa.field(f"{prefix}_vlm_lowest", pa.int32()),  # index of the sentence with the minimum
            )
        ),
        *USAGE,
    ]
)
#: Final shards: a row for every row of the scores. Only ``ok`` rows have a sample in the tar.
SELECT = pa.schema(
    [
        *SCORE,
        pa.field("caption", pa.string()),  # content of the tar's txt: re_caption or org_caption
        pa.field("source_shard", pa.string()),
        pa.field("source_key", pa.string()),
    ]
)


def check(actual: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Raise :class:`ArtifactMismatch` unless ``actual`` has every expected column with the expected type.

    Columns of :data:`LATER` may be missing, and of structs :data:`LATER_FIELDS`.
    """
    for field in expected:
        position = actual.get_field_index(field.name)
        if position < 0 and field.name in LATER:
            continue
        if position < 0:
            raise ArtifactMismatch(f"{where}: column {field.name!r} is missing; it was not written by this stage")
        actual_type = actual.field(position).type
        if actual_type != field.type and not _is_earlier(actual_type, field.type):
            raise ArtifactMismatch(f"{where}: column {field.name!r} is {actual_type}, expected {field.type}")


def _is_earlier(actual: pa.DataType, expected: pa.DataType) -> bool:
    """True if a list of structs lacks nothing but fields that were added later, and has no others."""
    if not (pa.types.is_list(actual) and pa.types.is_list(expected)):
        return False
    have, want = actual.value_type, expected.value_type
    if not (pa.types.is_struct(have) and pa.types.is_struct(want)):
        return False
    return [*have] == [field for field in want if field.name not in LATER_FIELDS]
