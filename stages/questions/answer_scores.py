"""Scores of answers as benchmarks define them: relaxed accuracy, ANLS, CaptionQA's score. Pure functions.

The texts are short answers; :func:`final_answer` takes one out of a model's longer reply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ...models.quiz import fold

TOLERANCE = 0.05  # relative, of numbers (ChartQA, arXiv 2203.10244, section 5.1)
#: By which a number is multiplied before it is compared, as CapRL's script does for charts: shares and per cent.
SCALES = (1.0, 0.01, 100.0)
ANLS_THRESHOLD = 0.5  # normalised distance from which a text is no variant of the answer (arXiv 1905.13648, eq. 1)
ABSTAIN_BONUS = 0.05  # CaptionQA's (arXiv 2511.21025, section 3.4)

_NUMBER = re.compile(r"[-+−]?[$€£]?\s?(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)\s?(?P<percent>%)?")
_BOXED = re.compile(r"\\boxed\s*\{")
_STATED = re.compile(r"(?i:\b(?:the )?(?:final )?answer(?: is|\s*[:：])[\s*:]*)(?P<answer>[^\n]+)")
_AROUND = " \t\r\n*`\"'“”‘’.:"


def number_of(text: str) -> float | None:
    """The number that ``text`` is, and nothing else: "1,200", "$3.5", "-4", "12 %" (0.12). None for other texts."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    value = float(match["digits"].replace(",", ""))
    value = value / 100 if match["percent"] else value
    value = -value if text.strip()[0] in "-−" else value
    return value if math.isfinite(value) else None


def relaxed_accuracy(
    predicted: str, answers: Sequence[str], tolerance: float = TOLERANCE, scales: Sequence[float] = (1.0,)
) -> float:
    """1.0 if ``predicted`` is one of ``answers``, else 0.0: numbers within ``tolerance``, texts after ``fold``.

    Relaxed accuracy of ChartQA (arXiv 2203.10244, after Methani et al. 2020). ``scales``: numbers by which the
    predicted one may be multiplied, :data:`SCALES` as in CapRL. A zero must be met exactly. Years are numbers, too, so
    2014 passes for 2020, as in the published metric.
    """
    return float(any(_meets(predicted, answer, tolerance, scales) for answer in answers))


def _meets(predicted: str, answer: str, tolerance: float, scales: Sequence[float]) -> bool:
    said, right = number_of(predicted), number_of(answer)
    if said is None or right is None:
        return fold(predicted) == fold(answer)
    if right == 0:
        return said == 0
    return any(abs(said * scale - right) <= tolerance * abs(right) for scale in scales)


def anls(predicted: str, answers: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Normalised Levenshtein similarity to the nearest of ``answers``, 0.0 from a distance of ``threshold``.

    Averaged over questions it is ANLS (arXiv 1905.13648, eq. 1; DocVQA and InfographicVQA use it). Case and white space
    are ignored. Quadratic in the length of the answer.
    """
    return max((_similarity(_plain(predicted), _plain(answer), threshold) for answer in answers), default=0.0)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _similarity(one: str, other: str, threshold: float) -> float:
    longest = max(len(one), len(other))
    if longest == 0:
        return 1.0
    if abs(len(one) - len(other)) >= threshold * longest:  # the distance is at least this; long replies cost nothing
        return 0.0
    distance = edit_distance(one, other) / longest
    return 1.0 - distance if distance < threshold else 0.0


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of characters."""
    previous = list(range(len(other) + 1))
    for row, character in enumerate(one, 1):
        current = [row]
        for column, against in enumerate(other, 1):
            substituted = previous[column - 1] + (character != against)
            current.append(min(previous[column] + 1, current[-1] + 1, substituted))
        previous = current
    return previous[-1]


def captionqa_score(right: int, abstained: int, scored: int, options: int) -> float:
    """CaptionQA's score of a question (arXiv 2511.21025, section 3.4), averaged over its ``scored`` presentations.

    A right answer counts 1, a wrong one 0, and to abstain 1/K + 0.05, where K is the number of ``options`` without the
    one to abstain: slightly more than a guess. Raises ValueError without a scored presentation or without options.
    """
    if scored < 1 or options < 1:
        raise ValueError(f"{scored} scored presentations of {options} options: there is nothing to score")
    return (right + abstained * (1 / options + ABSTAIN_BONUS)) / scored


# --- replies ---------------------------------------------------------------------------------------------------------


def final_answer(reply: str) -> str:
    r"""The short answer in a reply: the last ``\boxed{...}``, what follows the last "answer is" or "Answer:", or its
    first line that has any text. Marks and quotes around it are removed; empty if there is none."""
    boxed = [_braced(reply, match.end()) for match in _BOXED.finditer(reply)]
    if boxed and boxed[-1] is not None:
        return boxed[-1].strip(_AROUND)
    stated = list(_STATED.finditer(reply))
    if stated:
        return stated[-1]["answer"].strip(_AROUND)
    return next((line.strip(_AROUND) for line in reply.splitlines() if line.strip(_AROUND)), "")


def _braced(text: str, start: int) -> str | None:
    """Text from ``start`` to the brace that closes the one before it; None if nothing does."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None
