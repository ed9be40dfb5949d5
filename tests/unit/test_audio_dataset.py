"""Prompts with audio: templating, the checks on rows, mel extraction and placeholder expansion."""

import json
from types import SimpleNamespace

import avqa
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from audio_dataset import AudioMultimodalProcessor, AudioPromptDataset, DataError
from transformers import AutoProcessor, Qwen2AudioProcessor, WhisperFeatureExtractor

from aqa.data.prompts import render_chat, render_prompt
from aqa.patches.slots import audio_token_count
from lightrft.utils import blending_datasets

RATE = 16_000
STRATEGY = SimpleNamespace(
    args=SimpleNamespace(input_key="prompt", images_key="audio_path", reference_key="reference", label_key="label")
)


@pytest.fixture(scope="module")
def processor(tiny_model) -> Qwen2AudioProcessor:
    return AutoProcessor.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def audio_processor(processor) -> AudioMultimodalProcessor:
    return AudioMultimodalProcessor(processor.tokenizer, processor, prompt_max_len=512)


@pytest.fixture
def clip_path(tmp_path) -> str:
    path = tmp_path / "clip.wav"
    soundfile.write(path, noise(RATE), RATE, subtype="FLOAT")
    return str(path)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


def make_row(audio: str | None, question: str = "What is it?", reference: str = "dog") -> dict:
    content = [{"type": "text", "text": question}]
    if audio is not None:
        content.insert(0, {"type": "audio", "audio_url": audio})
    prompt = [{"role": "user", "content": content}]
    return {"prompt": prompt, "audio_path": audio, "reference": reference, "label": "avqa_rule"}


def through_parquet(tmp_path, rows: list[dict]):
    """Rows as LightRFT gets them: written to parquet and read back."""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return blending_datasets(str(tmp_path), "1.0", return_eval=False)


def make_dataset(processor, rows, max_length: int = 512, **kwargs) -> AudioPromptDataset:
    return AudioPromptDataset(rows, processor.tokenizer, processor, max_length, STRATEGY, **kwargs)


# ------------------------------------------------------------------------------------------------------------ rendering
def test_parquet_gives_every_part_every_key_and_the_question_survives(processor, tmp_path, clip_path):
    rows = through_parquet(tmp_path, [make_row(clip_path, "Which animal barks?")])
    text_part = rows[0]["prompt"][0]["content"][1]
    assert text_part["audio_url"] is None  # the trap: the key is there
    prompt = render_chat(processor, rows[0]["prompt"])
    assert prompt.count("<|AUDIO|>") == 1
    assert prompt.count("Which animal barks?") == 1
    assert prompt.endswith("<|im_start|>assistant\n")
    # and the trap is real: without the cleaning the template takes the text for a second audio
    trapped = processor.apply_chat_template(rows[0]["prompt"], tokenize=False, add_generation_prompt=True)
    assert trapped.count("<|AUDIO|>") == 2
    assert "Which animal barks?" not in trapped


def test_rendering_changes_nothing_else(processor):
    messages = [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": [{"type": "audio", "audio_url": "a.wav"}, {"type": "text", "text": "What?"}]},
    ]
    expected = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_chat(processor, messages) == expected
    assert "Listen." in expected


# --------------------------------------------------------------------------------------------------------------- checks
def test_items_and_batches(processor, tmp_path, clip_path):
    dataset = make_dataset(
        processor, through_parquet(tmp_path, [make_row(clip_path), make_row(None, "Two and two?", "4")])
    )
    with_audio, text_only = dataset[0], dataset[1]
    np.testing.assert_array_equal(with_audio[1][0], noise(RATE))
    assert with_audio[2:] == ("dog", "avqa_rule")
    assert text_only[1] is None
    assert "<|AUDIO|>" not in text_only[0]
    prompts, audio, references, labels = dataset.collate_fn([with_audio, text_only])
    assert prompts == [with_audio[0], text_only[0]]
    assert audio[0] is with_audio[1]
    assert audio[1] is None
    assert references == ["dog", "4"]
    assert labels == ["avqa_rule"] * 2
    assert all(isinstance(values, list) for values in (prompts, audio, references, labels))


def bad_reference(reference):
    return lambda path: make_row(path, reference=reference)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: make_row(path.replace("clip", "gone")), r"gone\.wav: does not exist"),
        (lambda path: make_row("sounds/clip.wav"), r"sounds/clip\.wav: is relative"),
        (bad_reference(""), "row 1: the reference answer is ''"),
        (bad_reference("  "), "row 1: the reference answer is '  '"),
        (bad_reference(None), "row 1: the reference answer is None"),
        (lambda path: make_row(path, "word " * 600), r"row 1: \d+ prompt tokens, more than --prompt_max_len 512"),
        (lambda path: make_row(path, "x<|im_end|>\n<|im_start|>assistant\ny"), "row 1: .* cannot hold turn markers"),
        (lambda path: make_row(path, "<|AUDIO|>?"), "row 1: 2 audio placeholders for 1 clips"),
        (lambda path: {**make_row(path), "audio_path": None}, "row 1: 1 audio placeholders for 0 clips"),
        (lambda path: {**make_row(None), "audio_path": path}, "row 1: 0 audio placeholders for 1 clips"),
    ],
    ids=["missing", "relative", "empty", "blank", "none", "long", "turn", "placeholder", "no_clip", "no_placeholder"],
)
def test_a_row_that_cannot_be_used_is_named(processor, tmp_path, clip_path, make, message):
    rows = through_parquet(tmp_path, [make_row(clip_path), make(clip_path)])
    with pytest.raises(DataError, match=message):
        make_dataset(processor, rows)


def test_all_problems_are_counted_and_the_first_named(processor, tmp_path):
    rows = [make_row(str(tmp_path / f"gone{i:02}.wav"), reference="") for i in range(15)]
    with pytest.raises(DataError) as error:
        make_dataset(processor, through_parquet(tmp_path, rows))
    message = str(error.value)
    assert "30 problems in 15 rows" in message
    assert "row 14: the reference" in message
    assert "gone04.wav" in message
    assert "gone05.wav" not in message
    assert "... and 10 more" in message


def test_no_rows_are_refused(processor):
    columns = {"prompt": [], "audio_path": [], "reference": [], "label": []}
    with pytest.raises(DataError, match="the data has no row"):
        make_dataset(processor, columns)


def test_avqa_leaves_out_what_training_refuses(processor, tiny_model, tmp_path, clip_path):
    """Control tokens in question or choices, and prompts of one token too many."""
    fine = ["What?", "Is it </answer><answer>bell</answer>?", "What {choices} %s <|endoftext|>?", "word " * 100]
    turn = "x<|im_end|>\n<|im_start|>assistant\ny"
    bad = ["A <|AUDIO|>?", "<|audio_bos|><|AUDIO|><|audio_eos|>?", turn, "word " * 101]
    rows = [(question, ["dog", "cat"]) for question in fine + bad] + [("What then?", ["dog", "<|AUDIO|>"])]
    trained = [make_row(clip_path, render_prompt(question, choices, False)) for question, choices in rows]
    limit = len(processor.tokenizer(render_chat(processor, trained[3]["prompt"]))["input_ids"])
    refused = []
    for i, row in enumerate(trained):
        try:
            make_dataset(processor, through_parquet(tmp_path, [row]), max_length=limit)
        except DataError:
            refused.append(i)
    assert refused == list(range(len(fine), len(rows)))

    fields = {"answer": 0, "audio_path": clip_path}
    lines = [
        json.dumps({"id": i, "question_text": question, "multi_choice": choices} | fields)
        for i, (question, choices) in enumerate(rows)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    paths = ("--input_jsonl", tmp_path / "rows.jsonl", "--audio_dir", tmp_path, "--local_save_dir", tmp_path / "out")
    model = ("--pretrain", tiny_model, "--prompt_max_len", limit)
    assert avqa.main([str(word) for word in (*paths, *model)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [problem["id"] for problem in report["problems"]] == refused
    assert report["rows"]["bad_by_reason"] == {"control_token": 4, "prompt_too_long": 1}
    assert len(make_dataset(processor, blending_datasets(str(tmp_path / "out"), "1.0", return_eval=False), limit)) == 4


def test_several_ranks_share_the_check_and_all_see_every_problem(processor, tmp_path, monkeypatch):
    import audio_dataset

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # DeepSpeed sets it for the tests before
    paths = [str(tmp_path / f"gone{i}.wav") for i in range(3)]
    rows = through_parquet(tmp_path, [make_row(path) for path in paths])
    probed = []
    probe_all = lambda mine, reader: probed.extend(mine) or [f"mine {p}" for p in mine]  # noqa: E731
    monkeypatch.setattr(audio_dataset, "probe_all", probe_all)

    def all_gather_object(shares, value):
        shares[:] = [[("node", "of rank 0")], value]

    fake = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "get_rank": lambda: 1}
    for name, function in {**fake, "all_gather_object": all_gather_object}.items():
        monkeypatch.setattr(audio_dataset.dist, name, function)
    with pytest.raises(DataError, match=r"(?s)2 problems.*of rank 0.*mine .*gone1"):
        make_dataset(processor, rows)
    assert probed == [paths[1]]


# ----------------------------------------------------------------------------------------------------------- extraction
def make_wave(kind: str, samples: int) -> np.ndarray:
    wave = noise(samples, seed=samples)
    if kind == "silence":
        return np.zeros_like(wave)
    if kind == "loud_end":  # sound up to the last sample, which the guard rows hear
        wave[:-200] *= 1e-4
        wave[-1] = 1.0
    if kind == "click":  # the loudest frame decides how far the quiet ones are lifted
        wave *= 1e-3
        wave[samples // 2] = 1.0
    return wave


@pytest.mark.parametrize("kind", ["noise", "silence", "loud_end", "click"])
@pytest.mark.parametrize(
    "samples",
    # one audio token, around a frame's border, around 30 s with and without room for the guard rows, beyond 30 s
    [321, 480, 481, 1600, 15999, 16000, 16001, 160000, 479279, 479679, 479680, 479839, 479841, 480000, 480001, 640000],
)
def test_extraction_equals_the_extractor_padded_to_30_s(audio_processor, processor, kind, samples):
    wave = make_wave(kind, samples)
    full = processor.feature_extractor(wave, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
    mel, frames = full["input_features"][0], int(full["attention_mask"].sum())
    (rows,), tokens = audio_processor.extract((wave, RATE))
    assert rows.shape == (frames + 2, 128)
    assert tokens == audio_token_count(frames)
    kept = min(frames + 2, 3000)
    assert kind != "silence" or torch.equal(audio_processor.silence(rows)[:kept], rows[:kept])
    # the same arithmetic on another width: a matrix product may add up in another order
    torch.testing.assert_close(rows[:kept], mel[:, :kept].T, rtol=0, atol=1e-6)
    assert not rows[kept:].any()


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ((noise(RATE), 44_100), "audio at 44100 Hz; 16000 Hz are needed"),
        ((np.full(RATE, np.nan, np.float32), RATE), "not a vector of finite samples"),
        ((np.full(RATE, np.inf, np.float32), RATE), "not a vector of finite samples"),
        ((noise(RATE).reshape(2, -1), RATE), r"shape \(2, 8000\)"),
        ((noise(320), RATE), "2 valid mel frames"),
    ],
    ids=["rate", "nan", "inf", "stereo", "short"],
)
def test_extraction_refuses(audio_processor, audio, message):
    with pytest.raises(ValueError, match=message):
        audio_processor.extract(audio)


# ------------------------------------------------------------------------------------------------------------- batching
def prompt_of(processor, audio: bool, question: str = "What is it?") -> str:
    return render_chat(processor, make_row("a.wav" if audio else None, question)["prompt"])


def process(audio_processor, prompts, audio, n=1, references=None, images_num=None):
    return audio_processor.process_multimodal_batch(prompts, audio, references, images_num, n)


@pytest.mark.parametrize("samples", [321, 1_000, 16_000, 16_161, 100_003, 479_999, 480_000, 640_000])
def test_token_expansion_is_the_processors_own(audio_processor, processor, samples):
    wave, prompt = noise(samples), prompt_of(processor, True)
    out = process(audio_processor, [prompt], [(wave, RATE)])
    expected = processor(text=[prompt], audio=[wave], sampling_rate=RATE, return_tensors="pt")
    assert out["all_prompt_token_ids"] == expected["input_ids"].tolist()
    assert out["all_images_grid_thw"].tolist() == [[1, 1, int(expected["feature_attention_mask"].sum()) + 2]]


def test_a_mixed_batch_repeats_everything_n_times_next_to_each_other(audio_processor, processor):
    prompts = [prompt_of(processor, True), prompt_of(processor, False, "Two and two?"), prompt_of(processor, True)]
    audio = [(noise(8_000), RATE), None, (noise(16_000), RATE)]
    out = process(audio_processor, prompts, audio, n=2, references=["a", "b", "c"], images_num=[1, 0, 1])
    ids = out["all_prompt_token_ids"]
    assert len(ids) == 6
    assert ids[0] == ids[1] != ids[4]
    assert ids[2] == processor.tokenizer(prompts[1])["input_ids"]
    # 8,000 samples are 50 frames, 25 after the convolution, 12 tokens; 16,000 are 100, 50, 25
    assert [row.count(audio_processor.audio_token_id) for row in ids] == [12, 12, 0, 0, 25, 25]
    assert out["all_prompts"] == [prompts[0]] * 2 + [prompts[1]] * 2 + [prompts[2]] * 2
    assert [None if clip is None else len(clip[0]) for clip in out["all_images"]] == [
        8_000, 8_000, None, None, 16_000, 16_000,
    ]  # fmt: skip
    assert out["all_images_num"] == [1, 1, 0, 0, 1, 1]
    assert out["all_references"] == ["a", "a", "b", "b", "c", "c"]
    assert out["all_images_grid_thw"].tolist() == [[1, 1, 52]] * 2 + [[1, 1, 102]] * 2
    (short,), (long,) = (audio_processor.extract(clip)[0] for clip in (audio[0], audio[2]))
    assert torch.equal(out["all_images_pixel_values"], torch.cat([short, short, long, long]))
    assert out["all_videos"] == [None] * 6
    assert out["all_videos_num"] == [0] * 6
    assert out["all_videos_pixel_values"] is None
    assert out["all_videos_grid_thw"].shape == (0, 3)


def test_the_mapping_has_lightrfts_keys(audio_processor, processor):
    out = process(audio_processor, [prompt_of(processor, False)], None)
    assert set(out) == {
        "all_prompt_token_ids", "all_prompts", "all_images", "all_videos", "all_images_num", "all_videos_num",
        "all_images_pixel_values", "all_videos_pixel_values", "all_images_grid_thw", "all_videos_grid_thw",
        "all_references",
    }  # fmt: skip
    assert out["all_images_pixel_values"] is None
    assert out["all_images_grid_thw"].shape == (0, 3)
    assert out["all_images"] == [None]
    assert out["all_references"] is None


@pytest.mark.parametrize("n", [1, 8])
def test_the_mel_of_a_clip_is_computed_once(audio_processor, processor, monkeypatch, n):
    widths = []
    compute = WhisperFeatureExtractor._torch_extract_fbank_features
    monkeypatch.setattr(
        WhisperFeatureExtractor,
        "_torch_extract_fbank_features",
        lambda self, wave, *rest: widths.append(wave.shape[-1]) or compute(self, wave, *rest),
    )
    short, long = (noise(8_000), RATE), (noise(16_000), RATE)
    out = process(audio_processor, [prompt_of(processor, True)] * 3, [short, long, (short[0], RATE)], n=n)
    assert len(widths) == 2  # the third prompt is about the first one's file
    assert max(widths) < 2 * RATE  # and of a second of sound, not of 30
    first, _, third = out["all_images_pixel_values"].split([52 * n, 102 * n, 52 * n])
    assert torch.equal(first, third)


@pytest.mark.parametrize(
    ("audio", "images_num", "prompt_max_len", "message"),
    [
        ([None], None, 512, "prompt 0 holds 1 audio placeholders for 0 clips"),
        ([(noise(RATE), RATE)], [0], 512, r"images_num says \[0\] windows per prompt, but there are \[1\]"),
        ([(noise(RATE), RATE)], None, 10, r"prompt 0 has \d+ tokens, more than 10"),
    ],
    ids=["no_clip", "images_num", "long"],
)
def test_batches_that_do_not_fit_are_refused(processor, audio, images_num, prompt_max_len, message):
    small = AudioMultimodalProcessor(processor.tokenizer, processor, prompt_max_len)
    with pytest.raises(DataError, match=message):
        process(small, [prompt_of(processor, True)], audio, images_num=images_num)


def test_videos_are_refused(audio_processor, processor):
    with pytest.raises(DataError, match="no videos"):
        audio_processor.process_multimodal_batch([prompt_of(processor, False)], [None], None, None, 1, ["a.mp4"])
