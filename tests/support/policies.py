"""Tiny random models and samples, and their log-probs and gradients by plain transformers, the policy's oracle."""

import torch
from support.experiences import make_experience
from torch import nn
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask

from aqa.hosts.targets import patch_actor_for_audio
from aqa.patches.slots import audio_token_count, pack_clip
from lightrft.models.actor_al import ActorAL
from lightrft.trainer.fast_exp_maker import forward
from lightrft.trainer.replay_buffer import MicroBatch, make_micro_batch

Case = tuple  # of make_item: an experience, the spectrogram of its clip, and the number of its frames

AUDIO, PAD, VOCABULARY = 7, 0, 61
TOWER = {"num_mel_bins": 128, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 96, "d_model": 64}
DECODER = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048}
DECODER |= {"tie_word_embeddings": False}


def with_large_weights(model_class: type[nn.Module], config: object) -> nn.Module:
    """A model of these sizes in which whatever it hears or reads shows in its outputs; the default 0.02 hides it."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.3 * parameter[0].numel() ** -0.5)
    return model


def build_model() -> Qwen2AudioForConditionalGeneration:
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "max_source_positions": 1500} | TOWER,
        text_config={"model_type": "qwen2"} | DECODER,
        audio_token_index=AUDIO,
    )
    return with_large_weights(Qwen2AudioForConditionalGeneration, config)


def as_actor(
    policy: Qwen2AudioForConditionalGeneration, temperature: float = 1.0, logit_bias: dict | None = None
) -> ActorAL:
    actor = ActorAL(policy)
    actor.temperature, actor.logit_bias = temperature, logit_bias or {}
    patch_actor_for_audio(actor)
    return actor


def make_mel(seed: int) -> torch.Tensor:
    """A spectrogram that is nowhere zero, not even beyond the valid frames, as the extractor's."""
    return torch.randn(128, 3000, generator=torch.Generator().manual_seed(seed))


def make_item(frames: int | None, seed: int, response: list[int], clip_seed: int | None = None, text: int = 4) -> Case:
    """An experience, and the spectrogram it was packed from; ``frames`` None is text alone."""
    generator = torch.Generator().manual_seed(1000 + seed)
    words = torch.randint(8, VOCABULARY, (text + 3,), generator=generator).tolist()
    mel = None if frames is None else make_mel(seed if clip_seed is None else clip_seed)
    audio = [] if frames is None else [AUDIO] * audio_token_count(frames)
    item = make_experience(
        len(response),
        prompt_ids=torch.tensor(words[:3] + audio + words[3:]),
        response_ids=torch.tensor(response),
        clips=[] if frames is None else [pack_clip(mel, frames)],
    )
    return item, mel, frames


def mixed_cases() -> list:
    """Lengths from one audio token to 30 s, shared clips, text alone, prompts and responses of all widths."""
    return [
        make_item(333, 1, [9, 10, 11, 12, 13]),
        make_item(None, 2, [14, 15], text=9),
        make_item(8, 3, [16]),
        make_item(333, 4, [17, 18, 19], clip_seed=1, text=1),  # the first one's clip
        make_item(101, 5, [20, AUDIO, 21, AUDIO, AUDIO]),  # samples placeholders
        make_item(3, 6, [22, 23]),  # one audio token
        make_item(3000, 7, [24, 25, 26]),
        make_item(None, 8, [27, AUDIO, 28]),
        make_item(333, 1, [29, 30]),  # the first one's prompt and clip: a group
        make_item(333, 1, [31, 32, 33], clip_seed=2),  # the first one's prompt, another clip
        make_item(None, 2, [34], text=9),  # the second one's prompt
    ]


def audio_inputs(model: nn.Module, mel: torch.Tensor, frames: int) -> dict[str, torch.Tensor]:
    """A clip as transformers' own forward takes it: padded to 30 s, with a mask of the valid frames."""
    name = "input_features_mask" if model.config.model_type == "audioflamingo3" else "feature_attention_mask"
    return {"input_features": mel[None].to(model.dtype), name: (torch.arange(3000) < frames).long()[None]}


def audio_embeddings(model: nn.Module, mel: torch.Tensor, frames: int) -> torch.Tensor:
    """Tower and projector, called as transformers' own forward does ``(tokens, hidden size)``."""
    inputs = audio_inputs(model, mel, frames)
    if model.config.model_type != "qwen2_audio":
        # Omni's are projected by the tower, Audio Flamingo's are another output
        out = model.get_audio_features(**inputs)
        return out.last_hidden_state if out.pooler_output is None else out.pooler_output
    tower = model.model.audio_tower
    states, tokens = tower._get_feat_extract_output_lengths(torch.tensor([frames]))
    mask = create_bidirectional_mask(
        config=tower.config,
        inputs_embeds=torch.zeros(1, 1500, 1, dtype=model.dtype),
        attention_mask=(torch.arange(1500)[None] < states[:, None]).long(),
    )
    hidden = tower(inputs["input_features"], attention_mask=mask).last_hidden_state
    return model.model.multi_modal_projector(hidden)[0, : int(tokens)]


def reference_log_probs(
    model: nn.Module, case: Case, temperature: float = 1.0, logit_bias: dict[int, float] | None = None
) -> torch.Tensor:
    """Log-probs of one unpadded sample's response ``(response length,)``.

    transformers takes each placeholder of a response for a clip's, and Qwen2-Audio's also a single one of a prompt;
    there the audio is put at the prompt's placeholders by hand.
    """
    item, mel, frames = case
    ids = torch.cat([item.prompt_ids, item.response_ids])[None]
    kwargs = {"input_ids": ids}
    if frames is not None:
        kwargs |= audio_inputs(model, mel, frames)
        if (item.response_ids == AUDIO).any() or audio_token_count(frames) == 1:
            embeds = model.get_input_embeddings()(ids).clone()
            in_prompt = torch.arange(ids.shape[1]) < len(item.prompt_ids)
            embeds[in_prompt & (ids == AUDIO)] = audio_embeddings(model, mel, frames)
            kwargs = {"inputs_embeds": embeds}
            if model.config.model_type.startswith("qwen2_5_omni"):
                kwargs["position_ids"] = torch.arange(ids.shape[1]).expand(3, 1, -1)
    logits = model(**kwargs, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    for token, bias in (logit_bias or {}).items():
        logits = logits.index_add(1, torch.tensor([token]), torch.full((len(logits), 1), bias, dtype=logits.dtype))
    log_probs = (logits / temperature).log_softmax(-1)
    predicting = log_probs[len(item.prompt_ids) - 1 : -1]  # position t predicts token t + 1
    return predicting.gather(-1, item.response_ids[:, None])[:, 0]


def batch_of(cases: list[Case]) -> MicroBatch:
    return make_micro_batch([item for item, _, _ in cases], PAD, torch.device("cpu"))


@torch.no_grad()
def check_log_probs(
    policy: nn.Module, plain: nn.Module, cases: list[Case], temperature: float = 1.0, logit_bias: dict | None = None
) -> None:
    """The policy's forward of all cases in one batch gives the reference's log-probs, and 0 where there is no token."""
    batch = batch_of(cases)
    out = forward(as_actor(policy, temperature, logit_bias), batch)
    assert out.dtype == torch.float32
    for row, mask, case in zip(out, batch.response_mask, cases, strict=True):
        expected = reference_log_probs(plain, case, temperature, logit_bias)
        # float32 sums over other widths, in another order; a bias of -100 makes log-probs of -100, hence the rtol
        torch.testing.assert_close(row[mask], expected, rtol=1e-5, atol=1e-5)
        assert not row[~mask].any()


def check_gradients(
    actor: ActorAL, plain: nn.Module, cases: list[Case], frozen: tuple[str, ...], temperature: float = 1.0
) -> None:
    """The gradients of a weighted sum of log-probs, the weights as different as advantages are, equal the naive ones.

    :param actor: With a model in float64, because gradients add up along other paths.
    :param plain: The same model, unpatched.
    :param frozen: How the names of what does not train begin.
    """
    weights = [torch.randn(len(item.response_ids), generator=torch.Generator().manual_seed(3)) for item, _, _ in cases]
    for case, weight in zip(cases, weights, strict=True):
        (reference_log_probs(plain, case, temperature) * weight).sum().backward()
    batch = batch_of(cases)
    rows = zip(forward(actor, batch), batch.response_mask, weights, strict=True)
    sum((row[mask] * weight).sum() for row, mask, weight in rows).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in actor.model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if expected[name] is None:
            assert name.startswith(frozen), name
            continue
        scale = expected[name].abs().max()
        assert scale > 0, f"{name}: nothing to compare"
        error = (parameter.grad - expected[name]).abs().max() / scale
        assert error < 1e-5, f"{name}: relative error {error}"
