"""Rollout engines against the trainer: the real vLLM, the real transformers, the real weight sync."""

import contextlib
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import parse_flags
from support.engine_sleep import let_sleep
from support.rollouts import gaps, prompt_of, rollout

from aqa.audio.decode import SAMPLING_RATE, load_audio
from aqa.data.prompts import end_tokens, render_chat
from aqa.families import Qwen2Audio
from aqa.hosts.targets import patch_experience_maker_for_audio
from aqa.patches.strategy import build_audio_inputs
from aqa.rewards.r1_aqa import reward_fn
from lightrft.engines.base import Sampling
from lightrft.engines.hf_engine import HFEngine
from lightrft.trainer.advantages import KLController
from lightrft.trainer.fast_exp_maker import FastExperienceMaker, forward
from lightrft.trainer.replay_buffer import make_micro_batch


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vllm_agrees_with_the_trainer_for_all_lengths_of_audio(vllm_engine, parts, noises, temperature):
    actor = parts[0]
    actor.temperature = temperature
    try:
        prompts = [prompt_of(parts[2])] * len(noises)
        items, bias = rollout(vllm_engine, parts, noises, prompts, temperature=temperature)
        assert max(gaps(parts, items, bias)) < 1e-3
    finally:
        actor.temperature = 1.0


@pytest.mark.parametrize("frames", [[3], [8, 5], [199, 200, 50], [401, 398], [2999, 12], [3000]])
def test_vllms_tower_leaves_the_padding_out_and_no_value_changes(vllm_engine, parts, frames):
    """Against the tower's own forward over 30 s, for odd and even numbers of states, which are pooled in pairs."""
    tower = parts[0].model.model.audio_tower
    features, counts = torch.randn(len(frames), tower.config.num_mel_bins, 3000), torch.tensor(frames)
    after_conv, tokens = tower._get_feat_extract_output_lengths(counts)
    hidden = torch.arange(1500)[None, None, None] >= after_conv[:, None, None, None]
    mask = torch.where(hidden, float("-inf"), 0.0).expand(-1, 1, 1500, -1)
    with torch.no_grad():
        full = tower(features, attention_mask=mask).last_hidden_state
        short = vllm_engine.llm.apply_model(lambda model: model.audio_tower(features, attention_mask=mask))[0]
    assert short.last_hidden_state.shape[1] == int(tokens.max())
    for own, ours, count in zip(full, short.last_hidden_state, tokens.tolist(), strict=True):
        torch.testing.assert_close(ours[:count], own[:count], rtol=1e-4, atol=1e-4)  # sums in another order


def test_engine_hears_the_audio(vllm_engine, parts, noises):
    """The comparison above means nothing if log-probs do not depend on the clip."""
    prompts = [prompt_of(parts[2])] * 2
    items, bias = rollout(vllm_engine, parts, noises[2:4], prompts)
    items[0].clips, items[0].prompt_ids = items[2].clips, items[2].prompt_ids
    assert gaps(parts, items, bias)[0] > 1e-3


def sync(engine, actor):
    engine.load_weights((Qwen2Audio.checkpoint_name(name), p.data) for name, p in actor.model.named_parameters())


def clips_encoded(engine):
    """How many clips' tower outputs vLLM holds."""
    return len(engine.llm.llm_engine.engine_core.engine_core.scheduler.encoder_cache_manager.cached)


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [(("audio_tower.", "multi_modal_projector."), True), (("audio_tower.",), False), (("language_model.",), False)],
)
def test_a_sync_of_what_trains_leaves_the_engine_with_the_trainers_weights(vllm_engine, parts, noises, frozen, kept):
    """Frozen layers are not sent and not touched; the encoder's outputs stay if nothing before them trains."""
    actor = parts[0]
    named = {Qwen2Audio.checkpoint_name(name): p for name, p in actor.model.named_parameters()}
    before = {name: p.detach().clone() for name, p in named.items()}
    trained = {name: p for name, p in named.items() if not name.startswith(frozen)}
    prompts = [prompt_of(parts[2])] * len(noises)
    try:
        sync(vllm_engine, actor)
        assert clips_encoded(vllm_engine) == 0
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            rollout(vllm_engine, parts, noises, prompts)
            encoded = clips_encoded(vllm_engine)
            assert encoded > 0
            with torch.no_grad():
                for parameter in trained.values():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
            stale, bias = rollout(vllm_engine, parts, noises, prompts)
            assert max(gaps(parts, stale, bias)) > 1e-2
            vllm_engine.load_weights((name, p.data) for name, p in trained.items())
            assert clips_encoded(vllm_engine) == (encoded if kept else 0)
            fresh, bias = rollout(vllm_engine, parts, noises, prompts)
            assert max(gaps(parts, fresh, bias)) < 1e-4
    finally:
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(before[name])
        sync(vllm_engine, actor)


def test_a_sync_that_does_not_arrive_is_noticed(vllm_engine, parts, monkeypatch):
    actor = parts[0]
    model = vllm_engine.llm.apply_model(lambda model: model)[0]
    monkeypatch.setattr(model, "load_weights", lambda weights: {name for name, _ in weights})
    moved = ((Qwen2Audio.checkpoint_name(name), p.data + 1e-6) for name, p in actor.model.named_parameters())
    with pytest.raises(RuntimeError, match=r"weight sync failed: .* in vLLM is not what the trainer sent"):
        vllm_engine.load_weights(moved)


def test_a_change_of_what_was_not_sent_is_noticed(vllm_engine, parts):
    weights = [(Qwen2Audio.checkpoint_name(name), p.data) for name, p in parts[0].model.named_parameters()]
    sync(vllm_engine, parts[0])
    tower = vllm_engine.llm.apply_model(lambda model: model.audio_tower.layers[0].fc1.weight.data)[0]
    was = tower[0, 0].item()
    tower[0, 0] += 1e-6
    try:
        with pytest.raises(RuntimeError, match=r"audio_tower\.layers\.0\.fc1\.weight was not sent and has changed"):
            vllm_engine.load_weights((name, p) for name, p in weights if not name.startswith("audio_tower."))
    finally:
        tower[0, 0] = was
        sync(vllm_engine, parts[0])


@pytest.mark.parametrize("keep", [False, True])
def test_a_sleep_loses_what_is_not_needed_and_nothing_is_sampled_from_garbage(
    vllm_engine, parts, noises, keep, monkeypatch
):
    """The KV cache is lost, and unless they are kept the weights, without which it does not sample; then a sync must
    bring all of them."""
    prompts = [prompt_of(parts[2])] * 2
    weights = [(Qwen2Audio.checkpoint_name(name), p.data) for name, p in parts[0].model.named_parameters()]
    sync(vllm_engine, parts[0])
    before, bias = rollout(vllm_engine, parts, noises[:2], prompts)
    let_sleep(vllm_engine, keep, monkeypatch.setattr)
    try:
        for _ in range(2):
            vllm_engine.sleep()
            vllm_engine.sleep()  # it sleeps already
            assert vllm_engine.complete is keep
            vllm_engine.wake_up()
            if not keep:
                with pytest.raises(RuntimeError, match="dropped its weights when it went to sleep"):
                    rollout(vllm_engine, parts, noises[:2], prompts)
                with pytest.raises(RuntimeError, match=r"audio_tower\..* of vLLM was not sent, and it needs all"):
                    vllm_engine.load_weights(pair for pair in weights if not pair[0].startswith("audio_tower."))
                assert not vllm_engine.complete
                sync(vllm_engine, parts[0])
            after, _ = rollout(vllm_engine, parts, noises[:2], prompts)
            assert [i.response_ids.tolist() for i in after] == [i.response_ids.tolist() for i in before]
            assert max(gaps(parts, after, bias)) < 1e-3
    finally:
        vllm_engine.wake_up()
        sync(vllm_engine, parts[0])


def test_the_first_rollout_does_not_wait_for_a_compiler(vllm_engine):
    from torch._dynamo.utils import counters
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    before = counters["frames"]["total"]
    logits = torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.1, 0.1]], dtype=torch.float64)  # vLLM's own calls are in float32
    assert batched_count_greater_than(logits, logits[:, :1]).tolist() == [3, 1]
    assert counters["frames"]["total"] == before


def test_the_audio_placeholder_cannot_be_sampled(vllm_engine, parts, noises):
    """The bias that forbids it, turned round, makes it the only token: it acts on the right one."""
    placeholder = parts[1].convert_tokens_to_ids(parts[2].audio_token)
    prompts = [prompt_of(parts[2])]
    hot = {"n": 20, "max_tokens": 20, "temperature": 2.0}
    items, _ = rollout(vllm_engine, parts, noises[:1], prompts, **hot)
    assert not any((item.response_ids == placeholder).any() for item in items)
    forced, _ = rollout(vllm_engine, parts, noises[:1], prompts, **hot, logit_bias={placeholder: 100.0})
    assert all((item.response_ids == placeholder).all() for item in forced)


def test_nothing_but_the_sampling_decides(vllm_engine, parts, sampling_model, noises):
    """Both engines draw from the trainer's distribution and give the same greedy answers, whatever the checkpoint's
    generation config says, and end at each of its end tokens.
    """
    actor, tokenizer, processor = parts
    actor.model.generation_config.use_cache = False  # as in a folder saved while training
    checkpoints = actor.model.generation_config.to_dict()
    assert checkpoints["repetition_penalty"] == 1.1
    ends = end_tokens(tokenizer, sampling_model)
    assert ends == [0, 2, *sorted(tokenizer.convert_tokens_to_ids(["bell", "beep"]))]
    hf = HFEngine(processor, lambda: contextlib.nullcontext(actor.model), batch_size=3)
    prompts = [prompt_of(processor), prompt_of(processor, "Short?"), *[prompt_of(processor)] * 2]
    tower, encoded = actor.model.model.audio_tower, []
    handle = tower.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    greedy, last = [], set()
    for engine in (hf, vllm_engine):
        sample = functools.partial(rollout, engine, parts, noises[:4], prompts, n=2, seed=5, end_ids=tuple(ends))
        encoded.clear()
        drawn, bias = sample()
        assert engine is not hf or encoded == [2, 2, 1]  # of the rows 0 0 1, 1 2 2, 3 3: a clip once a batch
        assert [i.response_ids.tolist() for i in sample()[0]] == [i.response_ids.tolist() for i in drawn]
        hot, _ = sample(n=8, temperature=1.5)
        assert max(gaps(parts, drawn, bias)) < 1e-4
        for item in drawn + hot:
            *before, at_end = item.response_ids.tolist()
            assert not set(before) & set(ends)
            assert item.truncated is (at_end not in ends) and (not item.truncated or len(before) == 11)
            last.add(at_end)
        on, _ = sample(n=8, temperature=1.5, end_ids=(tokenizer.eos_token_id,))
        assert set(ends[2:]) & {token for item in on for token in item.response_ids[:-1].tolist()}
        narrow, _ = sample(n=8, temperature=1.5, top_k=1)  # the likeliest token alone, with log-prob 0
        assert all((item.engine_log_probs.abs() < 1e-6).all() for item in narrow)
        greedy.append(sample(n=1, temperature=0.0)[0])
        assert [i.response_ids.tolist() for i in narrow[::8]] == [i.response_ids.tolist() for i in greedy[-1]]
    handle.remove()
    assert last & set(ends[2:])  # words that end a response have been sampled
    assert actor.model.generation_config.to_dict() == checkpoints
    for ours, theirs in zip(*greedy, strict=True):
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
        torch.testing.assert_close(ours.engine_log_probs, theirs.engine_log_probs, atol=1e-4, rtol=0)


@pytest.fixture
def maker(vllm_engine, parts):
    """The experience maker on the real engine, in a single process."""
    actor, tokenizer, processor = parts
    args = parse_flags(["--seed", 1, "--micro_rollout_batch_size", 4])

    def generate(sampling_params, all_prompts, all_images, images_num, **_):
        return vllm_engine.generate(build_audio_inputs(all_prompts, all_images, images_num), sampling_params)

    device = torch.device("cpu")
    strategy = SimpleNamespace(args=args, rank=0, world_size=1, device=device, gather_and_generate=generate)
    strategy.inference_engine = vllm_engine
    bias = {tokenizer.convert_tokens_to_ids("<|AUDIO|>"): -100.0}
    sampling = Sampling(n=4, max_tokens=12, end_ids=(2,), logit_bias=bias)
    actor.logit_bias = sampling.logit_bias
    made = FastExperienceMaker(actor, None, tokenizer, strategy, KLController(0), reward_fn, {}, sampling, True)
    with patch_experience_maker_for_audio(made, processor, tokenizer, 512):
        yield made


def test_rows_without_audio_may_be_mixed_in(maker, parts, noises):
    processor = parts[2]
    text = render_chat(processor, [{"role": "user", "content": "Which of ['beep', 'bell'] is loud?"}])
    prompts = [prompt_of(processor), text, prompt_of(processor)]
    items = maker.make_experience_list(prompts, [noises[1], None, noises[2]], ["bell"] * 3, ["avqa_rule"] * 3, step=1)
    assert [len(item.clips) for item in items] == [1] * 4 + [0] * 4 + [1] * 4
    for item in items:
        torch.testing.assert_close(item.old_log_probs, item.engine_log_probs, atol=1e-3, rtol=0)  # other kernels


def test_the_real_recording_goes_all_the_way(vllm_engine, parts, shared_data):
    """MMAU's first recording with its question: decode, process, vLLM, training forward and backward."""
    actor, tokenizer, processor = parts
    question = json.loads((shared_data / "mmau" / "mmau-test-mini.json").read_text())[0]
    recording = next((shared_data / "mmau" / "test-mini-audios").glob("*.wav"))
    assert recording.stem in question["audio_id"]
    clip = (load_audio(recording), SAMPLING_RATE)
    assert len(clip[0]) == 10 * SAMPLING_RATE
    text = f"{question['question']} Please choose the answer from the following options: {question['choices']}."
    items, bias = rollout(vllm_engine, parts, [clip], [prompt_of(processor, text)], n=4)
    assert items[0].clips[0].shape == (1002, 128)  # 10 s are 1,000 frames, and two guard rows
    assert max(gaps(parts, items, bias)) < 1e-3
    batch = make_micro_batch(items, tokenizer.pad_token_id, torch.device("cpu"))
    forward(actor, batch).sum().backward()
    silent = [name for name, p in actor.model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    actor.model.zero_grad()
    # the keys' bias shifts all scores of a query alike: softmax takes no notice of it
    assert [name for name in silent if "k_proj.bias" not in name and "embed_positions" not in name] == []
