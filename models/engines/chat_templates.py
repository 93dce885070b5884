"""Chat templates of model folders: which one applies, and whether it works. Shared by engines, readers and training.

A vision model uses its processor's template, as in ``AutoProcessor.apply_chat_template``: folders of Qwen2.5-VL have
that one in ``chat_template.json`` and a second, for text alone, in ``tokenizer_config.json``. All other models, and
processors without one, use their tokenizer's. Files are looked up by transformers' rules, but without loading anything,
so that a command can check before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...errors import BadInput
from ..model_json import read_json
from .base import ImageInput, Prompt
from .captioner_registry import kind_of
from .prompting import ChatTemplate, PromptEncoder, messages
from .thinking import CLOSING, GAP, OPENING, Tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names that the rendering sets, or that mean something to transformers' rendering function.
_TAKEN = (
    "messages conversation tools documents chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs raise_exception "
    "strftime_now bos_token eos_token unk_token sep_token pad_token cls_token mask_token"
)
RESERVED = frozenset(_TAKEN.split())
PROBE = "Describe what is to be seen."
TOKENIZER, NAMED = "tokenizer_config.json", "additional_chat_templates"
MEND = "put the original model's template in its place"


def open_encoder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int | None,
    arguments: Mapping[str, Any] | None = None,
) -> PromptEncoder:
    """The prompt encoder of a folder, tested on a probe chat, with an image where the model sees (``image_token_id``).

    ``arguments``: template arguments besides the chat. Raises BadInput for a template that is missing or fails, that
    does not place the image exactly once or leaves the text out, and for an argument that it never reads.
    """
    text, file = find_template(folder, sees=image_token_id is not None)
    arguments = dict(arguments or {})
    _check_arguments(arguments, text, file)
    image = None if image_token_id is None else ImageInput("probe")
    for prompt in [Prompt(PROBE, image), Prompt(PROBE)]:
        _probe(ChatTemplate(text, arguments), file, tokenizer, prompt, image_token_id)
    return PromptEncoder(
        tokenizer, image_token_id, ChatTemplate(text, arguments, find_thinking(text, arguments, tokenizer))
    )


def find_template(folder: Path, sees: bool) -> tuple[str, Path]:
    """The template and its file. Raises BadInput where there is none, or no default one."""
    template = (_of_processor(folder) if sees else None) or _of_files(folder) or _in_json(folder / TOKENIZER)
    if template is None:
        raise BadInput(
            f"{folder}: no chat template, neither in {TOKENIZER} nor in a file of its own; if this is a chat model, "
            "copy the original's chat_template.jinja into the folder"
        )
    written, file = template
    if isinstance(written, list):  # tokenizers with several templates
        written = {str(entry.get("name")): entry.get("template") for entry in written if isinstance(entry, dict)}
    if isinstance(written, dict):
        if "default" not in written:
            raise BadInput(f"{file}: of its chat templates ({', '.join(written)}) none is named default; {MEND}")
        written = written["default"]
    if not isinstance(written, str):
        raise BadInput(f"{file}: its chat_template is {type(written).__name__}, not a text; {MEND}")
    return written, file


def _of_processor(folder: Path) -> tuple[Any, Path] | None:
    """The processor's template, or several by name, and its file; None where it has none."""
    legacy = folder / "chat_template.json"
    if legacy.is_file() and _named(folder):
        raise BadInput(f"{folder}: {legacy.name} and {NAMED} do not go together in transformers; {MEND}")
    of_legacy = _in_json(legacy)
    if legacy.is_file() and of_legacy is None:
        raise BadInput(f"{legacy}: has no chat_template; {MEND}")
    return _in_json(folder / "processor_config.json") or of_legacy or _of_files(folder)


def _of_files(folder: Path) -> tuple[Any, Path] | None:
    """Templates in separate files, by name; the one without a name is the default."""
    default = folder / "chat_template.jinja"
    files = {path.stem: path for path in _named(folder)} | ({"default": default} if default.is_file() else {})
    try:
        written = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{folder}: a chat template cannot be read ({error}); {MEND}") from error
    return (written, files.get("default", folder / NAMED)) if written else None


def _named(folder: Path) -> list[Path]:
    return sorted((folder / NAMED).glob("*.jinja"))


def _in_json(file: Path) -> tuple[Any, Path] | None:
    written = read_json(file).get("chat_template") if file.is_file() else None
    return None if written is None else (written, file)


def _probe(
    template: ChatTemplate, file: Path, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, image_token_id: int | None
) -> None:
    where = f"{file}: the chat template"
    chat = "a chat with an image" if prompt.image is not None else "a chat of text alone"
    try:
        text = template.render(tokenizer, messages(prompt))
    except Exception as error:  # templates may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"{where} fails on {chat} ({reason}); {MEND}") from error
    if text.count(PROBE) != 1:
        raise BadInput(f"{where} puts the text of {chat} {text.count(PROBE)} times instead of once; {MEND}")
    wanted = int(prompt.image is not None)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if image_token_id is not None and (put := ids.count(image_token_id)) != wanted:
        raise BadInput(f"{where} puts {put} image placeholders into {chat} instead of {wanted}; {MEND}")


# --- arguments -------------------------------------------------------------------------------------------------------


def _check_arguments(arguments: Mapping[str, Any], template: str, file: Path) -> None:
    """Raise BadInput for an argument that the template never reads, or that users may not set."""
    known = variables(template, file) - RESERVED
    for name, value in arguments.items():
        if name not in known:
            offered = f"it reads {', '.join(sorted(known))}" if known else "it reads none"
            raise BadInput(f"{name}: no argument of the chat template in {file}; {offered}")
        if isinstance(value, str) and value.lower() in ("true", "false"):  # a text, which templates take as true
            raise BadInput(f"{name}: {value!r} is a text to the chat template in {file}; write {value.lower()}, bare")


def variables(template: str, file: Path) -> set[str]:
    """The names that a template reads and does not set itself. Raises BadInput where it is not valid Jinja."""
    try:
        return find_undeclared_variables(_environment().parse(template))
    except TemplateError as error:
        raise BadInput(f"{file}: the chat template is not Jinja ({error}); {MEND}") from error


@cache
def _environment() -> Environment:
    """Jinja set up as in transformers, for inspecting templates; transformers itself renders them."""
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )


class _Generation(Extension):
    """transformers' own ``{% generation %}`` tag, which marks the assistant's text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it on the instance)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# --- thinking --------------------------------------------------------------------------------------------------------


def find_thinking(template: str, arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tags | None:
    """The tags of the model's thoughts; None for a model that the template, with these arguments, keeps from thinking.

    A model that may think has the tags as tokens and a template that contains them; the template's end may have opened
    a thought already (DeepSeek-R1), or leaves that to the model (Qwen3).
    """
    tokens = [tokenizer.encode(tag, add_special_tokens=False) for tag in (OPENING, CLOSING)]
    if CLOSING not in template or any(len(ids) != 1 for ids in tokens):
        return None
    end = _end(template, arguments, tokenizer)
    if end.rfind(CLOSING) > end.rfind(OPENING):
        return None  # the thought is closed: the answer comes next
    return Tags(begun=OPENING in end, gap=_gap(template, arguments, tokenizer))


def _gap(template: str, arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text between a thought and the answer, found where an argument makes the template close the thought itself."""
    for name in sorted(find_undeclared_variables(_environment().parse(template)) - RESERVED):
        try:
            end = _end(template, {**arguments, name: False}, tokenizer)
        except Exception:  # not a switch
            continue
        if OPENING in end and CLOSING in end:
            return end.rpartition(CLOSING)[2]
    return GAP


def _end(template: str, arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's text after the user's message."""
    text = ChatTemplate(template, arguments).render(tokenizer, messages(Prompt(PROBE)))
    return text.rpartition(PROBE)[2]


def check_template(folder: Path, sees: bool, arguments: Mapping[str, Any]) -> None:
    """Raise BadInput for a missing or invalid template, or arguments that it never reads. Cheap: nothing is loaded."""
    if (kind := kind_of(folder)) is not None:
        refuse_arguments(arguments, kind.architecture)
        return
    template, file = find_template(folder, sees)
    _check_arguments(arguments, template, file)


def refuse_arguments(arguments: Mapping[str, Any], model: str) -> None:
    """Raise BadInput for template arguments given to a captioner that is not a chat model."""
    if arguments:
        raise BadInput(f"{next(iter(arguments))}: {model} reads no chat template; leave template arguments out")
