"""The demo's sounds, data and model: made by the seed alone, answers spread evenly, and nothing learned beforehand."""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from demo import make_data, make_model, sounds, warm_start
from demo.tiny_model import build_model, build_processor

PLACEHOLDER = "<|audio_bos|><|AUDIO|><|audio_eos|>"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_data.main(
        ["--out_dir", str(folder), "--train_clips", "120", "--train_questions", "400", "--test_questions", "60"]
    )
    return folder


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def read_rows(data: Path) -> tuple[list[dict], list[dict]]:
    train = [json.loads(line) for line in (data / "train_qa.data").read_text().splitlines()]
    return train, json.loads((data / "demo-test.json").read_text())


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("script", [make_data, make_model])
@pytest.mark.parametrize("names", [["config.json", "model-1.safetensors"], ["model.safetensors", "r1_aqa.json"]])
def test_what_the_demo_has_not_made_is_not_replaced(tmp_path, script, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match="has not made this folder"):
        script.main(["--out_dir", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_model_is_replaced_only_if_asked(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    command = ["--out_dir", str(tmp_path), "--warm_start_steps", "0"]
    with pytest.raises(SystemExit, match="holds a model; --overwrite replaces it"):
        make_model.main(command)
    assert file.stat().st_size == 0
    make_model.main([*command, "--overwrite"])
    assert file.stat().st_size


# --- sounds


# --- data


def test_answers_are_spread_evenly(data: Path) -> None:
    train, test = read_rows(data)
    positions = Counter(row["answer"] for row in train)
    assert set(positions) == set(range(4)) and max(positions.values()) < 0.34 * len(train)
    for golds in ([r["multi_choice"][r["answer"]] for r in train], [r["answer"] for r in test]):
        counts = Counter(golds)
        assert set(counts) == set(sounds.CLASSES) and max(counts.values()) < 0.15 * len(golds)


def test_data_depend_on_the_seed_alone(data: Path, tmp_path: Path) -> None:
    small = ["--train_clips", "10", "--train_questions", "12", "--test_questions", "5"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        make_data.main(["--out_dir", str(tmp_path / name), "--seed", seed, *small])
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing temporary left


# --- processor


def test_template_behaves_as_qwen2_audio(processor) -> None:
    """Compared with the template that transformers keeps for Qwen2-Audio."""
    text, clip = {"type": "text", "text": "Hi"}, {"type": "audio", "audio_url": "a.wav"}
    user = {"role": "user", "content": [clip, text, {"type": "audio", "audio": "b.wav"}]}
    chats = [
        [user],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [user, {"role": "assistant", "content": "A bell."}, {"role": "user", "content": [text, clip]}],
        # A part that has the key is an audio, even if the value is None: the question is lost.
        [{"role": "user", "content": [{"type": "text", "text": "Hi", "audio_url": None}]}],
    ]
    for chat in chats:
        for generation in (True, False):
            ours, theirs = (
                processor.apply_chat_template(chat, chat_template=t, tokenize=False, add_generation_prompt=generation)
                for t in (None, processor.default_chat_template)
            )
            assert ours == theirs
    assert "Hi" not in ours and PLACEHOLDER in ours


def test_tokenizer(processor) -> None:
    tokenizer = processor.tokenizer
    for name in sounds.CLASSES:
        (word,) = tokenizer(name)["input_ids"]
        # As an option and as an answer it is the same token: copying suffices.
        assert tokenizer(f"options: ['{name}', 'x', '{name}'].")["input_ids"].count(word) == 2
        assert tokenizer(f"<answer>{name}</answer>")["input_ids"].count(word) == 1
    for text in ("Zwölf Boxkämpfer 音\n", "<answer>a</answer>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer(f"{PLACEHOLDER}<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_tokenizer_of_ones_own_rows(tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    options = ["low", "lower", "a cat (loud)", "猫"]
    row = {"id": 1, "question_text": "How slow?", "multi_choice": options, "answer": 0, "audio_path": "a.wav"}
    rows.write_text(json.dumps(row))
    own = make_model.read_questions(rows)
    assert own == [("How slow?", options)]
    tokenizer = build_processor(rows=own).tokenizer
    text = f"slow {options} <answer>lower</answer>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    for name, times in zip(options, (1, 2, 1, 1), strict=True):
        (word,) = tokenizer(name)["input_ids"]
        assert ids.count(word) == times
    with pytest.raises(SystemExit, match="cannot write the option 'Größe'"):
        build_processor(rows=[("?", ["Größe"])])
    with pytest.raises(SystemExit, match=r"rows.jsonl: no usable row; the first: .*audio_path"):
        rows.write_text(json.dumps({name: row[name] for name in row if name != "audio_path"}))
        make_model.read_questions(rows)
    with pytest.raises(SystemExit, match="gone: No such file"):
        make_model.read_questions(tmp_path / "gone")


# --- warm start


def test_warm_start_says_nothing_of_sounds() -> None:
    labels, _ = warm_start.draw_warm_start_sounds(count=64, seed=0)
    rng = np.random.default_rng(0)
    draws = [warm_start.draw_warm_start_example(rng, len(labels)) for _ in range(8000)]
    named = [answer == labels[sound] for _, options, answer, sound in draws if labels[sound] in options]
    assert len(named) / len(draws) == pytest.approx(0.5, abs=0.03)  # four options of eight classes
    assert np.mean(named) == pytest.approx(0.25, abs=0.03)  # 3200 draws: standard error 0.008
    positions = Counter(options.index(answer) for _, options, answer, _ in draws)
    assert all(count / len(draws) == pytest.approx(0.25, abs=0.03) for count in positions.values())


def test_warm_start_loss_by_hand() -> None:
    # Two tokens of a vocabulary of four; the answer is (0, 2), the options are 2 and 3.
    probs = torch.tensor([[[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.6, 0.2]]])
    word, form = warm_start.warm_start_loss(probs.log(), torch.tensor([[0, 2]]), torch.tensor([[2, 3]]))
    torch.testing.assert_close(form, torch.tensor(-math.log(0.5)))
    torch.testing.assert_close(word, torch.tensor(-(math.log(0.6) + math.log(0.2)) / 2))
    # a second example has one option less
    fewer, options = probs[:, :, [0, 1, 3, 2]], torch.tensor([[2, 3], [3, -1]])
    word, _ = warm_start.warm_start_loss(torch.cat([probs, fewer]).log(), torch.tensor([[0, 2], [0, 3]]), options)
    torch.testing.assert_close(word, torch.tensor(-((math.log(0.6) + math.log(0.2)) / 2 + math.log(0.6)) / 2))
    with pytest.raises(ValueError, match="exactly one"):
        warm_start.warm_start_loss(probs.log(), torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))


def test_warm_start_leaves_tower_and_projector_alone(tiny_model: Path, processor) -> None:
    before = build_model(processor, seed=0).state_dict()
    after = Qwen2AudioForConditionalGeneration.from_pretrained(tiny_model).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("audio_tower" in name or "projector" in name for name in moved)


# --- checkpoint


def test_warm_start_hears_as_the_model_does(tiny_model: Path) -> None:
    """The embeddings that the warm start inserts are those of the model's own forward."""
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tiny_model)
    processor = AutoProcessor.from_pretrained(tiny_model)
    clips = [sounds.synthesize(name, np.random.default_rng(0)) for name in ("bell", "rain")]
    ours = warm_start.embed_sounds(model, processor, clips)
    heard = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: heard.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for clip, embedding in zip(clips, ours, strict=True):
        batch = processor(text=[PLACEHOLDER], audio=[clip], sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            model(**batch)
        torch.testing.assert_close(embedding, heard.pop()[0, 1:-1], rtol=1e-4, atol=1e-5)
    assert (ours[0].mean(0) - ours[1].mean(0)).norm() > 0.3 * ours[0].mean(0).norm()  # the filter bank tells them apart
