"""The responses that the warm start teaches: R1-AQA's form of a row's answer, with its thinking where that is asked."""

from collections.abc import Sequence
from typing import Any

from aqa.common.constants import THINK_LABEL
from aqa.data.columns import THINKING_COLUMN, DataError
from aqa.data.prompts import END_TOKENS, answer_lengths
from aqa.data.rows import show_value
from aqa.rewards.matching import ANSWER_CLOSE, ANSWER_OPEN
from aqa.rewards.r1_aqa import special_tokens

TAGS = ("<think>", "</think>", ANSWER_OPEN, ANSWER_CLOSE)


def doubt_long_answers(references: list[str], tokenizer: Any, longest: int, source: str) -> str | None:
    """A sentence about rows whose right answer, in its tags, is too long for a response; None if there are none.

    :param longest: ``--generate_max_len``.
    :param source: Where the rows are from.
    """
    lengths = answer_lengths(tokenizer, references)
    if long := [row for row, length in enumerate(lengths) if length > longest]:
        return (
            f"{source}: the right answers of {len(long)} of {len(references)} rows, in their tags, take more tokens "
            f"than --generate_max_len {longest}; the first, row {long[0]}: {show_value(references[long[0]])} takes "
            f"{lengths[long[0]]}. Use {max(lengths) + 1} or more. The demo's tiny model spells choices that it was not "
            "made with: make it anew with make_model.py --rows FILE --overwrite."
        )
    return None


def given_responses(
    references: Sequence[str],
    labels: Sequence[str],
    thinking: Sequence[str | None] | None,
    tokenizer: Any,
    longest: int,
) -> list[str]:
    """A response for each row, with the end of turn.

    :param thinking: The rows' column of that name; None where the data have none.
    :param longest: ``--generate_max_len``.
    :raises DataError: naming rows that ask for thinking and have none, hold control tokens or further tags, or are too
        long to be sampled.
    """
    end = END_TOKENS[0] if END_TOKENS[0] in tokenizer.get_vocab() else tokenizer.eos_token
    special = special_tokens(tokenizer)
    responses, problems = [], []
    for i, (reference, label) in enumerate(zip(references, labels, strict=True)):
        text = f"{ANSWER_OPEN}{reference.replace(ANSWER_OPEN, '').replace(ANSWER_CLOSE, '')}{ANSWER_CLOSE}"
        if label == THINK_LABEL:
            thought = ((thinking[i] if thinking is not None else None) or "").strip()
            thought = thought.removeprefix(TAGS[0]).removesuffix(TAGS[1]).strip()  # data sets often have them
            if not thought:
                problems.append(f"row {i}: asks for thinking, and has none in a column {THINKING_COLUMN!r}")
            if held := [tag for tag in TAGS if tag in thought]:
                problems.append(f"row {i}: its thinking holds {held[0]}, which the rewards would read")
            text = f"{TAGS[0]}{thought}{TAGS[1]}{text}"
        if held := [token for token in special if token in text]:
            problems.append(f"row {i}: its response holds the control token {held[0]}")
        responses.append(text + end)
    lengths = [len(ids) for ids in tokenizer(responses, add_special_tokens=False)["input_ids"]]
    problems += [
        f"row {i}: its response has {length} tokens, more than --generate_max_len {longest}"
        for i, length in enumerate(lengths)
        if length > longest
    ]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:20])
        raise DataError(
            f"--sft_steps: {len(problems)} problems in {len(responses)} rows, the first of them:\n{shown}\n"
            "Prepare the rows with avqa.py --thinking_field, or without --enable_think; or raise --generate_max_len."
        )
    return responses
