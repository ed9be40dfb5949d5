"""The demo's model and processor, and its files; ``make_model.py`` is the command, and describes them."""

import argparse
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

# transformers imports DeepSpeed, which without this variable warns that there is no GPU
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.utils.logging import disable_progress_bar

from aqa.audio.decode import AudioError, load_audio
from aqa.common.constants import SAMPLING_RATE
from aqa.common.model_folder import complete
from aqa.data.prompts import ANSWER_SENTENCE, OPTIONS_SENTENCE
from aqa.families import BY_TYPE, write_checkpoint
from aqa.policy.forward import parts_of
from demo import written
from demo.warm_start import draw_warm_start_example, embed_sounds, warm_start
from demo.whisper import SIZES, read_wheel

PAD, START, END, *BRACKETS = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|audio_eos|>"
CLIP_SECONDS = 30  # what Qwen2-Audio's tower always works on; vLLM insists on its 3,000 frames
N_MELS = 128
TOWER_WIDTH = 64
CENTRED_ON = 256  # recordings, evenly from all of them
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
{{- CLIP -}}
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


def build_processor(
    family: str = "qwen2_audio", rows: Sequence[tuple[str, list[str]]] = (), n_mels: int = N_MELS
) -> Qwen2AudioProcessor:
    """Build tokenizer, feature extractor and chat template.

    :param family: Its ``model_type``.
    :param rows: Questions and options; each option becomes one token. Without rows: the demo's own.
    :param n_mels: Mel bins that the tower takes.
    :return: The processor. Its vocabulary holds every byte, so it can read any text, though not in few tokens.
    :raises SystemExit: if an option cannot be written in one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)  # the vocabulary must not depend on the model's seed
    corpus = ["system\nYou are a helpful assistant.\nuser\nAudio 1: \nassistant\n"] * 100
    for _ in range(400):
        question, options, answer, _ = draw_warm_start_example(rng, 1, rows)
        text = f"{question} {OPTIONS_SENTENCE.format(choices=options)} {ANSWER_SENTENCE}"
        corpus.append(f"{text}\n<answer>{answer}</answer>")
        corpus.append(question.replace("video", "audio"))
    kind = BY_TYPE[family]
    special = [PAD, START, END, kind.audio_token, *BRACKETS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    more = {}
    if family == "qwen2_5_omni":
        from demo import omni

        more = omni.TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, *special[3:]],
        model_max_length=2048,
        padding_side="left",
        **more,
    )
    # added as whole words: the warm start asks for one token an option, whatever the option is
    words = sorted({word for _, options in rows for word in options})
    fast.add_tokens([AddedToken(word, single_word=True) for word in words])
    for word in words:  # added ones are not spelled in bytes, which the decoder takes some letters for
        if len(fast(word)["input_ids"]) != 1 or fast.decode(fast(word)["input_ids"]) != word:
            raise SystemExit(f"--rows: this tiny model cannot write the option {word!r}; spell it with ASCII letters")
    template = CHAT_TEMPLATE.replace("CLIP", kind.clip_text)
    if family == "qwen2_5_omni":
        return omni.build_processor(fast, template, n_mels, SAMPLING_RATE)
    extractor = WhisperFeatureExtractor(feature_size=n_mels, sampling_rate=SAMPLING_RATE, chunk_length=CLIP_SECONDS)
    return kind.processor_class()(feature_extractor=extractor, tokenizer=fast, chat_template=template)


def build_model(
    processor: Qwen2AudioProcessor, seed: int, family: str = "qwen2_audio", whisper: Path | None = None
) -> PreTrainedModel:
    """Build the model: random language model, audio tower that starts as a filter bank or is Whisper's encoder.

    :param processor: The model gets its vocabulary.
    :param whisper: The package that holds Whisper's encoder.
    :return: The model, float32.
    """
    tokenizer, kind = processor.tokenizer, BY_TYPE[family]
    audio = {
        "model_type": kind.tower_type,
        "num_mel_bins": N_MELS,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * TOWER_WIDTH,
        "d_model": TOWER_WIDTH,
        "max_source_positions": CLIP_SECONDS * 50,
    } | (SIZES if whisper else {})
    text = {
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
    }
    torch.manual_seed(seed)
    if family == "qwen2_5_omni":
        from demo import omni

        config = omni.build_config(tokenizer, audio, text)
    else:
        audio_token = tokenizer.convert_tokens_to_ids(kind.audio_token)
        config = CONFIG_MAPPING[family](audio_config=audio, text_config=text, audio_token_id=audio_token)
    model = kind.model_class()(config)
    if whisper:
        weights = {name: torch.from_numpy(value) for name, value in read_wheel(whisper).items()}
        parts_of(model).tower.load_state_dict(weights)
        initialise_projector(model)
    else:
        initialise_tower(model)
    initialise_copying(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def initialise_copying(model: PreTrainedModel) -> None:
    """Let the language model lean towards words of the prompt from the start, as pretrained ones do.

    A token is written as it is read (output matrix = input embeddings), and what attention fetches arrives unturned
    (output projection = inverse of the value projection).
    """
    language_model = parts_of(model).decoder
    model.lm_head.weight.copy_(language_model.embed_tokens.weight)
    for layer in language_model.layers:
        torch.nn.init.orthogonal_(layer.self_attn.v_proj.weight)
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)


@torch.no_grad()
def initialise_tower(model: PreTrainedModel) -> None:
    """Start the tower as a bank of triangular filters over the mel bins, which no data has shaped.

    With default weights all clips look alike at the tower's end. As a filter bank, channel ``i`` of the tower holds
    the energy around mel bin ``2 i``, smoothed over some 60 ms, and the last layer norm takes the level out.
    """
    tower = parts_of(model).tower
    distance = torch.arange(N_MELS)[None, :] - (torch.arange(TOWER_WIDTH)[:, None] * N_MELS / TOWER_WIDTH + 0.5)
    triangles = (1 - distance.abs() / 4).clamp(min=0)
    triangles = triangles / triangles.sum(1, keepdim=True)
    # Log-mel values lie between about -0.5 and 1.8: the bias keeps them where GELU is nearly linear.
    tower.conv1.weight.copy_(2 * triangles[:, :, None] * torch.tensor([0.25, 0.5, 0.25]))
    tower.conv1.bias.fill_(1.0)
    tower.conv2.weight.copy_(torch.eye(TOWER_WIDTH)[:, :, None] * torch.tensor([0.25, 0.5, 0.25]))
    tower.conv2.bias.zero_()
    initialise_projector(model)


@torch.no_grad()
def initialise_projector(model: PreTrainedModel) -> None:
    """Let the projector's outputs have about the size of its inputs."""
    for linear in projections(model):
        linear.weight.normal_(std=linear.in_features**-0.5)
        linear.bias.zero_()


def projections(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """The linear layers between tower and decoder, in order; Qwen2.5-Omni's tower holds its only one."""
    tower, projector, _, _ = parts_of(model)
    return [layer for layer in projector.modules() if isinstance(layer, torch.nn.Linear)] or [tower.proj]


@torch.no_grad()
def centre_projector(model: PreTrainedModel, processor: Qwen2AudioProcessor, folder: Path) -> None:
    """Let the mean of the sounds' embeddings be 0: what all sounds have in common would drown what tells them apart.

    :param folder: Recordings of the kind that will be trained on; other files may be among them.
    :raises SystemExit: if there is none.
    """
    clips = []
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files[:: -(-len(files) // CENTRED_ON) or 1]:
        with contextlib.suppress(AudioError):
            clips.append(load_audio(path))
    if not clips:
        raise SystemExit(f"--sounds {folder}: no recording that can be read")
    projections(model)[-1].bias -= torch.cat(embed_sounds(model, processor, clips)).mean(0)


def save(model: PreTrainedModel, processor: Qwen2AudioProcessor, out_dir: Path) -> None:
    """Write model and processor as a checkpoint of their family; see :func:`demo.written`."""
    with written(out_dir, "model.safetensors") as folder:
        write_checkpoint(model, folder)
        if model.config.model_type == "qwen2_5_omni_thinker":
            from demo import omni

            omni.write_processor(processor, folder)
        else:
            processor.save_pretrained(folder)
        complete(folder)


def make_model(args: argparse.Namespace, rows: Sequence[tuple[str, list[str]]]) -> None:
    """Make the model that the flags of ``make_model.py`` describe.

    :param rows: Questions and options that it shall know; without any, the demo's own.
    """
    start = time.perf_counter()
    disable_progress_bar()
    processor = build_processor(args.family, rows, SIZES["num_mel_bins"] if args.whisper else N_MELS)
    model = build_model(processor, args.seed, args.family, args.whisper)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {parameters:,} parameters, vocabulary of {len(processor.tokenizer)} tokens")
    if args.sounds:
        centre_projector(model, processor, args.sounds)
    settings = (args.warm_start_steps, args.warm_start_batch_size, args.warm_start_lr)
    if args.warm_start_steps:
        warm_start(model, processor, *settings, seed=args.seed, rows=rows, reading=bool(args.sounds))
    save(model, processor, args.out_dir)
    print(f"model: {time.perf_counter() - start:.1f} s -> {args.out_dir}")
