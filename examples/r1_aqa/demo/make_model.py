"""Make the demo's model: a Qwen2-Audio of under a million parameters that knows the answer's format and nothing of sounds.

The architecture, file layout, checkpoint names, special tokens and chat template behaviour are Qwen2-Audio's, so that
transformers and vLLM load it as they load the real one. Three things stand in for pretraining:

- a small byte-level tokenizer, trained on the demo's own sentences, in which every class is one token;
- an audio tower that starts as a bank of triangular filters, so that its output follows the spectrum of the sound;
- a short warm start of the language model on ``<answer>OPTION</answer>``, OPTION being drawn at random from the options.

No label of any sound enters: the warm start draws sounds and questions independently of each other, and tower and
projector are frozen while it runs. Listening is left for GRPO to learn.

    python examples/r1_aqa/demo/make_model.py --out_dir models/demo --seed 0
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo.make_data import QUESTIONS, draw_options  # noqa: E402  (the folder above must be on the path first)
from demo.sounds import CLASSES, SAMPLING_RATE, synthesize  # noqa: E402

PAD, START, END, AUDIO, AUDIO_BOS, AUDIO_EOS = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
)
import os
TEXTSHARE=float(os.environ.get('TS','0.6'))
CLIP_SECONDS = 30  # what Qwen2-Audio's tower always works on; vLLM insists on its 3,000 frames
N_MELS = 128
TOWER_WIDTH = 64
PROMPT = (
    "{question} Please choose the answer from the following options: {options}. "
    "Output the final answer in <answer> </answer>."
)
# A part is an audio if it has one of the keys, whatever the value: that is how Qwen2-Audio's template decides.
CHAT_TEMPLATE = """\
{%- set clips = namespace(seen=0) -%}
{%- if messages and messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for turn in messages -%}
{{- '<|im_start|>' ~ turn.role ~ '\\n' -}}
{%- if turn.content is string -%}
{{- turn.content -}}
{%- else -%}
{%- for part in turn.content -%}
{%- if 'audio' in part or 'audio_url' in part or part.type == 'audio' -%}
{%- set clips.seen = clips.seen + 1 -%}
{{- 'Audio ' ~ clips.seen ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\\n' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def render_prompt(processor: Qwen2AudioProcessor, question: str, options: list[str]) -> str:
    """
    Write R1-AQA's prompt about one clip as the model reads it.

    :param processor: The demo's processor.
    :param question: The question.
    :param options: The options to choose from.
    :return: The chat up to the assistant's turn, with one audio placeholder.
    """
    text = PROMPT.format(question=question.replace("video", "audio"), options=options)
    content = [{"type": "audio", "audio_url": "clip.wav"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)


def draw_warm_start_example(rng: np.random.Generator) -> tuple[str, list[str], str]:
    """
    Draw a question and the option to answer with. No sound takes part, so nothing about sounds can be learnt.

    :param rng: Source of randomness.
    :return: Question, options, and the option that the answer names, each option being equally likely.
    """
    options = draw_options(str(rng.choice(CLASSES)), rng)
    return str(rng.choice(QUESTIONS)), options, str(rng.choice(options))


def build_processor() -> Qwen2AudioProcessor:
    """
    Build tokenizer, feature extractor and chat template.

    :return: The processor. Its vocabulary holds every byte, so it can read any text, though not in few tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)  # the vocabulary must not depend on the model's seed
    corpus = ["system\nYou are a helpful assistant.\nuser\nAudio 1: \nassistant\n"] * 100
    for _ in range(400):
        question, options, answer = draw_warm_start_example(rng)
        corpus.append(PROMPT.format(question=question, options=options) + f"\n<answer>{answer}</answer>")
        corpus.append(question.replace("video", "audio"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=512, initial_alphabet=alphabet, special_tokens=list(SPECIAL_TOKENS), show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, AUDIO, AUDIO_BOS, AUDIO_EOS],
        model_max_length=2048,
        padding_side="left",
    )
    extractor = WhisperFeatureExtractor(feature_size=N_MELS, sampling_rate=SAMPLING_RATE, chunk_length=CLIP_SECONDS)
    return Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=fast, chat_template=CHAT_TEMPLATE)


def build_model(processor: Qwen2AudioProcessor, seed: int) -> Qwen2AudioForConditionalGeneration:
    """
    Build the model: random language model, audio tower that starts as a filter bank.

    :param processor: The processor whose vocabulary the model shares.
    :param seed: Seed of the random weights.
    :return: The model, float32.
    """
    tokenizer = processor.tokenizer
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": N_MELS,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 2 * TOWER_WIDTH,
            "d_model": TOWER_WIDTH,
            "max_source_positions": CLIP_SECONDS * 50,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "initializer_range": 0.05,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids(AUDIO),
    )
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config)
    initialise_tower(model)
    with torch.no_grad():  # copying an option is easier to learn when a token is read and written alike
        model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight)
        for layer in model.model.language_model.layers:
            torch.nn.init.orthogonal_(layer.self_attn.v_proj.weight)
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T*float(__import__("os").environ.get("OV","1.0")))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def initialise_tower(model: Qwen2AudioForConditionalGeneration) -> None:
    """
    Start the tower as a bank of triangular filters over the mel bins, which no data has shaped.

    With default weights all clips look alike at the tower's end. As a filter bank, channel ``i`` of the tower holds
    the energy around mel bin ``2 i``, smoothed over some 60 ms, and the last layer norm takes the level out.

    :param model: The model, changed in place.
    """
    tower, projector = model.model.audio_tower, model.model.multi_modal_projector
    distance = torch.arange(N_MELS)[None, :] - (torch.arange(TOWER_WIDTH)[:, None] * N_MELS / TOWER_WIDTH + 0.5)
    triangles = (1 - distance.abs() / 4).clamp(min=0)
    triangles = triangles / triangles.sum(1, keepdim=True)
    with torch.no_grad():
        # Log-mel values lie between about -0.5 and 1.8: the bias keeps them where GELU is nearly linear.
        tower.conv1.weight.copy_(2 * triangles[:, :, None] * torch.tensor([0.25, 0.5, 0.25]))
        tower.conv1.bias.fill_(1.0)
        tower.conv2.weight.copy_(torch.eye(TOWER_WIDTH)[:, :, None] * torch.tensor([0.25, 0.5, 0.25]))
        tower.conv2.bias.zero_()
        projector.linear.weight.normal_(std=TOWER_WIDTH**-0.5)
        projector.linear.bias.zero_()


@torch.no_grad()
def embed_sounds(model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, count: int, seed: int):
    """
    Pass random sounds through tower and projector.

    :param model: The model.
    :param processor: Its processor.
    :param count: Number of clips.
    :param seed: Seed of the clips.
    :return: For each clip its embeddings, of shape ``(audio tokens, hidden size)``.
    """
    rng = np.random.default_rng([seed, 1])
    clips = [synthesize(str(rng.choice(CLASSES)), rng) for _ in range(count)]
    embeddings = []
    for start in range(0, count, 16):
        batch = processor.feature_extractor(
            clips[start : start + 16],
            sampling_rate=SAMPLING_RATE,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        frames = batch["attention_mask"].sum(-1)
        inner, tokens = model.model.audio_tower._get_feat_extract_output_lengths(frames)
        hidden = torch.arange(CLIP_SECONDS * 50)[None, None, None] < inner[:, None, None, None]
        mask = torch.where(hidden, 0.0, float("-inf")).expand(-1, 1, CLIP_SECONDS * 50, -1)
        output = model.model.audio_tower(batch["input_features"], attention_mask=mask).last_hidden_state
        output = model.model.multi_modal_projector(output)
        embeddings += [row[:length].clone() for row, length in zip(output, tokens.tolist())]
    return embeddings


def warm_start(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """
    Teach the language model to answer in the right format with any of the options, whatever the sound.

    :param model: The model; tower and projector stay as they are.
    :param processor: Its processor.
    :param steps: Optimizer steps.
    :param batch_size: Examples a step.
    :param learning_rate: Peak learning rate; it rises over a tenth of the steps and falls linearly to zero.
    :param seed: Seed of sounds and answers.
    :return: The last loss, in nats a token of the answer. Choosing among four at random costs ``log(4)`` an answer.
    """
    if steps < 1:
        return float("nan")
    rng = np.random.default_rng([seed, 2])
    tokenizer, language_model = processor.tokenizer, model.model.language_model
    class_ids = {name: tokenizer(name)["input_ids"][0] for name in CLASSES}
    sounds = embed_sounds(model, processor, count=128, seed=seed)
    parameters = [*language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.5 * steps), 1.0)
    )
    for step in range(steps):
        rows, targets, choices = [], [], []
        for _ in range(batch_size):
            question, options, answer = draw_warm_start_example(rng)
            before, after = render_prompt(processor, question, options).split(AUDIO)
            target = tokenizer(f"<answer>{answer}</answer>{END}")["input_ids"]
            before, after = tokenizer(before)["input_ids"], tokenizer(after)["input_ids"] + target
            sound = sounds[rng.integers(len(sounds))] if step >= TEXTSHARE * steps else sounds[0][:0]
            text = language_model.embed_tokens(torch.tensor(before + after))
            rows.append(torch.cat([text[: len(before)], sound, text[len(before) :]]))
            targets.append(target)
            choices.append([class_ids[option] for option in options])
        # Padding on the right of a causal model: what comes before never sees it.
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        targets, ends = torch.tensor(targets), torch.tensor([len(row) for row in rows])
        places = ends[:, None] - targets.shape[1] - 1 + torch.arange(targets.shape[1])
        hidden = language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        log_probs = model.lm_head(hidden[torch.arange(batch_size)[:, None], places]).log_softmax(-1)
        loss, option_loss = warm_start_loss(log_probs, targets, torch.tensor(choices))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"warm start: step {step + 1}/{steps} loss {loss.item():.4f} {option_loss.item():.3f}", flush=True)
    return loss.item()


def warm_start_loss(log_probs, targets, choices):
    is_word = torch.isin(targets, choices)
    nll = -log_probs.gather(-1, targets[..., None])[..., 0]
    option_loss = -log_probs[is_word].gather(-1, choices).mean()
    return (nll[~is_word].sum() / len(targets) + option_loss) / 4, option_loss
