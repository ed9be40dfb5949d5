"""Warm start of the demo's language model: answer in the right format, with any of the options.

It stands in for the instruction tuning that the real Qwen2-Audio has had before GRPO. What it must not do is teach
anything about sounds: questions and sounds are drawn independently of each other, every option counts as equally right,
and the audio tower and the projector are frozen. Sounds are present at all only so that the model, once it hears them,
still writes an answer.

For real recordings (``reading``) it also stands in for the habit of looking at what stands in the sound's place: there
stands the embedding of one of the options, in noise, and the answer is that option. No sound is heard at all, and
nothing is learned of which sounds go with which word: that is left to the projector, and GRPO.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2AudioProcessor

from aqa.common.constants import SAMPLING_RATE
from aqa.data.prompts import render_chat, render_prompt
from aqa.policy.forward import encode_clips, parts_of
from demo.make_data import QUESTIONS, draw_options
from demo.sounds import CLASSES, synthesize

TEXT_ONLY_SHARE = 0.6  # of the steps; the first ones run without sound, which makes them cheap


def render_question(processor: Qwen2AudioProcessor, question: str, options: list[str]) -> str:
    """Word a question about one clip as R1-AQA does, and render it as the model reads it.

    :return: The chat up to the assistant's turn, with one audio placeholder.
    """
    text = render_prompt(question, options, enable_think=False)
    content = [{"type": "audio", "audio_url": "clip.wav"}, {"type": "text", "text": text}]
    return render_chat(processor, [{"role": "user", "content": content}])


def every_option(question: str, options: list[str]) -> list[str]:
    """The options that count as right, where a question's text tells nothing."""
    return options


def draw_warm_start_example(
    rng: np.random.Generator,
    sounds: int,
    rows: Sequence[tuple[str, list[str]]] = (),
    right_of: Callable[[str, list[str]], list[str]] = every_option,
) -> tuple[str, list[str], str, int]:
    """Draw a question, the option to answer with and, independently of both, a sound.

    :param sounds: Number of sounds to draw from.
    :param rows: Questions and their options to draw from; without rows: the demo's own.
    :param right_of: Which of a question's options are right.
    :return: Question, options, the option that the answer names (each right one being equally likely), number of the
        sound.
    """
    if rows:
        question, options = rows[rng.integers(len(rows))]
    else:
        options = draw_options(str(rng.choice(CLASSES)), rng)
        question = str(rng.choice(QUESTIONS))
    return question, options, str(rng.choice(right_of(question, options))), int(rng.integers(sounds))


def draw_warm_start_sounds(count: int, seed: int) -> tuple[list[str], list[np.ndarray]]:
    """Draw the sounds that accompany the warm start's questions.

    :return: Class and waveform of each clip. The warm start uses the waveforms alone; the classes are for its test.
    """
    rng = np.random.default_rng([seed, 1])
    labels = [str(rng.choice(CLASSES)) for _ in range(count)]
    return labels, [synthesize(label, rng) for label in labels]


@torch.no_grad()
def embed_sounds(model: PreTrainedModel, processor: Qwen2AudioProcessor, clips: list[np.ndarray]) -> list[torch.Tensor]:
    """Pass clips through tower and projector.

    :param clips: Waveforms of shape ``(samples,)`` at 16 kHz.
    :return: For each clip its embeddings, of shape ``(audio tokens, hidden size)``.
    """
    embeddings = []
    for start in range(0, len(clips), 16):
        batch = processor.feature_extractor(
            clips[start : start + 16],
            sampling_rate=SAMPLING_RATE,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        frames = batch["attention_mask"].sum(-1)
        packed, tokens = encode_clips(model, batch["input_features"], frames)
        embeddings += packed.split(tokens.tolist())
    return embeddings


def warm_start_loss(
    log_probs: torch.Tensor, targets: torch.Tensor, options: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answer, the word in it being any of the options with equal probability.

    The target of the word is the even mixture of the options: what drawing one at random gives in expectation, without
    the noise of the draw. The best that can be reached is therefore ``log(options)`` for the word and 0 for the rest.

    :param log_probs: Log-probabilities at the answer's tokens, shape ``(examples, tokens, vocabulary)``.
    :param targets: The answer's tokens, one of which is an option, shape ``(examples, tokens)``.
    :param options: The options' tokens, shape ``(examples, options)``; -1 where an example has fewer.
    :return: Loss of the word and loss of the other tokens together, in nats an answer, means over the examples.
    :raises ValueError: if an answer does not hold exactly one of its options.
    """
    is_word = (targets[:, :, None] == options[:, None, :]).any(-1)
    if not (is_word.sum(1) == 1).all():
        raise ValueError("Every answer must hold exactly one token that is one of its options.")
    format_loss = -log_probs.gather(-1, targets[..., None])[..., 0][~is_word].sum() / len(targets)
    there = options >= 0
    words = log_probs[is_word].gather(-1, options.clamp(min=0)).where(there, 0.0)
    word_loss = -(words.sum(1) / there.sum(1)).mean()
    return word_loss, format_loss


def warm_start(
    model: PreTrainedModel,
    processor: Qwen2AudioProcessor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    rows: Sequence[tuple[str, list[str]]] = (),
    reading: bool = False,
    right_of: Callable[[str, list[str]], list[str]] = every_option,
) -> None:
    """Teach the language model to answer in the right format with any of the options, whatever the sound.

    :param model: Changed in place; tower and projector stay as they are.
    :param batch_size: Examples a step.
    :param learning_rate: Peak; the rate rises over a tenth of the steps and falls linearly over the last half.
    :param rows: Questions and options, each option one token; without rows: the demo's own.
    :param reading: Instead of sounds give an option's embedding in noise, and ask for that option.
    :param right_of: Which of a question's options are right.
    """
    rng = np.random.default_rng([seed, 2])
    tokenizer, language_model = processor.tokenizer, parts_of(model).decoder
    words = sorted({option for _, options in rows for option in options}) or CLASSES
    word_ids = {word: tokenizer(word)["input_ids"][0] for word in words}
    sounds = [] if reading else embed_sounds(model, processor, draw_warm_start_sounds(count=64, seed=seed)[1])
    parameters = [*language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.5 * steps), 1.0)
    )
    first = math.ceil(TEXT_ONLY_SHARE * steps)
    for step in range(steps):
        heard = sounds if step >= first else [sound[:0] for sound in sounds]
        source = (rng, rows, right_of)
        embeds, targets, options, ends = make_batch(processor, language_model, heard, word_ids, batch_size, *source)
        # The token at place p is predicted at place p - 1.
        places = ends[:, None] - targets.shape[1] - 1 + torch.arange(targets.shape[1])
        hidden = language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        log_probs = model.lm_head(hidden[torch.arange(batch_size)[:, None], places]).log_softmax(-1)
        word_loss, format_loss = warm_start_loss(log_probs, targets, options)
        ((word_loss + format_loss) / 4).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        begins = bool(sounds) and step == first
        if step % 30 == 0 or step == steps - 1 or begins:
            new = "; sounds come in now, which the loss shows" if begins else ""
            print(
                f"warm start: step {step + 1}/{steps}, loss of the format {format_loss.item():.3f} (at best 0), "
                f"of the choice {word_loss.item():.3f} (at best {(options >= 0).sum(1).log().mean().item():.3f}){new}",
                flush=True,
            )


def noisy(embedding: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A word as a sound might bring it: a little of it, noise that all tokens share, and more that is each one's own.

    So the word is found by looking at all tokens, and a sound that is new is read better than by the clearest token.

    :param embedding: ``(hidden size,)``.
    :return: 8 to 75 tokens, as many as a sound of 0.3 to 3 s has, ``(tokens, hidden size)``, of variance 1.
    """
    size = len(embedding)
    tokens, share = int(rng.integers(8, 76)), 0.6 * rng.random()
    noise = 0.5 * rng.standard_normal((1, size)) + 0.75**0.5 * rng.standard_normal((tokens, size))
    direction = embedding.detach() / embedding.detach().norm() * size**0.5
    return share * direction + (1 - share**2) ** 0.5 * torch.from_numpy(noise).float()


def make_batch(
    processor: Qwen2AudioProcessor,
    language_model: torch.nn.Module,
    sounds: list[torch.Tensor],
    word_ids: dict[str, int],
    batch_size: int,
    rng: np.random.Generator,
    rows: Sequence[tuple[str, list[str]]],
    right_of: Callable[[str, list[str]], list[str]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw examples, and embed them.

    :param sounds: Embeddings of each sound, ``(audio tokens, hidden size)``; no token in the steps without sound.
        Without sounds: the answer's embedding in noise takes their place, and is the one right option.
    :param word_ids: The token of each option.
    :return: Embeddings ``(examples, length, hidden size)``, the answers' tokens ``(examples, tokens)``, the options'
        tokens ``(examples, options)``, -1 where an example has fewer, and where each example ends ``(examples,)``.
    """
    tokenizer = processor.tokenizer
    inputs, targets, options = [], [], []
    for _ in range(batch_size):
        question, names, answer, sound = draw_warm_start_example(rng, len(sounds) or 1, rows, right_of)
        right = right_of(question, names) if sounds else [answer]
        heard = sounds[sound] if sounds else noisy(language_model.embed_tokens.weight[word_ids[answer]], rng)
        before, after = render_question(processor, question, names).split(processor.audio_token)
        target = tokenizer(f"<answer>{answer}</answer>{tokenizer.eos_token}")["input_ids"]
        before, after = tokenizer(before)["input_ids"], tokenizer(after)["input_ids"] + target
        text = language_model.embed_tokens(torch.tensor(before + after))
        inputs.append(torch.cat([text[: len(before)], heard, text[len(before) :]]))
        targets.append(target)
        options.append(torch.tensor([word_ids[name] for name in right]))
    # The model is causal, so padding on the right changes nothing that comes before it.
    embeds = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    options = torch.nn.utils.rnn.pad_sequence(options, batch_first=True, padding_value=-1)
    return embeds, torch.tensor(targets), options, torch.tensor([len(row) for row in inputs])
