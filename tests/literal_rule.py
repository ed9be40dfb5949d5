"""R1-AQA's reward rule, written down word by word: slow, single-threaded, and independent of the code under test.

Nothing here is fast, bounded or total; that is the point. It reads like section 6 of the design: find the response, ask
``math_verify``, compare the text, match the form, add. ``test_hostile_text.py`` compares the rewards with it.
"""

import re

END_OF_TURN = ("<|im_end|>", "<|endoftext|>")
SPECIAL = re.compile(r"<\|im_start\|>|<\|AUDIO\|>|<\|audio_[be]os\|>")


def response_of(prompt: str, sequence: str) -> str:
    """What the model said in its turn: all behind the prompt, up to the first end of a turn, without special tokens.

    :param prompt: The prompt exactly as the sequence begins.
    """
    assert sequence.startswith(prompt)
    said = sequence[len(prompt) :]
    for mark in END_OF_TURN:
        said = said.split(mark)[0]
    return SPECIAL.sub("", said)


def said_in_tags(text: str) -> str:
    """The stripped text of the first answer tags, or of everything where there are none."""
    pair = re.search("<answer>(.*?)</answer>", text)
    return text.strip() if pair is None else pair[1].strip()


def equal_as_math(response: str, reference: str) -> bool:
    """What ``math_verify`` says of the response and the wrapped reference; an error is no agreement."""
    from math_verify import parse, verify

    try:
        return bool(verify(parse(response), parse(reference)))
    except Exception:
        return False


def accuracy(response: str, gold: str) -> float:
    """1 if math or text agrees with the reference.

    :param response: What the model said.
    :param gold: The reference, bare.
    """
    reference = f"<answer>{gold}</answer>"
    agrees = equal_as_math(response, reference) or said_in_tags(response) == said_in_tags(reference)
    return 1.0 if agrees else 0.0


def form(response: str, think: bool) -> float:
    """1 if the whole response has the form that was asked for."""
    pattern = r"<think>.*?</think>\s*<answer>.*?</answer>" if think else "<answer>.*?</answer>"
    return 0.0 if re.fullmatch(pattern, response, re.DOTALL) is None else 1.0


def reward(response: str, gold: str, think: bool = False) -> tuple[float, float, float]:
    """(total, accuracy, form) of one response.

    :param response: What the model said.
    :param gold: The reference, bare.
    :param think: Whether thinking was asked for.
    """
    parts = accuracy(response, gold), form(response, think)
    return sum(parts), *parts
