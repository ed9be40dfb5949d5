"""The prompt: R1-AQA's wording of a question, and the chat that the model reads. Change the wording here."""

import ast
import contextlib
from functools import lru_cache
from typing import Any

from aqa.common.constants import ASSISTANT_HEADER, AUDIO_TOKEN

# R1-AQA's own sentences: results can be compared with theirs only while these stay as they are.
OPTIONS_SENTENCE = "Please choose the answer from the following options: {choices}."
ANSWER_SENTENCE = "Output the final answer in <answer> </answer>."
THINK_SENTENCE = "Output the thinking process in <think> </think> and final answer in <answer> </answer>."
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def render_prompt(question: str, choices: list, enable_think: bool) -> str:
    """Word a question as R1-AQA does: it is asked about the audio, and the options are printed as a Python list.

    :param question: AVQA's question, which speaks of a video.
    :param choices: As they stand in the JSON: numbers unquoted, null as None.
    :param enable_think: Ask for ``<think>`` before the answer.
    """
    options = OPTIONS_SENTENCE.format(choices=choices)
    return f"{question.replace('video', 'audio')} {options} {THINK_SENTENCE if enable_think else ANSWER_SENTENCE}"


@lru_cache(maxsize=1024)
def choices_in(prompt: str) -> list[str] | None:
    """The choices that :func:`render_prompt` has printed, as text; None where the prompt is worded otherwise."""
    head, tail = OPTIONS_SENTENCE.split("{choices}")
    start, end = prompt.find(head) + len(head), prompt.rfind(f"{tail} Output the ")
    try:
        choices = ast.literal_eval(prompt[start:end]) if len(head) <= start < end else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return list(map(str, choices)) if isinstance(choices, list) and choices else None


def prompt_problem(prompt: str, rendered: bool = False, clips: int = 1, audio_token: str = AUDIO_TOKEN) -> str | None:
    """Why nothing can be trained on a prompt: its text holds what the model reads as a control token.

    :param rendered: The prompt is a rendered chat, and not the text of a user's turn.
    :param clips: How many it has.
    """
    if not rendered:
        prompt = f"{audio_token * clips}{prompt}{ASSISTANT_HEADER}"
    if (placeholders := prompt.count(audio_token)) != clips:
        return f"{placeholders} audio placeholders for {clips} clips ({audio_token})"
    if prompt.find(ASSISTANT_HEADER) + len(ASSISTANT_HEADER) != len(prompt):
        return (
            f"the rewards find the response behind the first {ASSISTANT_HEADER!r}, which must be the prompt's end (a "
            "question cannot hold turn markers)"
        )
    return None


def prompt_lengths(tokenizer: Any, prompts: list[str]) -> list[int]:
    """Tokens of each rendered prompt, a clip's placeholder counted as one."""
    return [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]


def answer_lengths(tokenizer: Any, answers: list[str]) -> list[int]:
    """Tokens of each answer, bare or in its tags, in its tags."""
    bare = (answer.replace("<answer>", "").replace("</answer>", "") for answer in answers)
    return prompt_lengths(tokenizer, [f"<answer>{text}</answer>" for text in bare])


def render_chat(processor: Any, messages: list[dict[str, Any]]) -> str:
    """Apply the chat template to messages that may come from parquet.

    Parquet gives all parts of a message the same keys, so the text part comes back with ``audio_url: None``.
    Qwen2-Audio's template takes every part that *has* the key for an audio, and would lose the question. Keys without
    a value are therefore dropped first.

    :param processor: Qwen2-Audio processor.
    :return: The text up to where the response begins.
    """
    clean = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{k: v for k, v in part.items() if v is not None} for part in content]
        clean.append({"role": message["role"], "content": content})
    return processor.apply_chat_template(clean, tokenize=False, add_generation_prompt=True)


def end_tokens(tokenizer: Any, model: str) -> list[int]:
    """Ids of the tokens that end a response, the same in training and evaluation and for every engine: the chat's end
    of turn, and the end tokens of tokenizer and checkpoint.

    :param model: Folder or hub name; its ``generation_config.json`` may name several.
    """
    from transformers import GenerationConfig

    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    ids.add(tokenizer.eos_token_id)
    with contextlib.suppress(OSError):  # a checkpoint need not have a generation_config.json
        named = GenerationConfig.from_pretrained(model).eos_token_id
        ids.update(named if isinstance(named, list) else [named])
    return sorted(ids - {None})
