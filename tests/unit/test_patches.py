"""The patches: replaced, applied once, undone exactly, and refused where the host is not what they expect."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from audio_dataset import AudioMultimodalProcessor
from support.training import contents
from transformers import AutoProcessor

import lightrft
from aqa.common.patch import Patch, PatchError
from aqa.hosts.targets import patch_actor_for_audio, patch_experience_maker_for_audio, patch_strategy_for_audio
from aqa.patches.experience_maker import check_audio
from aqa.patches.multimodal_processor import count_audio
from aqa.patches.strategy import build_audio_inputs
from lightrft.engines.base import RolloutOutput, Sampling, stable_seed
from lightrft.models.actor_al import ActorAL, load_model
from lightrft.strategy import checkpoint, strategy_base
from lightrft.strategy.checkpoint import SaveError
from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy
from lightrft.trainer import fast_exp_maker
from lightrft.trainer.advantages import KLController
from lightrft.trainer.fast_exp_maker import FastExperienceMaker

CLIP = (np.zeros(16_000, np.float32), 16_000)


@pytest.fixture(scope="module")
def processor(tiny_model):
    return AutoProcessor.from_pretrained(tiny_model)


@pytest.fixture(autouse=True)
def own_module_functions(monkeypatch):
    """Whatever a test leaves in the experience maker's module, the next one finds the original functions."""
    for name in ("normalize_images", "get_images_num"):
        monkeypatch.setattr(fast_exp_maker, name, getattr(fast_exp_maker, name))


@pytest.fixture
def strategy() -> DeepspeedStrategy:
    """The runtime's own class, without the process group that its constructor joins."""
    return DeepspeedStrategy.__new__(DeepspeedStrategy)


@pytest.fixture
def actor() -> ActorAL:
    parts = SimpleNamespace(audio_tower=None, multi_modal_projector=None, language_model=None)

    class Model(SimpleNamespace):
        def forward(self) -> None:
            """What the patch stands in front of."""

    config = SimpleNamespace(model_type="qwen2_audio")
    return ActorAL(Model(config=config, model=parts, lm_head=torch.nn.Linear(2, 3, bias=False)))


def make_maker(strategy=None, reward_fn=None, tokenizer=None, n=1) -> FastExperienceMaker:
    return FastExperienceMaker(
        None, None, tokenizer, strategy, KLController(0.0), reward_fn, {}, Sampling(n=n), needs_old_log_probs=False
    )


@pytest.fixture
def targets(strategy, actor, processor):
    """For each public function: how to call it, the objects it changes, and the names it changes on them."""
    maker = make_maker()
    return {
        "strategy": (
            lambda: patch_strategy_for_audio(strategy, processor),
            [(strategy, "_build_multimodal_inputs"), (strategy, "add_model_files")],
        ),
        "experience_maker": (
            lambda: patch_experience_maker_for_audio(maker, processor, processor.tokenizer, 512),
            [(maker, "multimodal_processor"), (fast_exp_maker, "normalize_images"), (fast_exp_maker, "get_images_num")],
        ),
        "actor": (lambda: patch_actor_for_audio(actor), [(actor, "unpack_audio"), (actor.model.lm_head, "forward")]),
    }


def snapshot(spots) -> list[tuple[type, dict]]:
    return [(type(owner), dict(vars(owner))) for owner, _ in spots]


KINDS = ["strategy", "experience_maker", "actor"]


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_and_undone_exactly(targets, kind):
    apply, spots = targets[kind]
    before, found = snapshot(spots), [getattr(owner, name) for owner, name in spots]
    patch = apply()
    try:
        for (owner, name), old, (shared, _) in zip(spots, found, before, strict=True):
            assert getattr(owner, name) != old
            # on the instance or module, or on a class of its own; not on the class that others share
            assert name in vars(owner) or (type(owner) is not shared and name in vars(type(owner)))
    finally:
        patch.undo()
    assert snapshot(spots) == before  # an attribute that was the class's is gone from the instance again


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_changes_nothing_and_undoes_nothing(targets, kind):
    apply, spots = targets[kind]
    with apply():
        replaced = snapshot(spots)
        with apply():
            assert snapshot(spots) == replaced
        assert snapshot(spots) == replaced


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_manager_undoes_after_an_exception(targets, kind):
    apply, spots = targets[kind]
    before = snapshot(spots)
    with pytest.raises(KeyError), apply():
        raise KeyError("a run that fails")
    assert snapshot(spots) == before


def test_undo_goes_backwards():
    owner = SimpleNamespace(a=1)
    patch = Patch()
    patch.replace(owner, "a", 2)
    patch.replace(owner, "a", 3)
    patch.replace(owner, "b", 4)
    patch.undo()
    assert vars(owner) == {"a": 1}
    owner.a = 5
    patch.undo()  # nothing is left to undo
    assert vars(owner) == {"a": 5}


def test_the_original_stays_reachable(strategy):
    original = strategy._build_multimodal_inputs
    with patch_strategy_for_audio(strategy):
        assert strategy._build_multimodal_inputs.__wrapped__ is original


def test_the_class_and_other_instances_are_left_alone(strategy, processor):
    other = DeepspeedStrategy.__new__(DeepspeedStrategy)
    with patch_strategy_for_audio(strategy, processor):
        with pytest.raises(RuntimeError, match="patch_strategy_for_audio"):
            other._build_multimodal_inputs(["a"], [CLIP], [1], None, None)
        assert strategy._build_multimodal_inputs(["a"], [CLIP], [1], None, None)


# ---------------------------------------------------------------------------------------------------------- wrong hosts
class NoBuild:
    pass


class OtherBuild:
    def _build_multimodal_inputs(self, prompts, images):
        return []


class OtherSave:
    _build_multimodal_inputs = staticmethod(DeepspeedStrategy._build_multimodal_inputs)

    def add_model_files(self, path):
        return None


class NoProcessor:
    pass


@pytest.mark.parametrize(
    ("apply", "where", "what"),
    [
        (lambda p: patch_strategy_for_audio(NoBuild()), "NoBuild._build_multimodal_inputs", "does not exist"),
        (
            lambda p: patch_strategy_for_audio(OtherBuild()),
            "OtherBuild._build_multimodal_inputs",
            r"takes \['prompts', 'images'\], without \['all_prompts', 'all_images', 'images_num'",
        ),
        (lambda p: patch_strategy_for_audio(OtherSave(), p), "OtherSave.add_model_files", r"takes \['path'\], without"),
        (
            lambda p: patch_experience_maker_for_audio(NoProcessor(), p, p.tokenizer, 512),
            "NoProcessor.multimodal_processor",
            "does not exist",
        ),
        (lambda p: patch_actor_for_audio(torch.nn.Linear(1, 1)), "Linear.unpack_audio", "does not exist"),
    ],
    ids=["no_symbol", "signature", "save_signature", "maker", "actor"],
)
def test_a_host_that_differs_is_refused_by_name(processor, apply, where, what):
    with pytest.raises(PatchError, match=what) as error:
        apply(processor)
    message = str(error.value)
    assert where in message
    assert f"lightrft {lightrft.__version__} in {lightrft.__file__}" in message
    assert "tested with LightRFT 0.1.1" in message
    assert isinstance(error.value, ImportError)


def test_a_refused_patch_leaves_nothing_behind(processor, monkeypatch):
    """Half a patch would be worse than none: the caller has no Patch to undo it with."""
    maker = make_maker()
    monkeypatch.delattr(fast_exp_maker, "get_images_num")
    normalize = fast_exp_maker.normalize_images
    with pytest.raises(PatchError, match=r"lightrft\.trainer\.fast_exp_maker\.get_images_num does not exist"):
        patch_experience_maker_for_audio(maker, processor, processor.tokenizer, 512)
    assert maker.multimodal_processor is None
    assert fast_exp_maker.normalize_images is normalize


def test_a_refused_strategy_patch_leaves_nothing_behind(processor):
    strategy = OtherSave()
    with pytest.raises(PatchError):
        patch_strategy_for_audio(strategy, processor)
    assert vars(strategy) == {}


def test_a_model_that_is_not_known_is_refused_again_and_again(actor):
    """The failed call leaves nothing behind, so that the next one does not take the actor for patched."""
    actor.model.config.model_type = "bert"
    unpack_audio = actor.unpack_audio
    for _ in range(2):
        with pytest.raises(ValueError, match="bert"):
            patch_actor_for_audio(actor)
        assert actor.unpack_audio is unpack_audio and "forward" not in vars(actor.model)


def test_a_processor_that_does_not_fit_leaves_the_module_alone(processor, monkeypatch):
    monkeypatch.setattr(processor.feature_extractor, "hop_length", 80)
    normalize = fast_exp_maker.normalize_images
    with pytest.raises(ValueError, match="hop 80"):
        patch_experience_maker_for_audio(make_maker(), processor, processor.tokenizer, 512)
    assert fast_exp_maker.normalize_images is normalize


# ---------------------------------------------------------------------------------------------------------- unpatched
def test_the_unpatched_runtime_refuses_audio_everywhere(strategy, actor):
    with pytest.raises(RuntimeError, match="patch_strategy_for_audio"):
        strategy._build_multimodal_inputs(["a"], [CLIP], [1], None, None)
    for function in (fast_exp_maker.normalize_images, fast_exp_maker.get_images_num):
        with pytest.raises(RuntimeError, match="patch_experience_maker_for_audio"):
            function([CLIP])
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="patch_actor_for_audio"):
        actor(ids, 2, ids, image_grid_thw=torch.tensor([[1, 1, 12]]), audio_values=torch.ones(12, 4))


# -------------------------------------------------------------------------------------------------- what is put there
def test_engine_requests():
    requests = build_audio_inputs(["with", "without"], [CLIP, None], [1, 0])
    assert requests == [{"prompt": "with", "multi_modal_data": {"audio": [CLIP]}}, {"prompt": "without"}]
    assert requests[0]["multi_modal_data"]["audio"][0] is CLIP
    assert build_audio_inputs(["a"], None, None) == [{"prompt": "a"}]


def test_the_strategy_is_called_as_gather_and_generate_calls_it(strategy):
    with patch_strategy_for_audio(strategy):
        requests = strategy._build_multimodal_inputs(
            all_prompts=["a"], all_images=[CLIP], images_num=[1], all_videos=None, videos_num=None
        )
        # as in LightRFT's pull request 58, which has a way of its own for clips
        later = {"all_prompts": ["a"], "all_images": [CLIP], "images_num": [1], "all_audios": None, "audio_num": None}
        assert strategy._build_multimodal_inputs(**later) == requests
        with pytest.raises(ValueError, match="also passes all_audios: clips are expected in the image slot alone"):
            strategy._build_multimodal_inputs(**later | {"all_audios": [CLIP]})
    assert requests == [{"prompt": "a", "multi_modal_data": {"audio": [CLIP]}}]


@pytest.mark.parametrize(
    ("prompts", "images", "counts", "message"),
    [
        (["a", "b"], [CLIP], None, "2 prompts but 1 audio entries"),
        (["a", "b"], [CLIP, None], [1, 1], "prompt 1 should have 1 windows of audio and has 0: 'b'"),
        (["a"], [CLIP], [2], "prompt 0 should have 2 windows of audio and has 1"),
        (["a"], [CLIP], [0], "prompt 0 should have 0 windows of audio and has 1"),
    ],
)
def test_counts_that_do_not_fit_are_refused(prompts, images, counts, message):
    with pytest.raises(ValueError, match=message):
        build_audio_inputs(prompts, images, counts)


@pytest.mark.parametrize(
    ("bad", "name"),
    [("a.wav", "str"), (CLIP[0], "ndarray"), ([CLIP[0], 16_000], "list"), (([0.0], 16_000), "tuple"), ((1,), "tuple")],
)
def test_check_audio_names_what_is_no_clip(bad, name):
    with pytest.raises(TypeError, match=rf"prompt 1: expected \(waveform, sampling rate\) or None, got {name}"):
        check_audio([CLIP, bad])


def test_count_audio():
    assert count_audio([CLIP, None, CLIP]) == [1, 0, 1]
    assert count_audio(None) is None
    # 30.02 s are two frames more than a window, which make no audio token; the next sample is a third frame
    lengths = [480_000, 480_320, 480_321, 960_321]
    assert count_audio([(np.zeros(n), 16_000) for n in lengths], 600) == [1, 1, 2, 3]
    assert count_audio([(np.zeros(n), 16_000) for n in lengths]) == [1, 1, 1, 1]  # cut


def test_saved_models_come_with_their_processor_or_the_save_fails(
    strategy, processor, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(strategy_base, "gather_objects", lambda value: [value])  # no process group
    strategy.args = SimpleNamespace(lora_rank=0, sync_bucket_mb=512)
    strategy.named_weights = lambda model: iter([("weight", torch.zeros(2))])
    strategy.rank = 0
    policy = SimpleNamespace(model=load_model(str(tiny_model), dtype=torch.float32), lora_config=None)
    patch_strategy_for_audio(strategy, processor, {"note.json": "{}\n"})
    strategy.save_model(policy, processor.tokenizer, str(tmp_path / "out"))
    loaded = AutoProcessor.from_pretrained(tmp_path / "out")
    assert loaded.feature_extractor.feature_size == processor.feature_extractor.feature_size
    assert loaded.chat_template == processor.chat_template
    assert (tmp_path / "out" / "note.json").read_text() == "{}\n"
    assert not list((tmp_path / "out").glob("*.part"))

    before = contents(tmp_path / "out")
    (tmp_path / "out" / "model.part" / "x").mkdir(parents=True)  # of a save that was killed
    strategy.model_files["gone/note.json"] = ""  # a file that cannot be written
    with pytest.raises(SaveError, match=r"rank 0: .*No such file or directory"):
        strategy.save_model(policy, processor.tokenizer, str(tmp_path / "out"))
    left = contents(tmp_path / "out").items()
    assert {path: data for path, data in left if path.parts[0] != "model.part"} == before

    # a rank that cannot write goes on gathering, which is a collective
    gathered = iter([(str(i), torch.zeros(2)) for i in range(5)])
    strategy.named_weights = lambda model: gathered
    monkeypatch.setattr(checkpoint, "SHARD", 8)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_, **__: (tmp_path / "gone" / "file").touch())
    with pytest.raises(SaveError, match=r"rank 0: .*No such file or directory"):
        strategy.save_model(policy, processor.tokenizer, str(tmp_path / "out"))
    assert list(gathered) == []


# ------------------------------------------------------------------------------------------- a rollout on the patches
def make_rollout_strategy(answer, rank=0, world_size=1):
    """A strategy whose engine gives fixed answers and notes what it was asked."""
    asked = {}

    def gather_and_generate(**kwargs):
        asked.update(kwargs)
        return answer(kwargs)

    args = SimpleNamespace(seed=5, enable_engine_sleep=False, micro_rollout_batch_size=2)
    ranks = {"rank": rank, "world_size": world_size, "device": torch.device("cpu")}
    return SimpleNamespace(args=args, gather_and_generate=gather_and_generate, **ranks), asked


def echo(tokens):
    """Each sample of prompt i answers [tokens + i, sample]."""

    def answer(kwargs):
        return [
            RolloutOutput(list(ids), [tokens + i, k], torch.tensor([-1.0, -2.0]), truncated=k == 1)
            for i, ids in enumerate(kwargs["all_prompt_token_ids"])
            for k in range(kwargs["sampling_params"][i].n)
        ]

    return answer


def prompts_and_audio(processor):
    turn = {"type": "text", "text": "What is it?"}
    heard, read = (
        processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        for content in ([{"type": "audio", "audio_url": "a.wav"}, turn], [turn])
    )
    rng = np.random.default_rng(0)
    clips = [(rng.standard_normal(size).astype(np.float32), 16_000) for size in (8_000, 16_000)]
    return [heard, read, heard], [clips[0], None, clips[1]]


def test_a_rollout_keeps_prompts_clips_and_samples_together(processor):
    prompts, audio = prompts_and_audio(processor)
    strategy, asked = make_rollout_strategy(echo(100), rank=1, world_size=4)
    maker = make_maker(strategy, n=2)
    with patch_experience_maker_for_audio(maker, processor, processor.tokenizer, 512):
        assert isinstance(maker.multimodal_processor, AudioMultimodalProcessor)
        items = maker.rollout(prompts, audio, ["a", "b", "c"], ["x", "y", "z"], maker.sampling, step=3)
        expected = [maker.multimodal_processor.extract(clip)[0][0] for clip in (audio[0], audio[2])]
    # one request a prompt, n samples each, seeded by run, step and position among all ranks' prompts
    assert [p.seed for p in asked["sampling_params"]] == [stable_seed(5, 3, i * 4 + 1) for i in range(3)]
    assert [p.n for p in asked["sampling_params"]] == [2, 2, 2]
    assert asked["all_images"] == audio
    assert [item.response_ids.tolist() for item in items] == [
        [100, 0], [100, 1], [101, 0], [101, 1], [102, 0], [102, 1],
    ]  # fmt: skip
    assert [item.reference for item in items] == ["a", "a", "b", "b", "c", "c"]
    assert [item.label for item in items] == ["x", "x", "y", "y", "z", "z"]
    assert [item.truncated for item in items] == [False, True] * 3
    assert [len(item.clips) for item in items] == [1, 1, 0, 0, 1, 1]
    for item, rows in zip((items[0], items[4]), expected, strict=True):
        assert torch.equal(item.clips[0], rows)
    assert items[0].clips[0] is items[1].clips[0]  # the group shares it


def test_an_engine_that_saw_another_prompt_is_refused(processor):
    prompts, audio = prompts_and_audio(processor)

    def answer(kwargs):
        outputs = echo(100)(kwargs)
        outputs[1].prompt_token_ids[-1] += 1
        return outputs

    maker = make_maker(make_rollout_strategy(answer)[0])
    with (
        patch_experience_maker_for_audio(maker, processor, processor.tokenizer, 512),
        pytest.raises(RuntimeError, match=r"prompt 1 of step 3 is \d+ tokens in the engine .* differs in content"),
    ):
        maker.rollout(prompts, audio, ["a"] * 3, ["x"] * 3, maker.sampling, step=3)


def test_the_reward_function_gets_whole_sequences_and_its_parts_are_kept(processor):
    prompts, audio = prompts_and_audio(processor)
    seen = {}

    def reward_fn(**kwargs):
        seen.update(kwargs)
        return torch.tensor([2.0, 0.0, 1.0]), {"accuracy_reward": torch.tensor([1.0, 0.0, 0.0])}

    maker = make_maker(make_rollout_strategy(echo(100))[0], reward_fn, processor.tokenizer)
    with patch_experience_maker_for_audio(maker, processor, processor.tokenizer, 512):
        items = maker.rollout(prompts, audio, ["a", "b", "c"], ["x", "y", "z"], maker.sampling, step=1)
    maker.score(items)
    assert seen["labels"] == ["x", "y", "z"]
    assert seen["refs"] == ["a", "b", "c"]
    answer = processor.tokenizer.decode([100, 0])
    assert seen["queries"][1] == prompts[1] + answer  # special tokens included
    assert items[0].response == answer
    assert [item.reward for item in items] == [2.0, 0.0, 1.0]
    assert [item.reward_metrics["accuracy_reward"] for item in items] == [1.0, 0.0, 0.0]


def test_a_reward_that_is_not_finite_is_refused(processor):
    prompts, audio = prompts_and_audio(processor)
    maker = make_maker(
        make_rollout_strategy(echo(100))[0], lambda **_: (torch.tensor([1.0, torch.nan, 0.0]), {}), processor.tokenizer
    )
    with patch_experience_maker_for_audio(maker, processor, processor.tokenizer, 512):
        items = maker.rollout(prompts, audio, ["a"] * 3, ["x"] * 3, maker.sampling, step=1)
    with pytest.raises(FloatingPointError, match="nan"):
        maker.score(items)


def test_every_public_patch_is_exported_by_the_dataset_module():
    import audio_dataset

    from aqa.hosts import targets as targets_module

    for name in ("patch_strategy_for_audio", "patch_experience_maker_for_audio", "patch_actor_for_audio"):
        assert getattr(audio_dataset, name) is getattr(targets_module, name)
