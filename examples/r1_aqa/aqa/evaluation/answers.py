"""Find the prediction in a response: the answer between its tags, and the choice that it means.

R1-AQA takes the text between the first pair of answer tags on one line, or the whole response. Here the tags may have
any shape that models write, and an answer that names one choice becomes that choice (:mod:`aqa.rewards.choices`).
Tested by the table in ``tests/unit/test_eval_answers.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from aqa.rewards.choices import find_choice

_TAG = re.compile(r"<\s{0,3}(/?)\s{0,3}answer\s{0,3}>", re.IGNORECASE)
_TORN_TAG = re.compile(
    r"<\s{0,3}/?\s{0,3}(?:answer|answe|answ|ans|an|a)?\s{0,3}$", re.IGNORECASE
)  # cut off by the token limit
_THINK_END = re.compile(r"</\s{0,3}think\s{0,3}>", re.IGNORECASE)
_THINK_TAG = re.compile(r"</?\s{0,3}think\s{0,3}>", re.IGNORECASE)


class Answer(NamedTuple):
    """What a response says."""

    text: str  # the prediction: a choice's own text, else the answer as the model wrote it, stripped
    tagged: bool  # it was found by answer tags, complete or not
    is_choice: bool  # it names one choice


def extract_answer(response: str, choices: Sequence[str]) -> Answer:
    """Find the prediction in a response without special tokens; its text is empty only if the response is."""
    # The thinking may quote the tags, so it is searched last; an answer there is better than none.
    parts = (_THINK_TAG.sub(" ", _THINK_END.split(response)[-1]), _THINK_TAG.sub(" ", response))
    for text in parts:
        tagged = find_tagged(text)
        if tagged is not None:
            choice = find_choice(tagged, choices)
            return Answer(tagged if choice is None else choice, True, choice is not None)
    for text in parts:
        bare = _TAG.sub(" ", text).strip()
        if bare:
            choice = find_choice(bare, choices)
            return Answer(bare if choice is None else choice, False, choice is not None)
    return Answer("", False, False)


def find_tagged(text: str) -> str | None:
    """The stripped text that answer tags mark, or None if they mark none.

    The first complete pair with text in it counts, as R1-AQA's first pair does; of nested opening tags the innermost
    counts. Without a pair: the text between two opening tags (a closing tag without its slash), after an opening tag
    (the token limit cut the response), or before a closing tag.
    """
    start, end = None, 0
    between, before = None, None
    for tag in _TAG.finditer(text):
        part = text[end if start is None else start : tag.start()].strip()
        if tag[1]:
            if start is not None and part:
                return part
            if start is None and part and before is None:
                before = part
            start = None
        else:
            if start is not None and part and between is None:
                between = part
            start = tag.end()
        end = tag.end()
    rest = None if start is None else _TORN_TAG.sub("", text[start:]).strip()
    return between or rest or before
