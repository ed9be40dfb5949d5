"""select_data.py and the flags that select by its rates: what is asked and refused, kept, written, and left out."""

import json
import math
import shlex
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import select_data
import torch
from datasets import Dataset
from support.training import train

from aqa.data.prompts import render_prompt
from aqa.data.selection import easy_first, select_rows
from aqa.evaluation import asking, engines, pass_rates
from aqa.evaluation.checkpoints import Model
from aqa.evaluation.items import EvalError, Item, PartialFile
from aqa.training.summary import held_out_files

RATES = {"pass_rate": [0.0, 1.0, 0.5, 0.5, 0.1, 0.9], "pass_rate_silent": [0.0, 0.25, 0.5, 0.75, 1.0, 0.25]}


def flags(pass_rate=None, silent=None, easy=False):
    args = {"pass_rate": pass_rate, "max_silent_pass_rate": silent, "easy_first": easy}
    return SimpleNamespace(**args, pretrain="model", prompt_split="train")


@pytest.mark.parametrize(
    ("asked", "left", "said"),
    [
        (flags(), [0, 1, 2, 3, 4, 5], ""),
        (flags([0.1, 0.9]), [2, 3, 4, 5], "4 rows; data: of 6 rows are left out: 1 too hard (right in less than 0.1), "
                                          "1 too easy (right in more than 0.9)"),
        (flags(silent=0.5), [0, 1, 2, 5], "4 rows; data: of 6 rows are left out: 2 right without sound (above 0.5)"),
        (flags([0.2, 1], 0.5), [1, 2, 5], "2 right without sound (above 0.5), 1 too hard"),  # row 4 counts once
    ],
)  # fmt: skip
def test_rows_are_left_out_and_counted(asked, left, said):
    lines = []
    rows = select_rows(Dataset.from_dict({"name": list(range(6))} | RATES), "data", asked, lines.append)
    assert list(rows["name"]) == left
    assert said in "".join(lines)


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ({"x": [1]}, flags([0, 1]), "data: has no column pass_rate; select_data.py measures it"),
        ({"pass_rate": [0.5]}, flags(silent=0.5), "has no column pass_rate_silent"),
        ({"pass_rate": [0.5, None]}, flags([0, 1]), "1 of 2 rows have no pass_rate from 0 to 1 .row 1: None"),
        ({"pass_rate": [math.nan]}, flags(easy=True), "1 of 1 rows have no pass_rate from 0 to 1"),
        ({"pass_rate": [0.0, 1.0]}, flags([0.1, 0.9]), "none is left: widen --pass_rate"),
    ],
)
def test_missing_rates_and_empty_selections_are_refused(columns, asked, message):
    with pytest.raises(SystemExit, match=message):
        select_rows(Dataset.from_dict(columns), "data", asked, print)


def test_easy_rows_come_first_and_equal_ones_keep_their_order():
    assert list(easy_first(Dataset.from_dict({"name": list("abcdef")} | RATES), "data")["name"]) == list("bfcdea")


# ------------------------------------------------------------------------------------------------------------ measuring
@pytest.fixture
def run(tiny_model, demo_parquet, tmp_path, capsys):
    """Runs the script on four of the demo's rows; ``run.out`` is its folder."""
    source = tmp_path / "four"
    source.mkdir()
    table = pq.read_table(demo_parquet / "train.parquet").slice(0, 4)
    pq.write_table(table, source / "train.parquet")
    (source / "validation.parquet").write_bytes((demo_parquet / "validation.parquet").read_bytes())
    (source / "report.json").write_text(json.dumps({"settings": {"audio_dir": str(source / "sounds")}}))

    def select(*further, model=tiny_model, data=source):
        places = ("--model_path", model, "--data_file", data, "--out_dir", tmp_path / "rated")
        status = select_data.main(list(map(str, (*places, "--samples", 3, "--max_new_tokens", 12, *further))))
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    select.out, select.table, select.source = tmp_path / "rated", table, source
    return select


def test_rates_are_written_beside_the_same_rows(run):
    status, text = run()
    assert status == 0, text
    written = pq.read_table(run.out / "train.parquet")
    assert written.select(run.table.column_names).equals(run.table)
    assert written.column_names[-2:] == ["pass_rate", "pass_rate_silent"]
    for name in written.column_names[-2:]:
        assert all(rate in (0, 1 / 3, 2 / 3, 1) for rate in written[name].to_pylist())
    about = json.loads(written.schema.metadata[pass_rates.NOTE])
    shown = [line.split() for line in text.splitlines() if line.startswith("pass_rate ")]
    rates = written["pass_rate"].to_pylist()
    assert [int(n) for n in shown[0][1:5]] == [sum(round(3 * rate) == k for rate in rates) for k in range(4)]
    assert about["samples"] == 3 and about["temperature"] == 1
    assert (run.out / "validation.parquet").is_file()
    names = {"train.parquet", "validation.parquet", "report.json"}
    assert {path.name for path in run.out.iterdir()} == {*names, "select.log"}
    held_out = Namespace(eval_data=f"{run.out}/validation.parquet", prompt_data=None)
    (run.source / "sounds").mkdir()
    assert held_out_files(held_out)[1].name == "sounds"  # which next evaluates the trained model with
    words = shlex.split(text.partition("next      ")[2].partition("\n")[0])
    further = dict(zip(words[2::2], words[3::2], strict=True))
    assert further["--prompt_data"] == str(run.out) and Path(further["--pretrain"], "config.json").is_file()
    assert not Path(further["--save_path"]).exists() and further["--max_silent_pass_rate"] == "0.5"
    status, text = run()
    assert status == 2 and "holds train.parquet, validation.parquet, report.json; --overwrite replaces" in text
    (run.source / "validation.parquet").unlink()
    assert run("--overwrite", "--no-silent_audio")[0] == 0
    assert "pass_rate_silent" not in pq.read_schema(run.out / "train.parquet").names
    assert not (run.out / "validation.parquet").exists()  # it was that of other rows


def test_rates_of_another_model_are_told_from_the_start_models(tmp_path):
    rows, lines = Dataset.from_dict(RATES), []
    table = pass_rates.with_rates(pa.table({"x": range(6)}), RATES, {"model_path": str(tmp_path / "old")})
    pq.write_table(table, tmp_path / "train.parquet")
    for name, count in (("old", 0), ("new", 1)):
        args = flags(easy=True)
        args.pretrain = str(tmp_path / name)
        select_rows(rows, str(tmp_path), args, lines.append)
        assert len(lines) == count
    assert (
        f"{tmp_path}: its pass rates are those of {tmp_path / 'old'}, not of --pretrain {tmp_path / 'new'}" in lines[0]
    )


def test_an_interrupted_measurement_goes_on(run, monkeypatch):
    """What was finished is asked no more; other settings do not continue it."""
    first = engines.HFEngine.answer

    def interrupted(self, jobs, finished):
        for part in first(self, jobs, finished):
            yield part
            raise KeyboardInterrupt

    monkeypatch.setattr(engines.HFEngine, "answer", interrupted)
    run.out.mkdir()
    (run.out / "train.parquet").write_text("of an earlier run")
    status, text = run("--batch_size", 6, "--overwrite")  # two rows at a time
    assert status == 130 and "the same command, without --overwrite, continues" in text
    monkeypatch.setattr(engines.HFEngine, "answer", first)
    status, text = run("--temperature", 0.5)
    assert status == 2 and "2 responses of an unfinished run with other settings" in text
    status, text = run("--batch_size", 6)
    assert status == 0 and "continuing: 2 of 8 were finished before" in text, text


def test_right_is_what_training_pays_for():
    """Two of three say the choice's text; --reward exact takes a label for it, R1-AQA's rule does not."""
    text = render_prompt("What?", ["(A) cat", "(B) dog"], enable_think=False)
    messages = [{"role": "user", "content": [{"type": "audio", "text": None}, {"type": "text", "text": text}]}]
    item = Item(0, "row 0", {"label": "avqa_rule"}, messages, None, "(B) dog")
    said = [["<answer>(B) dog</answer>", "<answer>B</answer>", "<answer>(A) cat</answer>"]]
    assert pass_rates.score([item], said, "r1_aqa") == [pytest.approx(1 / 3)]
    assert pass_rates.score([item], said[0][:1], "r1_aqa") == [1]
    assert pass_rates.score([item], said, "exact") == [pytest.approx(2 / 3)]


def test_what_cannot_be_measured_is_refused(run, tmp_path):
    table, source = run.table, run.source / "train.parquet"

    def with_column(name, values):
        at = table.column_names.index(name)
        return table.set_column(at, name, [values])

    audio = table["audio_path"].to_pylist()
    for changed, message in (
        (with_column("audio_path", [None, *audio[1:]]), "row 0: has no sound"),
        (with_column("audio_path", ["/nowhere.wav", *audio[1:]]), "the sound of 1 of 4 rows cannot be trained on"),
        (with_column("reference", [" ", "a", "b", "c"]), "row 0: the reference answer is ' '"),
        (table.drop_columns(["label"]), "has no column label; give a file that data_preprocess/avqa.py"),
        (table.slice(0, 0), "has no rows"),
    ):
        pq.write_table(changed, source)
        status, text = run()
        assert status == 2 and message in text, text
    source.write_bytes(b"PAR1")
    assert "cannot be read as parquet" in run()[1]
    for further, message in (
        (("--samples", 0), "--samples 0: must be at least 1"),
        (("--temperature", 0), "--temperature 0.0: must be above 0"),
        (("--out_dir", run.source), "is the folder of --data_file"),
        (("--data_file", tmp_path / "none"), "no such file"),
    ):
        status, text = run(*further)
        assert status == 2 and message in text, text
    assert not (run.out / "train.parquet").exists()


# ------------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def test_samples_follow_the_models_distribution(engine, tiny_model, demo_parquet, tmp_path):
    """Each option as often as transformers' own forward finds it likely, here at temperature 0.5."""
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    from aqa.audio.reader import AudioReader

    items = pass_rates.make_items(pq.read_table(demo_parquet / "train.parquet").slice(0, 1), tmp_path)
    model, count = Model(str(tiny_model), str(tiny_model)), 600
    lengths, _, _ = asking.check_audio(items, AudioReader())
    jobs = lambda processor: pass_rates.make_jobs(processor, items, lengths, True, AudioReader())  # noqa: E731
    sizes = {"max_new_tokens": 12, "batch_size": count, "dtype": "float32", "tensor_parallel_size": 1}
    args = SimpleNamespace(engine=engine, seed=0, audio_seconds=30.0, **sizes)
    done, partial = {}, PartialFile(tmp_path / "partial", {"model": model.identity()})
    asking.ask(args, model, jobs, done, partial, tmp_path / "log", count, 0.5)
    assert partial.load() == done and {len(texts) for texts in done.values()} == {count}
    processor = AutoProcessor.from_pretrained(tiny_model)
    plain = Qwen2AudioForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()
    assert [job.silent for job in jobs(processor)] == [False, True]
    for job in jobs(processor):
        start = "<answer>"
        inputs = processor(text=job.text + start, audio=job.load(), sampling_rate=16_000, return_tensors="pt")
        with torch.inference_mode():
            likely = (plain(**inputs).logits[0, -1] / 0.5).softmax(-1)
        begun = [text.removeprefix(start) for text in done[job.index] if text.startswith(start)]
        for token in likely.topk(3).indices.tolist():
            p, word = likely[token].item(), processor.tokenizer.decode([token])
            seen = sum(text.startswith(word) for text in begun) / len(begun)
            assert abs(seen - p) < 5 * math.sqrt(p * (1 - p) / len(begun)), word


def test_a_response_that_is_no_text_is_damage(tmp_path):
    partial = PartialFile(tmp_path / "p", {"model": []})
    partial.append([(0, ["a", "b"]), (-1, ["c", "d"])])
    assert partial.load() == {0: ["a", "b"], -1: ["c", "d"]}
    partial.append([(1, ["a", 5])])
    with pytest.raises(EvalError, match="damaged"):
        partial.load()


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.slow
def test_training_selects_orders_and_remembers(tiny_model, demo_parquet, tmp_path):
    """Eight of twelve rows stay, easy ones come first; a resumed run cannot select otherwise."""
    table = pq.read_table(demo_parquet / "train.parquet").slice(0, 12)
    rates = [0.0, 1.0, *[k / 10 for k in range(1, 9)], 0.5, 0.5]
    silent = [0.25] * 10 + [1.0, 0.75]
    (tmp_path / "rated").mkdir()
    rated = pass_rates.with_rates(table, {"pass_rate": rates, "pass_rate_silent": silent}, {})
    pq.write_table(rated, tmp_path / "rated" / "train.parquet")
    source = (tiny_model, tmp_path / "rated", tmp_path / "run")
    flags = ("--engine_type", "hf", "--max_silent_pass_rate", 0.5, "--pass_rate", 0.1, 0.9, "--easy_first")
    flags += ("--save_trajectories", "--num_trajectories_to_save", 16, "--save_steps", 1)
    done = train(*source, *flags)
    said = f"selected  8 rows; {tmp_path / 'rated'}: of 12 rows are left out: 2 right without sound (above 0.5), 1 too"
    assert said in done.stdout and "8 rows / 4 prompts = 2 steps an episode" in done.stdout
    order = [messages[0]["content"][1]["text"] for messages in table["prompt"].to_pylist()]
    for step, rows in ((1, (9, 8, 7, 6)), (2, (5, 4, 3, 2))):
        (path,) = (tmp_path / "run" / "trajectories").glob(f"step_*{step}.jsonl")
        prompts = {json.loads(line)["prompt"] for line in path.read_text().splitlines()}
        assert len(prompts) == 4 and all(any(order[row] in prompt for prompt in prompts) for row in rows)
    done = train(*source, *flags, "--load_checkpoint", "--max_silent_pass_rate", 0.8, check=False)
    assert done.returncode == 2 and "max_silent_pass_rate: 0.5, now 0.8" in done.stderr + done.stdout
