"""The operator's table: mistakes at start, at resume and in an evaluation, and what each ends in.

Each row is one mistake: how the command is changed, the exit status, and words of the one message that names the
value and the remedy. Status 0 is a mistake that ends in the right result. Nothing good may change in any: model,
data, a finished run with its checkpoints, a finished evaluation.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fork_server import HEAVY, ForkServer
from support.training import SMALL

from aqa.common.lock import lock


class Desk:
    """An operator's files. The methods that make a command, or a copy with a mistake in it, are used by the tables."""

    def __init__(self, tmp: Path, model: Path, data: Path, parquet: Path, run: Path | None) -> None:
        self.tmp, self.model, self.data, self.parquet, self.run = tmp, model, data, parquet, run
        self.file = tmp / "file"
        self.file.write_text("mine")
        self.answers = tmp / "answers.json"
        row = {"id": "1", "audio_id": "a.wav", "question": "?", "choices": ["a"], "answer": "a", "model_output": "a"}
        self.answers.write_text(json.dumps([row]))

    # ------------------------------------------------------------ commands
    def train(self, *more: str, **flags: object) -> tuple[str, list]:
        known = {"pretrain": self.model, "prompt_data": self.parquet, "save_path": self.tmp / "new"} | flags
        flags = [part for name, value in known.items() for part in (f"--{name}", value)]
        return "train_colocate.py", [*SMALL, "--engine_type", "hf", "--max_samples", 8, *flags, *more]

    def resume(self, run: Path, *more: str, **flags: object) -> tuple[str, list]:
        return self.train("--load_checkpoint", "--save_steps", "1", *more, save_path=run, **flags)

    def more(self, run: Path) -> tuple[str, list]:
        """Train a finished run for another episode."""
        return self.resume(run, "--allow_changes", "num_episodes", num_episodes=2)

    def benchmark(self, **flags: object) -> tuple[str, list]:
        known = {"eval_steps": 1, "eval_benchmark": self.data / "demo-test.json", "eval_audio_dir": self.data}
        return self.train(**known | flags)

    def evaluate(self, *more: str, **flags: object) -> tuple[str, list]:
        known = {"model_path": self.model, "data_file": self.data / "demo-test.json", "audio_dir": self.data}
        known |= {"out_file": self.tmp / "out.json", "limit": 2, "max_new_tokens": 4} | flags
        return "eval_mmau.py", [*(part for name, value in known.items() for part in (f"--{name}", value)), *more]

    def prepare(self, **flags: object) -> tuple[str, list]:
        known = {"input_jsonl": self.data / "train_qa.data", "audio_dir": self.data, "local_save_dir": self.tmp / "new"}
        return "avqa.py", [part for name, value in (known | flags).items() for part in (f"--{name}", value)]

    # ------------------------------------------------------------ copies with a mistake in them
    def spoiled(self, *gone: str, cut: str = "", of: Path | None = None, **contents: str) -> Path:
        """A copy of the model, or of another folder.

        :param gone: Patterns of files that it lacks.
        :param cut: Pattern of files that have lost their second half.
        :param contents: What other files hold, by name with ``__`` for a dot.
        """
        copy = self.tmp / "copy"
        shutil.copytree(of or self.model, copy)
        for pattern in gone:
            for path in list(copy.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in copy.glob(cut) if cut else ():
            os.truncate(path, path.stat().st_size // 2)
        for name, text in contents.items():
            (copy / name.replace("__", ".")).write_text(text)
        return copy

    def write(self, name: str, content: str | bytes = "") -> Path:
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def folder(self, name: str) -> Path:
        (self.tmp / name).mkdir(parents=True)
        return self.tmp / name

    def adapter(self, **config: object) -> Path:
        return self.write("adapter/adapter_config.json", json.dumps(config)).parent


def fingerprints(*places: Path) -> dict[str, str]:
    """A hash of every file, but for logs."""
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and file.parent.name != "logs"
    }


Make = Callable[[Desk], tuple[str, list]]
Row = tuple[Make, int, str]
AT_START: dict[str, tuple[Make, str]] = {  # all end with status 2
    "the model is missing": (lambda d: d.train(pretrain=d.tmp / "no"), "no: no such folder"),
    "a file as model": (lambda d: d.train(pretrain=d.file), "--pretrain {d.file}: "),
    "the data as model": (lambda d: d.train(pretrain=d.parquet), "holds no config.json; is it a model folder?"),
    "no config": (lambda d: d.train(pretrain=d.spoiled("config.json")), "copy: holds no config.json"),
    "no weights": (lambda d: d.train(pretrain=d.spoiled("*.safetensors")), "copy: holds no weights"),
    "no tokenizer": (lambda d: d.train(pretrain=d.spoiled("tokenizer*")), "copy the tokenizer's files from"),
    "no processor": (lambda d: d.train(pretrain=d.spoiled("processor_*")), "copy: holds no processor"),
    "half the weights": (
        lambda d: d.train(pretrain=d.spoiled(cut="*.safetensors")),
        "the end of model.safetensors is missing; copy it again",
    ),
    "a model of another kind": (
        lambda d: d.train(pretrain=d.spoiled(config__json='{"model_type": "llama"}')),
        "copy: is a llama model; known are qwen2_audio",
    ),
    "the data is missing": (lambda d: d.train(prompt_data=d.tmp / "no"), "--prompt_data {d.tmp}/no: does not exist"),
    "the recordings as data": (lambda d: d.train(prompt_data=d.data), "holds no train.parquet (--prompt_split)"),
    "evaluation data is missing": (lambda d: d.train(eval_data=d.tmp / "no"), "--eval_data {d.tmp}/no: does not"),
    "the benchmark is missing": (
        lambda d: d.benchmark(eval_benchmark=d.tmp / "no.json"),
        "--eval_benchmark {d.tmp}/no.json: no such file",
    ),
    "its recordings are missing": (
        lambda d: d.benchmark(eval_audio_dir=d.tmp / "no"),
        "--eval_audio_dir {d.tmp}/no: must be the folder of --eval_benchmark's recordings",
    ),
    "--keep_best without an evaluation": (lambda d: d.train("--keep_best"), "--keep_best without an evaluation"),
    "a file as --save_path": (lambda d: d.train(save_path=d.file), "--save_path {d.file}: cannot be written"),
    "--save_path in a file": (lambda d: d.train(save_path=d.file / "x"), "--save_path {d.file}/x: cannot be writ"),
    "--save_path where nothing can be": (lambda d: d.train(save_path="/proc/no/x"), "/proc/no/x: cannot be writ"),
    "a file as --ckpt_path": (lambda d: d.train(ckpt_path=d.file), "--ckpt_path {d.file}: cannot be written"),
    "the model as --save_path": (lambda d: d.train(save_path=d.model), "choose another"),
    "the data as --save_path": (lambda d: d.train(save_path=d.parquet), "choose another --save_path"),
    "nothing to resume": (lambda d: d.resume(d.tmp / "new"), "new holds no checkpoint (_actor/latest)"),
    "an empty folder to resume": (lambda d: d.resume(d.folder("empty")), "empty holds no checkpoint"),
    "no such reward": (lambda d: d.train(reward="exct"), "--reward exct: must be one of"),
}
IN_AN_EVALUATION: dict[str, tuple[Make, str]] = {
    "the model is missing": (lambda d: d.evaluate(model_path=d.tmp / "no"), "--model_path {d.tmp}/no: does not exi"),
    "a file as model": (lambda d: d.evaluate(model_path=d.file), "is a file; give the folder that holds it"),
    "an empty folder": (lambda d: d.evaluate(model_path=d.folder("empty")), "no model there: config.json, "),
    "no config": (lambda d: d.evaluate(model_path=d.spoiled("config.json")), "no model there: config.json missing"),
    "no weights": (lambda d: d.evaluate(model_path=d.spoiled("*.safetensors")), "*.safetensors missing"),
    "half the weights": (lambda d: d.evaluate(model_path=d.spoiled(cut="*.safetensors")), "copy it again"),
    "no tokenizer": (lambda d: d.evaluate(model_path=d.spoiled("tokenizer.json")), "copy the tokenizer's files"),
    "an adapter of no model": (lambda d: d.evaluate(model_path=d.adapter()), "names no base model; give --base_mod"),
    "an adapter without weights": (
        lambda d: d.evaluate(model_path=d.adapter(peft_type="LORA", base_model_name_or_path=str(d.model))),
        "no whole LoRA adapter: its peft_type is LORA, its weights are missing; copy it again",
    ),
    "--base_model for a whole model": (lambda d: d.evaluate(base_model=d.model), "leave it out"),
    "checkpoints alone": (
        lambda d: d.evaluate(model_path=d.write("run/_actor/latest", "step_000001").parents[1]),
        "run: holds ",
    ),
    "the questions are missing": (lambda d: d.evaluate(data_file=d.tmp / "no.json"), "no.json: No such file"),
    "a folder as questions": (lambda d: d.evaluate(data_file=d.data), "a folder; name the file in it"),
    "half the questions": (
        lambda d: d.evaluate(data_file=d.write("half.json", (d.data / "demo-test.json").read_bytes()[:900])),
        "is no JSON value (Unterminated string",
    ),
    "no questions": (lambda d: d.evaluate(data_file=d.write("none.json")), "none.json: no rows"),
    "the recordings are missing": (lambda d: d.evaluate(audio_dir=d.tmp / "no"), "--audio_dir {d.tmp}/no: is no"),
    "a file as recordings": (lambda d: d.evaluate(audio_dir=d.file), "--audio_dir {d.file}: is no folder"),
    "no recordings": (lambda d: d.evaluate(audio_dir=d.folder("empty")), "the audio of 2 of 2 items cannot be used"),
    "a folder as --out_file": (lambda d: d.evaluate(out_file=d.folder("x.json")), "x.json beside it would be writ"),
    "a folder as the scores": (
        lambda d: d.evaluate("--overwrite", out_file=d.folder("x.score.json").with_name("x.json")),
        "x.score.json beside",
    ),
    "--out_file in a file": (lambda d: d.evaluate(out_file=d.file / "x.json"), "{d.file} is no folder that can be"),
    "--out_file without ending": (lambda d: d.evaluate(out_file=d.tmp / "x"), ".json, .jsonl or .parquet, from"),
    "--out_file is there": (lambda d: d.evaluate(out_file=d.answers), "answers.json: exists; --overwrite replaces"),
    "--out_file is the questions": (
        lambda d: d.evaluate("--overwrite", out_file=d.data / "demo-test.json"),
        "is the --data_file",
    ),
    "unfinished answers of another model": (
        lambda d: d.evaluate(out_file=d.write("p.partial.jsonl", '{"model": "x"}\n').with_name("p.json")),
        "give --overwrite to drop it",
    ),
    "unfinished answers are damaged": (
        lambda d: d.evaluate(out_file=d.write("p.partial.jsonl", "rubbish\n").with_name("p.json")),
        "p.partial.jsonl: damaged (",
    ),
    "scores in place of their results": (
        lambda d: ("eval_mmau.py", ["score", d.answers, "--out_file", d.answers]),
        "answers.json: is a result file itself; name another",
    ),
    "scored questions": (lambda d: ("eval_mmau.py", ["score", d.data / "demo-test.json"]), "is no result file; eva"),
    "no rows to prepare": (lambda d: d.prepare(input_jsonl=d.tmp / "no"), "--input_jsonl {d.tmp}/no: no such file"),
    "a folder of rows": (lambda d: d.prepare(input_jsonl=d.data), "a folder; name the file in it"),
    "prepared into a file": (lambda d: d.prepare(local_save_dir=d.file), "is no folder that can be written to; name"),
    "prepared below one": (lambda d: d.prepare(local_save_dir=d.file / "x"), "is no folder that can be written to; na"),
}


ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANKS: dict[str, tuple[dict[str, str], str]] = {
    "a rank beyond the ranks": (ONE | {"RANK": "3", "WORLD_SIZE": "2"}, "RANK 3: must be 0 to 1 (below WORLD_SIZE)"),
    "no number": (ONE | {"WORLD_SIZE": "two"}, "WORLD_SIZE 'two': must be a whole number"),
    "a negative rank": (ONE | {"RANK": "-1"}, "RANK '-1': must be a whole number"),
    "no rank": ({"WORLD_SIZE": "2"}, "RANK is not set"),
    "no ranks": (ONE | {"WORLD_SIZE": "0"}, "WORLD_SIZE 0: must be 1 to "),
    "no port": (ONE | {"MASTER_PORT": "99999"}, "MASTER_PORT 99999: must be 1 to 65535"),
    "nobody to meet": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
}


def check(server: ForkServer, desk: Desk, row: Row, env: dict[str, str] | None = None, most: int = -1) -> str:
    good = [place for place in (desk.model, desk.data, desk.parquet, desk.run, desk.answers, desk.file) if place]
    before = fingerprints(*good)
    make, status, words = row
    found, shown = server.run(*make(desk), desk.tmp, env, most)
    assert (found, "Traceback" in shown) == (status, False), shown[-3000:]
    for part in words.format(d=desk).split(" ... "):
        assert part in shown, shown[-3000:]
    assert fingerprints(*good) == before
    return shown


@pytest.fixture(scope="module")
def light() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def desk(tmp_path, tiny_model, demo_data, demo_parquet) -> Desk:
    return Desk(tmp_path, tiny_model, demo_data, demo_parquet, None)


@pytest.mark.parametrize("name", AT_START)
def test_at_start(light, desk, name):
    make, words = AT_START[name]
    check(light, desk, (make, 2, words))
    assert not list((desk.tmp / "new").glob("*"))


@pytest.mark.parametrize("name", IN_AN_EVALUATION)
def test_in_an_evaluation(light, desk, name):
    make, words = IN_AN_EVALUATION[name]
    check(light, desk, (make, 2, words))
    assert not (desk.tmp / "out.json").exists()


@pytest.mark.parametrize("name", RANKS)
def test_ranks_and_ports(light, desk, name):
    env, words = RANKS[name]
    check(light, desk, (lambda d: d.train(), 2, f"{words} ... unset them to train in one process"), env)


def test_a_port_that_is_taken(light, desk):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        row = (lambda d: d.train(), 2, f"MASTER_PORT {port}: Address already in use; name a free one")
        check(light, desk, row, ONE | {"MASTER_PORT": port})


# ------------------------------------------------------------------------------------------------- with a finished run
AT_RESUME: dict[str, Row] = {
    "as it was": (lambda d: d.resume(d.run), 0, "nothing left to do"),
    "another model": (
        lambda d: d.resume(
            d.run,
            pretrain=d.spoiled(generation_config__json="{}", config__json=" " + (d.model / "config.json").read_text()),
        ),
        2,
        "another start model needs a new run",
    ),
    "half the newest checkpoint": (
        lambda d: d.more(d.spoiled(of=d.run, cut="_actor/step_000002/*")),
        0,
        "passed over a damaged checkpoint: ... step 2/4",
    ),
    "no checkpoints": (lambda d: d.more(d.spoiled("_actor/step_*", of=d.run)), 2, "no whole checkpoint in"),
    "files of the future": (lambda d: d.more(of_the_future(d)), 0, "step 4/4"),
    "a new run in its folder": (
        lambda d: d.train("--save_steps", "1", save_path=of_the_future(d)),
        0,
        "note: what an earlier run had left in ... is now in ... earlier/",
    ),
    "half the parquet": (
        lambda d: d.train(prompt_data=d.write("half.parquet", (d.parquet / "train.parquet").read_bytes()[:5_000])),
        2,
        "half.parquet: cannot be read ( ... make or copy it again",
    ),
    "an empty parquet": (lambda d: d.train(prompt_data=d.write("none.parquet")), 2, "none.parquet: cannot be read ("),
    "half the config": (lambda d: d.train(pretrain=d.spoiled(cut="config.json")), 2, "--pretrain {d.tmp}/copy: "),
}


def of_the_future(desk: Desk) -> Path:
    """A copy of the run, written in 2096 by a clock that has been put back since."""
    copy = desk.spoiled(of=desk.run)
    for path in copy.rglob("*"):
        os.utime(path, (4e9, 4e9))
    return copy


@pytest.fixture(scope="module")
def heavy() -> Iterator[ForkServer]:
    server = ForkServer(HEAVY)
    yield server
    server.close()


@pytest.fixture(scope="module")
def finished(heavy, tiny_model, demo_data, demo_parquet, tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("finished")
    desk = Desk(tmp, tiny_model, demo_data, demo_parquet, None)
    status, shown = heavy.run(*desk.train("--save_steps", "1", save_path=tmp / "run"), tmp)
    assert status == 0, shown
    return tmp / "run"


@pytest.fixture
def run_desk(tmp_path, finished, tiny_model, demo_data, demo_parquet) -> Desk:
    return Desk(tmp_path, tiny_model, demo_data, demo_parquet, finished)


@pytest.mark.faults
@pytest.mark.parametrize("name", AT_RESUME)
def test_at_resume(heavy, run_desk, name):
    check(heavy, run_desk, AT_RESUME[name])


@pytest.mark.faults
def test_two_at_once(heavy, run_desk):
    with lock(run_desk.run / "run.lock", "x"):
        check(heavy, run_desk, (lambda d: d.more(d.run), 2, f"is in use by process {os.getpid()} on host"))
        check(heavy, run_desk, (lambda d: d.train(save_path=d.run), 2, f"is in use by process {os.getpid()} on host"))


@pytest.mark.faults
def test_a_full_disk(heavy, run_desk):
    """At start, at resume and at the end of an evaluation; what the disk held stays as it was."""
    check(heavy, run_desk, (lambda d: d.train(), 5, "File too large"), most=200_000)
    copy = run_desk.spoiled(of=run_desk.run)
    before = fingerprints(*(copy / name for name in ("model.safetensors", "config.json", "_actor/step_000002")))
    check(heavy, run_desk, (lambda d: d.more(copy), 5, "step 3 could not be saved"), most=200_000)
    assert {path: before[path] for path in before} == {path: fingerprints(copy)[path] for path in before}
    check(heavy, run_desk, (lambda d: d.evaluate(limit=24), 2, "File too large"), most=2_000)
    check(heavy, run_desk, (lambda d: d.evaluate(limit=24), 0, "continuing: "))
