"""The evaluation, from the questions' file to the scores: what is asked, what is kept, what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import eval_mmau
import numpy as np
import pytest
import soundfile
import torch
import train_colocate
from conftest import EXAMPLE, NO_WEIGHTS, run_script, wait_for
from safetensors.torch import load_file, save_file
from support.rollouts import perturbed

from aqa.common.lock import lock
from aqa.data.prompts import render_chat, render_prompt
from aqa.evaluation import engines
from aqa.evaluation.benchmarks import MMAR, MMAU
from aqa.evaluation.checkpoints import Model, resolve_model
from aqa.evaluation.items import EvalError, PartialFile, find_audio, make_items, read_rows, result_rows, write_rows

TOKENS = ("--max_new_tokens", 12)


def run_main(capsys, *args: object) -> tuple[int, str]:
    """Exit status and all output of the script, in this process."""
    status = eval_mmau.main(list(map(str, args)))
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def evaluate(capsys, *args: object) -> str:
    """All output of an evaluation that succeeds."""
    status, text = run_main(capsys, *args)
    assert status == 0, text
    return text


@pytest.fixture
def questions(demo_data, tmp_path):
    """A file of six questions, one of them with a clip longer than the rest."""
    rows = json.loads((demo_data / "demo-test.json").read_text())[:6]
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", 0.1 * rng.standard_normal(16_000 * 4), 16_000)
    rows[3]["audio_id"] = str(tmp_path / "long.wav")
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_right_answer_that_is_too_long_is_warned_of(flags, tmp_path, capfd):
    flags = [*flags, "--out_file", tmp_path / "out.json", "--limit", 1]
    title = "WARNING: 1 right answers, in their tags, take more tokens than --max_new_tokens 2, such as "
    assert title in evaluate(capfd, *flags, "--max_new_tokens", 2)
    assert title[:9] not in evaluate(capfd, *flags, *TOKENS, "--overwrite")


@pytest.fixture
def flags(tiny_model, demo_data, questions):
    """Flags of an evaluation of the six questions, but for the result file."""
    return (*("--model_path", tiny_model, "--data_file", questions, "--audio_dir", demo_data), *TOKENS)


# ------------------------------------------------------------------------------------------------------------ questions


def test_formats_are_told_apart_by_content(tmp_path):
    mmau, mmar = ({name: "x", "id": 1, "question": "?"} for name in ("audio_id", "audio_path"))
    path = tmp_path / "no_suffix"
    for text, expected in (
        (json.dumps([mmau, mmau], indent=1), MMAU),
        (json.dumps(mmar) + "\n" + json.dumps(mmar), MMAR),
        (json.dumps([mmar]), MMAR),
    ):
        path.write_text(text)
        benchmark, rows = read_rows(path)
        assert benchmark is expected
        assert rows[0] == (mmau if expected is MMAU else mmar)
    path.write_text(json.dumps([mmar]))
    assert read_rows(path, "mmau")[0] is MMAU  # --benchmark outranks the content
    path.write_text(json.dumps([{"audio_id": "x", "choices": ["a"], "answer": "a", "model_output": "a"}]))
    assert read_rows(path)[0] is MMAU  # answers are scored without their questions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"audio_id": "x"}', "line 1.*not closed"),
        ('{"audio_path": "x"}\n{"audio_path": \n', "1 of 2 rows.*(?s:.*)line 2"),
        ("[1, 2]", "is no JSON object"),
        ("[]", "no rows"),
        ('[{"id": 1, "question": "?"}]', "cannot tell the benchmark.*fields are id, question.*--benchmark"),
        ('{"qestion_text": "?", "multi_choice": ["a"], "audio_path": "x"}', "fields are qestion_text.*question_text"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, message):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(EvalError, match=message):
        read_rows(path)


def test_all_unusable_questions_are_named(tmp_path):
    good = {"id": "g", "question": "?", "choices": ["a"], "audio_id": "x.wav", "answer": "a"}
    rows = [good, good | {"choices": "a"}, good | {"question": ""}, good | {"audio_id": None}, good | {"answer": None}]
    with pytest.raises(EvalError) as caught:
        make_items(rows, MMAU, tmp_path, False)
    message = str(caught.value)
    assert message.startswith("4 of 5 questions")
    for i, part in enumerate(("choices is 'a'", "question is ''", "audio_id is None", "answer is None"), start=2):
        assert f"item {i} (id g): {part}" in message


def test_recordings_are_found_by_path_or_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.wav", "b.wav"):
        (tmp_path / name).touch()
    assert find_audio("./sub/a.wav", tmp_path) == tmp_path / "sub/a.wav"
    assert find_audio("./sub/b.wav", tmp_path) == tmp_path / "b.wav"
    assert find_audio(str(tmp_path / "b.wav"), Path("/elsewhere")) == tmp_path / "b.wav"
    for name in ("a.wav", "c/a.wav"):  # two of a name
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_audio("/where/it/was/sub/a.wav", tmp_path) == tmp_path / "sub/a.wav"
    assert find_audio("./sub/none.wav", tmp_path) == tmp_path / "sub/none.wav"


# -------------------------------------------------------------------------------------------------------------- results
def test_result_rows_keep_everything(tmp_path):
    row = {"id": 1, "question": "\u72ac?", "choices": ["a"], "answer": "a"}
    row |= {"audio_path": "x", "audio_id": "y", "extra": [1]}
    for benchmark, added in (
        (MMAU, {"model_prediction": "A", "model_output": "A", "raw_output": "B"}),
        (MMAR, {"answer_prediction": "A", "thinking_prediction": "B", "raw_output": "B"}),
    ):
        items = make_items([row], benchmark, tmp_path, False)
        results = result_rows(items, [("A", "B")], benchmark, silent_audio=False)
        assert results == [row | added]
        for name in ("out.json", "out.jsonl"):
            write_rows(results, tmp_path / name)
            text = (tmp_path / name).read_bytes().decode("ascii")  # readable in any locale
            assert (json.loads(text) if name == "out.json" else [json.loads(text)]) == results
        silent = result_rows(items, [("A", "B")], benchmark, silent_audio=True)
        assert silent == [row | added | {"silent_audio": True}]


def test_a_torn_partial_file_loses_its_last_line_only(tmp_path):
    """Cut at every byte, the file loads what is whole, and takes further lines."""
    source = PartialFile(tmp_path / "whole", {"engine": "hf", "model": ["a", "b 1"]})
    source.append([(0, "a\n\u72ac"), (1, "")])
    source.append([(7, "c")])
    whole = source.path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        torn = PartialFile(tmp_path / "torn", source.identity)
        torn.path.write_bytes(whole[:cut])
        finished = torn.load()
        assert finished == dict(list({0: "a\n\u72ac", 1: "", 7: "c"}.items())[: max(0, sum(e < cut for e in ends) - 1)])
        torn.append([(9, "new")])
        assert torn.load() == finished | {9: "new"}


def test_a_partial_file_of_other_settings_is_refused(tmp_path):
    PartialFile(tmp_path / "p", {"engine": "hf", "think": False}).append([(0, "a")])
    with pytest.raises(EvalError, match=r"1 responses(?s:.*)engine: 'hf' then, 'vllm' now(?s:.*)--overwrite"):
        PartialFile(tmp_path / "p", {"engine": "vllm", "think": False}).load()


def test_responses_of_another_model_in_a_partial_file_are_refused(tmp_path):
    """Both models' evaluations had the file open at once: the head is the first one's, a line the second one's."""
    first, second = (PartialFile(tmp_path / "p", {"model": [name]}) for name in "ab")
    first.append([(0, "bell")])
    second.append([(1, "rain")])
    first.append([(2, "horn")])
    with pytest.raises(EvalError, match=r"p: damaged: 1 of 3 responses are of another model .*index 1.*--overwrite"):
        first.load()
    head, *lines = map(json.loads, (tmp_path / "p").read_text().splitlines())
    lines = [head, *({"index": line["index"], "raw_output": line["raw_output"]} for line in lines)]
    (tmp_path / "p").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(EvalError, match=r"p: an earlier version wrote it, .*; give --overwrite"):
        first.load()


def test_a_second_evaluation_into_the_same_file_is_refused(tmp_path, flags, questions, capsys):
    out = tmp_path / "out.json"
    with lock(tmp_path / "out.lock", "the first"):
        status, text = run_main(capsys, *flags, "--data_file", questions, "--out_file", out, "--overwrite")
    assert status == 2 and f"--out_file {out} is in use by process {os.getpid()}" in text
    assert not out.exists() and not out.with_suffix(".partial.jsonl").exists()


# --------------------------------------------------------------------------------------------------------------- models
def make_folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    whole = ("config.json", "model.safetensors", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
    for name in names or whole:
        (path / name).write_bytes(NO_WEIGHTS if name.endswith(".safetensors") else b"{}")
    return path


def test_a_run_resolves_to_its_final_model_or_newest_checkpoint(tmp_path):
    run = tmp_path / "run"
    for step in (2, 10, 9):
        make_folder(run / f"hf_step_{step:06d}")
    make_folder(run / "hf_step_000011", "config.json")  # the save was interrupted
    make_folder(run / "_actor", "latest")
    model = resolve_model(str(run))
    assert model.path == str(run / "hf_step_000010")
    assert "hf_step_000010 (hf_step_000011 left out as incomplete)" in model.note
    make_folder(run)
    assert resolve_model(str(run)).path == str(run)
    sessions = [{"how": "finished", "last_step": 9}, {"how": "SIGTERM", "last_step": 11}]  # it was extended
    (run / "run_config.json").write_text(json.dumps({"sessions": sessions}))
    model = resolve_model(str(run))
    assert model.path == str(run / "hf_step_000010")
    assert "hf_step_000010, newer than its final model of step 9" in model.note
    (run / "run_config.json").write_text(json.dumps({"sessions": [{"how": "finished", "last_step": 10}]}))
    assert resolve_model(str(run)).path == str(run)
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (run / "model.safetensors.index.json").write_text(json.dumps(shards))
    (run / "model-1.safetensors").touch()  # the second is missing: not the final model yet
    assert resolve_model(str(run)).path == str(run / "hf_step_000010")


def test_what_is_no_model_is_explained(tmp_path):
    make_folder(tmp_path / "ds/_actor", "latest")
    make_folder(tmp_path / "ours/_actor/step_000001", "manifest.json")
    make_folder(tmp_path / "known/_actor/step_000001", "manifest.json")
    (tmp_path / "known/run_config.json").write_text('{"flags": {"pretrain": "start"}}')
    make_folder(tmp_path / "torn/hf_step_000001", "config.json")
    make_folder(tmp_path / "bare", "config.json", "model.safetensors", "tokenizer_config.json")
    make_folder(tmp_path / "whole")
    make_folder(tmp_path / "lora", "adapter_config.json")
    for path, message in (
        ("ours", r"(?s)for resuming.*export_checkpoint.py --checkpoint .*ours/_actor --pretrain START_MODEL"),
        ("known/_actor", r"--pretrain start --out .*known/_actor_exported"),
        ("ds", "DeepSpeed checkpoint of LightRFT(?s:.*)--load_checkpoint"),
        ("torn", r"hf_step_000001 lacks \*.safetensors"),
        ("bare", "processor_config.json .copy it from the start model"),
    ):
        with pytest.raises(EvalError, match=message):
            resolve_model(str(tmp_path / path))
    make_folder(tmp_path / "lora", "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    lora = resolve_model(str(tmp_path / "lora"), str(tmp_path / "whole"))
    assert (lora.path, lora.adapter) == (str(tmp_path / "whole"), str(tmp_path / "lora"))
    assert resolve_model("Qwen/Qwen2-Audio-7B-Instruct").path == "Qwen/Qwen2-Audio-7B-Instruct"


def test_vllm_refuses_weights_that_it_cannot_load(tiny_model, tmp_path):
    """What zero_to_fp32.py writes has the live modules' names; vLLM dies of them with a page of parameter names."""
    weights = load_file(tiny_model / "model.safetensors")
    assert engines.weight_names(tiny_model) == sorted(weights)
    save_file({f"model.{name}": tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    model, settings = Model(str(tmp_path), str(tiny_model)), engines.Settings(4, 4, "float32")
    with pytest.raises(EvalError, match=r"model\.audio_tower.*--engine hf can"):
        engines.VLLMEngine(model, None, settings, [], 1)


def test_other_orders_and_silence_are_asked_beside(tmp_path, flags, tiny_model, demo_data, questions, capsys):
    """As transformers answers the question with its options in that order, worked out here; silence in a file."""
    rows = json.loads(questions.read_text())
    out = tmp_path / "out.json"
    evaluate(capsys, *flags, "--out_file", out, "--option_orders", 3, "--silent_audio", "also")
    results = json.loads(out.read_text())
    for k in range(3):
        moved = [row | {"choices": row["choices"][k:] + row["choices"][:k]} for row in rows]
        said = [row["option_orders"][k] for row in results]
        assert [each["raw_output"] for each in said] == plain_answers(tiny_model, moved, demo_data)
        for row, there, each in zip(rows, moved, said, strict=True):
            assert [row["choices"][i] for i in each["order"]] == there["choices"]
            assert each["prediction"] in row["choices"]
    for row in rows:
        samples, rate = soundfile.read(find_audio(row["audio_id"], demo_data))
        row["audio_id"] = str(tmp_path / f"silence_{row['id']}.wav")
        soundfile.write(row["audio_id"], 0 * samples, rate)
    heard_nothing = [row["in_silence"]["raw_output"] for row in results]
    questions.write_text(json.dumps(rows))
    evaluate(capsys, *flags, "--out_file", tmp_path / "silent.json")
    assert heard_nothing == [row["raw_output"] for row in json.loads((tmp_path / "silent.json").read_text())]
    status, text = run_main(capsys, *flags, "--out_file", tmp_path / "more.json", "--option_orders", 99)
    assert status == 2 and "--option_orders 99: the questions have at most 4 options" in text


def test_an_adapter_is_merged_times_its_scale(tiny_model, tmp_path):
    """W + scale * alpha / r * B A (Hu et al. 2021, section 4.1), in transformers and in the folder that vLLM loads."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2AudioForConditionalGeneration

    base = Qwen2AudioForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    (name,) = [name for name in before if name.endswith("layers.0.self_attn.q_proj.weight") and "language" in name]
    adapted = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=[name.removesuffix(".weight")]))
    a, b = (p for n, p in adapted.named_parameters() if "lora_" in n)
    torch.nn.init.normal_(b)
    adapted.save_pretrained(tmp_path)
    settings = engines.Settings(max_new_tokens=4, batch_size=4, dtype="float32")
    for scale in (0.0, 0.5, 1.0):
        model = resolve_model(str(tmp_path), str(tiny_model), scale)
        weights = dict(engines.load_model(model, settings, "cpu").named_parameters())
        expected = before | {name: before[name] + scale * 6 / 2 * b @ a}
        torch.testing.assert_close(weights, expected)
        assert (scale == 1) == (model.identity() == resolve_model(str(tmp_path), str(tiny_model)).identity())
    processor = engines.load_processor(model)
    with engines.merged(resolve_model(str(tmp_path), str(tiny_model), 0.5), processor, settings) as folder:
        assert engines.weight_names(Path(folder.path)) == engines.weight_names(tiny_model)
        whole = dict(engines.load_model(folder, settings, "cpu").named_parameters())
        torch.testing.assert_close(whole, before | {name: before[name] + 1.5 * b @ a})
        assert type(engines.load_processor(folder)) is type(processor)
    assert not Path(folder.path).exists()
    with pytest.raises(EvalError, match=r"--lora_scale 2.0: .* is a whole model"):
        resolve_model(str(tiny_model), lora_scale=2.0)


# ------------------------------------------------------------------------------------------------------------- refusals
def test_settings_that_cannot_be_used_end_with_a_message_before_any_model_is_loaded(
    tmp_path, flags, demo_data, capsys, monkeypatch
):
    monkeypatch.setattr("aqa.evaluation.asking.ask", lambda *_, **_kw: pytest.fail("a model would have been loaded"))
    out = tmp_path / "out.json"
    for more, message in (
        (("--out_file", out, "--batch_size", 0, "--limit", -1), r"settings(?s:.*)--batch_size 0(?s:.*)--limit -1"),
        (("--out_file", tmp_path / "out.jsonl"), "the only format that MMAU's script reads"),
        (("--out_file", out, "--tensor_parallel_size", 2, "--engine", "hf"), "only --engine vllm"),
    ):
        status, text = run_main(capsys, *flags, *more)
        assert status == 2
        assert text.startswith("error: ")
        assert re.search(message, text), text
        assert not out.exists()


def test_unusable_audio_stops_the_run_or_counts_as_wrong(tmp_path, flags, questions, capsys):
    rows = json.loads(questions.read_text())
    (tmp_path / "empty.wav").touch()
    rows[1]["audio_id"], rows[4]["audio_id"] = "missing.wav", str(tmp_path / "empty.wav")
    questions.write_text(json.dumps(rows))
    out = tmp_path / "out.json"
    status, text = run_main(capsys, *flags, "--out_file", out)
    assert status == 2
    assert "2 of 6 items" in text
    assert re.search(r"item 2 \(id test_00001\): .*missing.wav: does not exist", text)
    assert re.search(r"item 5 \(id test_00004\): .*empty.wav: is empty", text)
    assert not out.exists()

    text = evaluate(capsys, *flags, "--out_file", out, "--skip_bad_audio")
    right = json.loads(out.with_suffix(".score.json").read_text())["correct"]
    assert f"because of their recordings: 2; of the 4 that were asked {right / 4:.2%}".replace("%", " %") in text
    results, scores = json.loads(out.read_text()), json.loads(out.with_suffix(".score.json").read_text())
    assert [row["model_prediction"] == "" for row in results] == [False, True, False, False, True, False]
    assert scores["total"] == 6
    assert scores["bad_audio"] == ["test_00001", "test_00004"]


# ----------------------------------------------------------------------------------------------------------- evaluation
def plain_answers(model: Path, rows: list[dict], audio_dir: Path) -> list[str]:
    """What transformers alone says, one question after another: the reference for everything that is done faster."""
    from transformers import AutoProcessor, GenerationConfig, Qwen2AudioForConditionalGeneration

    from aqa.audio.decode import load_audio

    processor = AutoProcessor.from_pretrained(model)
    network = Qwen2AudioForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = processor.tokenizer
    network.generation_config = GenerationConfig(
        max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    answers = []
    for row in rows:
        text = render_prompt(row["question"], row["choices"], False)
        content = [{"type": "audio", "audio_url": "x"}, {"type": "text", "text": text}]
        inputs = processor(
            text=render_chat(processor, [{"role": "user", "content": content}]),
            audio=load_audio(find_audio(row["audio_id"], audio_dir)),
            sampling_rate=16_000,
            return_tensors="pt",
        )
        with torch.inference_mode():
            tokens = network.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return answers


def test_batches_answer_as_transformers_does_one_by_one(tmp_path, flags, tiny_model, demo_data, questions, capsys):
    rows = json.loads(questions.read_text())
    expected = plain_answers(tiny_model, rows, demo_data)
    for batch_size in (1, 4, 32):
        out = tmp_path / f"batch{batch_size}.json"
        text = evaluate(capsys, *flags, "--out_file", out, "--batch_size", batch_size)
        results = json.loads(out.read_text())
        assert [row["raw_output"] for row in results] == expected
    assert all(re.fullmatch("<answer>.*</answer>", raw) for raw in expected)
    for row, result in zip(rows, results, strict=True):
        assert {key: result[key] for key in row} == row
        assert result["model_prediction"] == result["model_output"] == result["raw_output"][8:-9]
    scores = json.loads(out.with_suffix(".score.json").read_text())
    right = sum(row["answer"] == row["model_output"] for row in results)
    assert (scores["correct"], scores["total"], scores["accuracy"]) == (right, 6, right / 6)
    assert scores["by"]["task"]["sound"]["correct"] == right
    assert f"{right * 100 / 6:.2f} %" in text
    assert not list(tmp_path.glob("*.partial.jsonl"))
    assert run_main(capsys, "score", out)[1].count(f"{right * 100 / 6:.2f} %") >= 2
    assert "+0.00" in run_main(capsys, "compare", tmp_path / "batch1.json", out)[1]


def test_a_question_about_several_recordings(tiny_model, demo_data):
    """As transformers alone answers it, with Qwen2-Audio's processor; beside a question about one of them."""
    model = Model(str(tiny_model), str(tiny_model))
    processor = engines.load_processor(model)
    settings = engines.Settings(max_new_tokens=8, batch_size=4, dtype="float32")
    engine = engines.HFEngine(model, processor, settings)
    perturbed(engine, 0.1)  # a small change of sound or text changes the answers
    files = sorted((demo_data / "test-audios").glob("*.wav"))[:3]
    jobs = []
    for index, heard in enumerate((files, files[:1])):
        waves = engines.Job(0, "", heard, []).load()
        text = engines.render(processor, "Which is the longest?", len(heard))
        jobs.append(engines.Job(index, text, heard, list(map(len, waves))))
    expected = {}
    for job in jobs:
        inputs = processor(text=job.text, audio=job.load(), sampling_rate=16_000, return_tensors="pt")
        assert engines.longest_prompt(processor, [job]) == inputs["input_ids"].shape[1]
        tokens = engine.model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        expected[job.index] = [engines.decode(processor, tokens.tolist())]
    assert dict(pair for part in engine.answer(jobs, set()) for pair in part) == expected
    assert expected[0] != expected[1]


def test_silence_is_marked_everywhere(tmp_path, flags, capsys, monkeypatch):
    heard = []
    load = engines.Job.load
    monkeypatch.setattr(engines.Job, "load", lambda job: heard.append((job, load(job))) or heard[-1][1])
    out = tmp_path / "silent.json"
    text = evaluate(capsys, *flags, "--out_file", out, "--silent_audio")
    assert len(heard) == 6
    assert all(not wave.any() and [len(wave)] == job.samples > [1000] for job, (wave,) in heard)
    assert text.count("ABLATION") == 2
    assert all(row["silent_audio"] for row in json.loads(out.read_text()))
    assert json.loads(out.with_suffix(".score.json").read_text())["silent_audio"] is True
    assert "silence in place of every clip" in run_main(capsys, "compare", out, out)[1]


def test_training_refuses_lengths_beyond_the_positions_too(tiny_model):
    """30 s are 750 tokens, and 512 + 750 + 786 = 2,048 is what the model has."""
    args = SimpleNamespace(pretrain=str(tiny_model), prompt_max_len=512, audio_seconds=30.0, generate_max_len=786)
    args.limit_mm_image_per_prompt = 1
    train_colocate.refuse_beyond_positions(args)
    args.generate_max_len += 1
    with pytest.raises(SystemExit, match=r"--generate_max_len 787 make 2049 tokens, more than the model's 2048; lower"):
        train_colocate.refuse_beyond_positions(args)


def test_limit_think_and_files_without_answers(tmp_path, flags, questions, capsys):
    rows = json.loads(questions.read_text())
    for row in rows:
        del row["answer"]
    rows[2]["audio_id"] = "missing.wav"
    questions.write_text(json.dumps(rows))
    out = tmp_path / "out.json"
    status, text = run_main(capsys, *flags, "--out_file", out)
    assert status == 2 and "missing.wav: does not exist\n--skip_bad_audio skips them." in text
    flags = [*flags, "--skip_bad_audio"]
    status, text = run_main(capsys, *flags, "--out_file", out, "--max_new_tokens", 2048)
    assert status == 2 and "more than the model's 2048; lower that or --audio_seconds" in text
    text = evaluate(capsys, *flags, "--out_file", out, "--limit", 3, "--think", "--dtype", "bfloat16")
    assert "the file holds no answers (the first is None)" in text
    results = json.loads(out.read_text())
    for row in results:  # they are shown: a person asks for them
        assert f"{row['audio_id']!r}  {row['question']!r}  {row['model_output']!r}\n" in text
    assert [row["id"] for row in results] == ["test_00000", "test_00001", "test_00002"]
    named = sum(row["model_output"] in row["choices"] for row in results)
    assert f"answers that name one choice: {named}, in the asked-for form: " in text
    assert "of 2\nnot asked because of their recordings: 1\n" in text and "counted as wrong" not in text
    assert not out.with_suffix(".score.json").exists()


def test_mmar(tmp_path, flags, questions, capsys):
    """JSON lines in and out, MMAR's key and MMAR's breakdowns."""
    rows = json.loads(questions.read_text())
    for row in rows:
        row["audio_path"], row["modality"] = row.pop("audio_id"), row.pop("task")
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    evaluate(capsys, *flags, "--out_file", out)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(result) - set(row) for row, result in zip(rows, results, strict=True)] == [
        {"answer_prediction", "thinking_prediction", "raw_output"}
    ] * 6
    scores = json.loads((tmp_path / "out.score.json").read_text())
    assert (scores["benchmark"], scores["by"]["modality"]["sound"]["total"]) == ("mmar", 6)


def test_a_killed_run_continues_to_the_same_file(tmp_path, tiny_model, demo_data, capsys):
    """SIGKILL somewhere among the answers, a line torn in two, then the same command again, without --overwrite."""
    flags = ("--model_path", tiny_model, "--data_file", demo_data / "demo-test.json", "--audio_dir", demo_data, *TOKENS)
    flags = (*flags, "--batch_size", 2)
    evaluate(capsys, *flags, "--out_file", tmp_path / "whole.json")

    out = tmp_path / "killed.json"
    out.write_text("of an earlier run")
    partial = tmp_path / "killed.partial.jsonl"
    wanted = 1 + 2 * int(np.random.default_rng().integers(1, 6))  # the head, and one to five batches
    command = [sys.executable, EXAMPLE / "eval_mmau.py", *flags, "--out_file", out, "--overwrite"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= wanted, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert out.read_text() == "of an earlier run"
    kept = partial.read_bytes().count(b"\n") - 1
    with partial.open("ab") as file:
        file.write(b'{"index": 23, "raw_out')

    text = evaluate(capsys, *flags, "--out_file", out)
    assert f"continuing: {kept} answers" in text
    assert json.loads(out.with_suffix(".score.json").read_text())["run"]["asked"] == 24 - kept
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not partial.exists()


@pytest.fixture
def awkward_model(tiny_model, tmp_path):
    """The same model, but its defaults sample, and it would say the audio placeholder wherever it begins an answer."""
    folder = tmp_path / "awkward"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 5.0, "top_k": 50, "repetition_penalty": 5.0, "max_new_tokens": 2}
    (folder / "generation_config.json").write_text(json.dumps(config))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    head = weights["language_model.lm_head.weight"]
    head[tokenizer.convert_tokens_to_ids("<|AUDIO|>")] = 50 * head[tokenizer("<answer>")["input_ids"][0]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_vllm_and_hf_agree_whatever_the_checkpoints_defaults(
    tmp_path, flags, awkward_model, tiny_model, questions, demo_data, capsys
):
    """Both engines, one of them in a process of its own; with the real recording and its real question, if there."""
    rows = json.loads(questions.read_text())
    real = EXAMPLE.parents[2] / "shared" / "data" / "mmau"
    if (real / "mmau-test-mini.json").exists():
        row = json.loads((real / "mmau-test-mini.json").read_text())[0]
        rows.append(row | {"audio_id": str(find_audio(row["audio_id"], real).resolve())})
    questions.write_text(json.dumps(rows))
    evaluate(capsys, *flags, "--out_file", tmp_path / "plain.json")
    evaluate(capsys, *flags, "--model_path", awkward_model, "--out_file", tmp_path / "hf.json")
    vllm = ("--model_path", awkward_model, "--out_file", tmp_path / "vllm.json", "--engine", "vllm")
    done = run_script("eval_mmau.py", *flags, *vllm)
    results = {name: (tmp_path / f"{name}.json").read_bytes() for name in ("plain", "hf", "vllm")}
    assert results["plain"] == results["hf"]
    assert results["vllm"] == results["hf"]
    raw = [row["raw_output"] for row in json.loads(results["hf"])]
    assert all(re.fullmatch("<answer>.*</answer>", text) for text in raw[:6])
    # nothing of what vLLM prints
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith(("checking audio", "loading", "answering")) for line in lines), lines
