"""Parts of a reward beside accuracy and format, for sums such as ``--reward accuracy+format+consistency``.

Each scores a batch, 0 to 1 a response. None of them looks at the reference.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aqa.common.constants import ASSISTANT_HEADER
from aqa.data.prompts import choices_in
from aqa.rewards.choices import find_choice
from aqa.rewards.matching import first_answer
from aqa.rewards.r1_aqa import extract_response

BRIEF_WORDS = 64  # words of a response that cost nothing
LONGEST_WORD = 20  # characters; a longer word counts as several, so that leaving out spaces does not pay


@dataclass(frozen=True)
class Response:
    """A response, and what its prompt says.

    :param text: Without special tokens.
    :param prompt: Rendered, up to the assistant's header.
    :param choices: The prompt's; none where it is worded otherwise.
    :param answer: The choice that is answered, else the answer's text; None without an answer.
    :param think: The thinking process was asked for.
    """

    text: str
    prompt: str
    choices: tuple[str, ...]
    answer: str | None
    think: bool


def read_response(query: str, think: bool, special: Sequence[str]) -> Response:
    """Take a whole decoded sequence apart.

    :param special: See :func:`aqa.rewards.r1_aqa.extract_response`.
    """
    prompt = query.partition(ASSISTANT_HEADER)[0]
    text = extract_response(query, special)
    choices = tuple(choices_in(prompt) or ())
    answer = (first_answer(text) or "").strip()
    return Response(text, prompt, choices, find_choice(answer, choices, sentences=False) or answer or None, think)


def consistency(responses: Sequence[Response], **_: object) -> list[float]:
    """1 where the thinking ends at what is answered: of the choices that it names, the last one is the answer.

    :raises ValueError: if the thinking process was not asked for.
    """
    if not all(response.think for response in responses):
        raise ValueError(
            "--reward consistency compares the answer with the thinking, which the data do not ask for: prepare them "
            "with avqa.py --enable_think"
        )
    return [float(response.answer is not None and concluded(response) == response.answer) for response in responses]


def concluded(response: Response) -> str | None:
    """The choice that is named last between ``<think>`` and ``</think>``; of two that end there, the longer one."""
    thinking, end, _ = response.text.partition("</think>")
    places = []
    for choice in response.choices:
        found = list(re.finditer(rf"(?<!\w){re.escape(choice)}(?!\w)", thinking, re.IGNORECASE)) if end else []
        places += [(found[-1].end(), len(choice), choice)] if found else []
    return max(places)[2] if places else None


def length(responses: Sequence[Response], words: tuple[int, int] = (0, BRIEF_WORDS), **_: object) -> list[float]:
    """1 within the bounds; below it falls linearly to 0 at no word, above it to 0 at twice the upper bound.

    :param words: Lower and upper bound.
    """
    least, most = words
    counts = [count_words(response.text) for response in responses]
    return [min(1.0, n / least if least else 1.0, max(0.0, 2 - n / most)) for n in counts]


def majority(responses: Sequence[Response], group: int = 1, **_: object) -> list[float]:
    """1 where the answer is the most frequent one of the responses to the same prompt; a tie pays nobody.

    :param responses: Those to a prompt next to each other.
    :param group: The most responses to a prompt.

    Source: Zuo et al., TTRL: Test-Time Reinforcement Learning (2025), section 2.
    """
    scores: list[float] = []
    while len(scores) < len(responses):
        start = len(scores)
        members = responses[start : start + group]
        members = members[: next((i for i, r in enumerate(members) if r.prompt != members[0].prompt), group)]
        counts = Counter(response.answer for response in members if response.answer is not None).most_common(2)
        alone = len(counts) == 1 or (len(counts) == 2 and counts[0][1] > counts[1][1])
        scores += [float(alone and response.answer == counts[0][0]) for response in members]
    return scores


def count_words(text: str) -> int:
    """Words, a long one as several."""
    return sum(-(-len(word) // LONGEST_WORD) for word in text.split())


PARTS: dict[str, Callable[..., list[float]]] = {"consistency": consistency, "length": length, "majority": majority}
