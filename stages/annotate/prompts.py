"""Named prompts. A caption's ``prompt_id`` is the name and a hash of the prompt's text, without values of a row.

A prompt may have fields of the row (:mod:`.templates`). It then has a fallback: a prompt without fields and of the same
name, which rows that lack a field are asked instead.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadInput
from .templates import caption_names, fields

#: Image before text everywhere, so that several prompts about one image share its prefix in the engine's cache.
NAMED = {
    "plain": "Describe the image.",
    "short": "Describe the image in one short sentence.",
    "dense": "Describe the image in detail.",
    "caprl": "Please describe this image in detail.",  # the prompt CapRL trains and evaluates with
    "none": "",  # the image alone, for captioners that are not chat models
}
FALLBACK = "--fallback-prompt"


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt and the name of its captions."""

    name: str
    text: str

    @property
    def prompt_id(self) -> str:
        return f"{self.name}@{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"


def parse_prompt(option: str, flag: str = "--prompt") -> NamedPrompt:
    """Parse a ``--prompt`` option: a known name, ``name=text``, or ``name=@file``. Raises BadInput."""
    name, equals, text = option.partition("=")
    if not name or not name.replace("-", "_").isidentifier():
        raise BadInput(f"{flag} {option!r}: a name is letters, digits, - and _; write name=text, e.g. ocr='Read it.'")
    if not equals:
        if name not in NAMED:
            raise BadInput(f"{flag} {name!r}: no such prompt; there are {', '.join(NAMED)}, or write name=text")
        return NamedPrompt(name, NAMED[name])
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{flag} {option!r}: the file cannot be read ({error}); give a UTF-8 text file") from None
    if not text.strip():
        raise BadInput(f"{flag} {option!r}: the text is empty; write name=text")
    return NamedPrompt(name, text)


def parse_fallback(option: str) -> NamedPrompt:
    """Parse a ``--fallback-prompt`` option: ``name=text``, or ``name=@file``. Raises BadInput."""
    if "=" not in option:
        raise BadInput(f"{FALLBACK} {option!r}: write name=text, with the name of the prompt that it stands in for")
    prompt = parse_prompt(option, FALLBACK)
    if (field := next(fields(prompt.text), None)) is not None:
        raise BadInput(
            f"{FALLBACK} {prompt.name}: has {field}; a row that lacks one field may lack it, too: leave it out"
        )
    return prompt


def with_fallbacks(
    prompts: Sequence[NamedPrompt], given: Sequence[NamedPrompt], default: str = NAMED["plain"]
) -> tuple[NamedPrompt, ...]:
    """The fallbacks of all prompts that have one, in the prompts' order.

    Without a ``given`` one it is ``default`` if the prompt has ``{text}`` or ``{meta.KEY}``; prompts of which captions
    are the only fields have none. Raises BadInput for one that is given twice, or for no prompt with fields.
    """
    templates = [prompt.name for prompt in prompts if any(True for _ in fields(prompt.text))]
    by_name: dict[str, NamedPrompt] = {}
    for prompt in given:
        if prompt.name not in templates:
            known = f"those with fields are {', '.join(templates)}" if templates else "no prompt has fields of the row"
            raise BadInput(f"{FALLBACK} {prompt.name}: is never asked; {known}")
        if prompt.name in by_name:
            raise BadInput(f"{FALLBACK} {prompt.name}: is given twice; leave one of them out")
        by_name[prompt.name] = prompt
    for prompt in prompts:
        if any(field.kind != "captions" for field in fields(prompt.text)):
            by_name.setdefault(prompt.name, NamedPrompt(prompt.name, default))
    return tuple(by_name[name] for name in dict.fromkeys(prompt.name for prompt in prompts) if name in by_name)


def asking_order(prompts: Sequence[NamedPrompt], beside: Collection[str] | None = ()) -> list[int]:
    """Indices of the prompts, each after those whose captions it takes, otherwise as they are given.

    ``beside``: names of captions that exist already, None if they are not known. Raises BadInput if a prompt takes
    captions of no prompt, of one of two prompts with the same name, or of a prompt that in turn needs its own.
    """
    counts = Counter(prompt.name for prompt in prompts)
    wanted = [caption_names(prompt.text) for prompt in prompts]
    if beside is None:
        beside = {name for names in wanted for name in names if not counts[name]}
    for prompt, names in zip(prompts, wanted, strict=True):
        for name in names:
            if (reason := _unnamed(name, counts, beside)) is not None:
                raise BadInput(f"--prompt {prompt.name}: {{captions.{name}}}: {reason}")
    order: list[int] = []
    done = {name for name in beside if not counts[name]}
    while len(order) < len(prompts):
        left = [index for index in range(len(prompts)) if index not in order]
        ready = next((index for index in left if done.issuperset(wanted[index])), None)
        if ready is None:
            raise BadInput(_circle(prompts, wanted, left[0], done))
        order.append(ready)
        done.add(prompts[ready].name)
    return order


def _unnamed(name: str, counts: Counter[str], beside: Collection[str]) -> str | None:
    """Why captions of this name are not those of one prompt; None if they are."""
    if counts[name] == 1 or (not counts[name] and name in beside):
        return None
    if counts[name]:
        return "several prompts have this name; rename all but one"
    known = ", ".join([*counts, *beside])
    return f"no other prompt of this command has this name; there are {known}"


def _circle(prompts: Sequence[NamedPrompt], wanted: Sequence[Sequence[str]], start: int, done: Collection[str]) -> str:
    """The message for prompts that need each other's captions, with their names in the order of need."""
    by_name = {prompt.name: names for prompt, names in zip(prompts, wanted, strict=True)}
    path, names = [prompts[start].name], wanted[start]
    while path[-1] not in path[:-1]:
        path.append(next(name for name in names if name not in done))
        names = by_name[path[-1]]
    circle = path[path.index(path[-1]) :]
    return f"--prompt {circle[0]}: needs its own caption ({' -> '.join(circle)}); take one {{captions.…}} out"
