"""The runtime's small parts: prompt data, metrics, console, seeds, checkpoint names and folders."""

import json
import math
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_code
from harness import allocated
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, Qwen2AudioForConditionalGeneration

from aqa.families import Qwen2Audio
from lightrft.engines.base import stable_seed
from lightrft.models.actor_al import load_model
from lightrft.strategy import checkpoint
from lightrft.strategy.checkpoint import begin, clear, commit, damage, newest_first, rotate, write_hf_folder
from lightrft.strategy.deepspeed_strategy import DeepspeedStrategy
from lightrft.strategy.strategy_base import rate_factor
from lightrft.trainer.spmd_ppo_trainer import hand_back_memory
from lightrft.utils import blending_datasets, get_tokenizer_processor_vl
from lightrft.utils import metrics as metrics_module
from lightrft.utils.data import find_split
from lightrft.utils.metrics import MetricsWriter
from lightrft.utils.weight_names import checksum, read_checksums


# ----------------------------------------------------------------------------------------------------------------- data
def write_rows(path: Path, name: str, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"name": [f"{name}{i}" for i in range(count)]}), path)
    return path


def test_a_folder_is_read_by_split_and_a_file_as_it_is(tmp_path):
    train = write_rows(tmp_path / "train.parquet", "t", 3)
    write_rows(tmp_path / "validation.parquet", "v", 2)
    both = blending_datasets(str(tmp_path), "1.0", eval_split="validation")
    assert [list(part["name"]) for part in both] == [["t0", "t1", "t2"], ["v0", "v1"]]
    assert list(blending_datasets(str(tmp_path), "1.0", return_eval=False)["name"]) == ["t0", "t1", "t2"]
    by_file = blending_datasets(str(train), "1.0", return_eval=False, train_split="anything")
    assert list(by_file["name"]) == ["t0", "t1", "t2"]
    assert list(blending_datasets(str(tmp_path), "1.0", return_eval=False, max_count=2)["name"]) == ["t0", "t1"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_other_formats(tmp_path, suffix):
    rows = [{"name": "a", "count": 1}, {"name": "b", "count": 2}]
    texts = {"json": json.dumps(rows), "csv": "name,count\na,1\nb,2\n"}
    texts["jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"train.{suffix}").write_text(texts[suffix], encoding="utf-8")
    data = blending_datasets(str(tmp_path), "1.0", return_eval=False)
    assert list(data) == rows


@pytest.mark.parametrize("value", ["7", "0012", "1.50", "2020-01-01"])
def test_json_strings_stay_strings(tmp_path, value):
    """An answer "7" is text: as a number it would never equal what a model writes."""
    (tmp_path / "train.jsonl").write_text(json.dumps({"reference": value, "date": value}) + "\n", encoding="utf-8")
    data = blending_datasets(str(tmp_path), "1.0", return_eval=False)
    assert data[0] == {"reference": value, "date": value}


def test_sources_are_mixed_by_their_shares_reproducibly(tmp_path):
    for name in "ab":
        write_rows(tmp_path / name / "train.parquet", name, 400)

    def mix(seed, shares="0.75, 0.25", **kwargs):
        sources = f"{tmp_path / 'a'}, {tmp_path / 'b'}"
        return list(blending_datasets(sources, shares, None, seed, return_eval=False, **kwargs)["name"])

    mixed = mix(0)
    # drawn with probability 3/4 until the 400 of a are used up: 533 +- 13 rows; four deviations
    assert len(mixed) == pytest.approx(533, abs=54)
    assert sum(name.startswith("a") for name in mixed) / len(mixed) == pytest.approx(0.75, abs=0.08)
    assert mixed == mix(0)
    assert mixed != mix(1)
    longer = mix(0, stopping_strategy="all_exhausted")
    assert {f"b{i}" for i in range(400)} <= set(longer)


def test_missing_data_is_named(tmp_path):
    write_rows(tmp_path / "train.parquet", "t", 1)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no split 'dev': expected dev.parquet")):
        blending_datasets(str(tmp_path), "1.0", eval_split="dev")
    with pytest.raises(FileNotFoundError, match=r"no prompt data at .*gone: neither a file nor a folder"):
        blending_datasets(str(tmp_path / "gone"), "1.0")
    with pytest.raises(ValueError, match="1 sources but 2 probabilities"):
        blending_datasets(str(tmp_path), "0.5,0.5")


def test_parquet_is_preferred_and_a_file_is_every_split(tmp_path):
    (tmp_path / "train.csv").touch()
    (tmp_path / "train.txt").touch()
    assert find_split(str(tmp_path), "train") == tmp_path / "train.csv"
    (tmp_path / "train.parquet").touch()
    assert find_split(str(tmp_path), "train") == tmp_path / "train.parquet"


# -------------------------------------------------------------------------------------------------------------- metrics
def test_metrics_are_json_lines_that_are_appended_and_readable_at_once(tmp_path):
    folder, args = tmp_path / "new" / "run", SimpleNamespace(use_wandb=False, use_tensorboard=None)
    writer = MetricsWriter(folder, args)
    writer.write(1, {"reward": 0.5, "lr": 1e-6, "norm": math.nan, "gap": math.inf})
    path = folder / "metrics.jsonl"
    assert json.loads(path.read_text()) == {"step": 1, "reward": 0.5, "lr": 1e-6, "norm": None, "gap": None}
    writer.close()
    resumed = MetricsWriter(folder, args, done=1)
    resumed.write(2, {"reward": 1.0})
    resumed.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    records = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]


# -------------------------------------------------------------------------------------------------------------- console
CHATTER = """
import ctypes, os, subprocess, sys
from pathlib import Path
from lightrft.utils.console import console
print("before", flush=True)
console.rank = int(sys.argv[2])
console.redirect(Path(sys.argv[1]))
print("python chatter")
print("python errors", file=sys.stderr)
os.write(1, b"descriptor chatter\\n")
os.write(2, b"descriptor errors\\n")
libc = ctypes.CDLL(None)
libc.puts(b"native chatter")
libc.fflush(None)
subprocess.run(["echo", "child chatter"], check=True)
console.print("one line", "for people")
console.warn("look here")
"""
NOISE = [f"{source} chatter" for source in ("python", "descriptor", "native", "child")]
NOISE += ["python errors", "descriptor errors"]


def test_chatter_goes_to_the_file_and_our_lines_to_both(tmp_path):
    log = tmp_path / "logs" / "rank0.log"
    log.parent.mkdir()
    log.write_text("an earlier run\n")
    done = run_code(CHATTER, log, 0)
    assert done.stdout.splitlines() == ["before", "one line for people", "WARNING (rank 0): look here"]
    assert done.stderr == ""
    text = log.read_text()
    assert text.startswith("an earlier run\n")
    assert all(line in text for line in [*NOISE, "one line for people"])


def test_an_exception_reaches_the_terminal_and_the_file(tmp_path):
    log = tmp_path / "rank1.log"
    done = run_code(CHATTER + "raise ValueError('the cause')\n", log, 1, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[:2] == ["before", "WARNING (rank 1): look here"]  # other ranks only warn
    assert "one line" not in log.read_text()
    assert "rank 1: Traceback" in done.stdout
    assert "ValueError: the cause" in done.stdout
    assert f"the engines' output is in {log}" in done.stdout
    assert "ValueError: the cause" in log.read_text()
    assert not any(line in done.stdout for line in NOISE)


def test_an_interruption_is_one_line(tmp_path):
    done = run_code(CHATTER + "raise KeyboardInterrupt\n", tmp_path / "a.log", 0, check=False)
    assert "rank 0: interrupted" in done.stdout
    assert "Traceback" not in done.stdout


# --------------------------------------------------------------------------------------------------------------- engine
def test_seeds_are_the_same_everywhere():
    # blake2b of "42\x1f1\x1f0", 8 bytes, little-endian, without the lowest two bits: computed once, apart from the code
    assert stable_seed(42, 1, 0) == 3945578218908576192
    assert stable_seed("42", 1, "0") == 3945578218908576192


def test_seeds_differ_and_fit():
    seeds = {stable_seed(42, step, position) for step in range(50) for position in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**62 for seed in seeds)  # vLLM adds the sample's number, torch takes 63 bits
    assert stable_seed(1, 23) != stable_seed(12, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [0, 1, 4, 1003])
@pytest.mark.parametrize("start", [0, 1])  # at 1 a view does not begin at a whole word
def test_a_checksum_is_the_sum_of_the_64_bit_words(dtype, length, start):
    tensor = torch.randn(length + start, generator=torch.Generator().manual_seed(0)).to(dtype)[start:]
    octets = bytes(tensor.clone().view(torch.uint8).tolist())
    words = [int.from_bytes(octets[i : i + 8], "little") for i in range(0, len(octets), 8)]
    assert int(checksum(tensor)) % 2**64 == sum(words) % 2**64
    assert read_checksums({"a": checksum(tensor)}) == {"a": int(checksum(tensor))} and read_checksums({}) == {}


def test_a_checksum_sees_the_least_update_and_adds_up():
    weight = torch.full((64, 32), 0.02)
    same = weight.t().contiguous().t()  # the same values, laid out otherwise
    assert checksum(same) == checksum(weight) == checksum(weight[:16]) + checksum(weight[16:])
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1.0))
    assert checksum(same) != checksum(weight)


class Engine:
    """Notes what is sent."""

    def __init__(self):
        self.sent, self.complete = [], False

    def wake_up(self):
        pass

    def load_weights(self, weights):
        self.sent.append([name for name, _ in weights])
        self.complete = True


def test_frozen_layers_are_sent_once(tiny_model):
    actor = SimpleNamespace(model=load_model(str(tiny_model), dtype=torch.float32))
    frozen = ("audio_tower", "embed_tokens", "q_proj")
    for name, parameter in actor.model.named_parameters():
        parameter.requires_grad_(not set(frozen) & set(name.split(".")))
    strategy = object.__new__(DeepspeedStrategy)  # without a process group
    strategy.args = SimpleNamespace(zero_stage=0, lora_rank=0, bf16=False, sync_bucket_mb=512)
    strategy.inference_engine = Engine()
    for _ in range(3):
        strategy.update_engine_weights(actor)
    first, *later = strategy.inference_engine.sent
    everything = {Qwen2Audio.checkpoint_name(name) for name, _ in actor.model.named_parameters()}
    assert set(first) == everything and len(first) == len(everything)
    # vLLM keeps q, k and v of a block in one layer, so that a frozen q goes with its k and v
    left_out = {name for name in everything if name.startswith("audio_tower.") or "embed_tokens" in name}
    assert all(everything - set(names) == left_out for names in later)


def test_a_whole_reference_model_waits_in_pinned_memory_and_is_not_copied_back(monkeypatch):
    """Copies in CPU memory stand for those on a GPU."""
    pinned, moves = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **_: moves.append(device.type) or tensor.clone())
    strategy = object.__new__(DeepspeedStrategy)  # without a process group
    strategy.args, strategy.device, strategy._on_host = SimpleNamespace(zero_stage=2), torch.device("cuda"), {}
    reference = torch.nn.Module()
    reference.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))
    expected = [parameter.detach().clone() for parameter in reference.parameters()]
    strategy.prepare_model(reference)
    for turn in range(2):
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        for parameter, value, host in zip(reference.parameters(), expected, pinned, strict=True):
            assert torch.equal(parameter, value) and parameter.data_ptr() == host.data_ptr()
        strategy.reload_model(reference)
        there = zip(reference.parameters(), pinned, strict=True)
        assert all(parameter.data_ptr() != host.data_ptr() for parameter, host in there)
        assert moves == ["cuda"] * 3 * (turn + 1)
        strategy.offload_model(reference)


# -------------------------------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_folder_loads_whole_under_the_models_own_name(tiny_model, tmp_path, dtype):
    policy = load_model(str(tiny_model), dtype=dtype)
    with torch.no_grad():  # not the weights it came with
        for parameter in policy.parameters():
            parameter.add_(0.125)
    weights = ((Qwen2Audio.checkpoint_name(name), parameter.data) for name, parameter in policy.named_parameters())
    policy.config.use_cache = False  # as the actor sets it
    write_hf_folder(policy, weights, AutoTokenizer.from_pretrained(tiny_model), str(tmp_path / "out"))

    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["Qwen2AudioForConditionalGeneration"]
    assert config.dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True
    model, info = Qwen2AudioForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    expected = dict(policy.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, expected[name]), name
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(load_file(tiny_model / "model.safetensors"))
    assert model.generation_config.eos_token_id == policy.generation_config.eos_token_id
    tokens = [
        AutoTokenizer.from_pretrained(folder)("What is it?")["input_ids"] for folder in (tiny_model, tmp_path / "out")
    ]
    assert tokens[0] == tokens[1]
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_large_model_is_written_in_parts_of_which_one_is_in_memory(tiny_model, tmp_path, monkeypatch):
    """And a folder holds one model only, however many files the one before had."""
    policy = load_model(str(tiny_model), dtype=torch.float32)
    expected = {Qwen2Audio.checkpoint_name(name): parameter.data for name, parameter in policy.named_parameters()}
    largest, tokenizer = max(w.nbytes for w in expected.values()), AutoTokenizer.from_pretrained(tiny_model)
    for limit in (largest // 2, 3 * largest, 10**9, largest // 2):
        monkeypatch.setattr(checkpoint, "SHARD", limit)
        with torch.no_grad():  # not the weights that are there already
            for parameter in policy.parameters():
                parameter.add_(0.125)
        most, _ = allocated(lambda: write_hf_folder(policy, expected.items(), tokenizer, str(tmp_path)))
        assert most <= max(limit, largest) + 10_000
        files = sorted(tmp_path.glob("*.safetensors"))
        assert [path.name for path in files] == (
            ["model.safetensors"]
            if limit == 10**9
            else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        )
        assert (tmp_path / "model.safetensors.index.json").exists() is (limit < 10**9)
        for stored in map(load_file, files):
            assert sum(weight.nbytes for weight in stored.values()) <= limit or len(stored) == 1
        model, info = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        loaded = {Qwen2Audio.checkpoint_name(name): parameter for name, parameter in model.named_parameters()}
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def make_checkpoint(parent: Path, step: int, prompts: int | None) -> Path:
    """As a save leaves it; without prompts, as one of an earlier version did."""
    begin(str(parent), f"step_{step:06d}.part")
    folder = parent / f"step_{step:06d}.part"
    (folder / "zero").mkdir()
    (folder / "zero" / "state").write_bytes(b"12345")
    commit(str(parent), f"step_{step:06d}", prompts)
    folder = folder.with_suffix("")
    if prompts is None:
        (folder / "manifest.json").write_text(json.dumps({"zero/state": 5}))
    return folder


@pytest.mark.parametrize("prompts", [{1: 4, 2: 8, 3: 12, 8: 64, 10: 40}, dict.fromkeys((1, 2, 3, 10, 8))])
@pytest.mark.parametrize(
    ("keep", "broken", "latest", "left"),
    [
        (2, [], 8, {10, 8}),  # step 8 is newer than 10: its steps had more prompts
        (1, [], 8, {8}),
        (9, [], 8, {1, 2, 3, 10, 8}),
        (1, [8, 10], 8, {3, 8}),  # both latest and the one to resume from is never deleted
        (1, [], 2, {2, 8}),
        (2, [], None, {10, 8}),
    ],
)
def test_rotation_deletes_the_oldest_and_never_the_last_whole_one(tmp_path, prompts, keep, broken, latest, left):
    for step, count in prompts.items():
        folder = make_checkpoint(tmp_path, step, count)
        if step in broken:
            (folder / "zero" / "state").unlink()
    (tmp_path / "latest").unlink() if latest is None else (tmp_path / "latest").write_text(f"step_{latest:06d}")
    rotate(str(tmp_path), keep)
    assert {int(folder.name[5:]) for folder in tmp_path.glob("step_*")} == left


def test_a_checkpoint_gets_its_name_when_it_is_whole(tmp_path):
    (tmp_path / "step_000001.part").mkdir()  # of a save that was killed
    begin(str(tmp_path), "step_000003.part")
    assert newest_first(str(tmp_path)) == []
    made = make_checkpoint(tmp_path, 3, 12)
    make_checkpoint(tmp_path, 3, 12)  # again, after the run was resumed from an older one
    assert newest_first(str(tmp_path)) == [made] and damage(made) is None
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest == {"prompts": 12, "files": {"zero/state": [5, "4af3da69f61e14cf26f4c14b6b6bfdb4"]}}
    assert (tmp_path / "latest").read_text() == "step_000003"
    assert {path.name for path in tmp_path.iterdir()} == {"step_000003", "latest"}


@pytest.mark.parametrize(
    ("left", "found"),
    [
        ({".part": 12, ".old.part": 10}, 12),  # killed between the renames that replace a checkpoint by a newer one
        ({".old.part": 10}, 10),
        ({"": 12, ".old.part": 10}, 12),
        ({"": 10, ".part": 12}, 10),  # killed while writing
        ({".part": 12}, None),
    ],
)
def test_a_kill_at_the_renames_loses_no_whole_checkpoint(tmp_path, left, found):
    make_checkpoint(tmp_path, 2, 8)
    for name, prompts in left.items():
        make_checkpoint(tmp_path / "made", 3, prompts).rename(tmp_path / f"step_000003{name}")
    clear(str(tmp_path))
    prompts = [json.loads((folder / "manifest.json").read_text())["prompts"] for folder in newest_first(str(tmp_path))]
    assert prompts == ([found, 8] if found else [8])
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", ["zero/state", "manifest.json"])
def test_a_flipped_bit_or_a_missing_byte_is_damage(tmp_path, name):
    folder = make_checkpoint(tmp_path, 1, 4)
    good = (folder / name).read_bytes()
    for i in range(len(good)):
        (folder / name).write_bytes(good[:i] + bytes([good[i] ^ 64]) + good[i + 1 :])
        wrong = damage(folder, slice(None))
        assert wrong and (name in wrong or name == "manifest.json"), i
    (folder / name).write_bytes(good[:-1])
    assert damage(folder)
    (folder / name).unlink()
    assert name in damage(folder)


def test_metrics_wait_for_room_on_the_disk(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(metrics_module.console, "warn", said.append)
    writer = MetricsWriter(tmp_path, SimpleNamespace(use_wandb=False, use_tensorboard=None))
    writer.write(1, {"x": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))  # room for half of the next record
    try:
        writer.write(2, {"x": 2.0})
        writer.write(3, {"x": 3.0})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [json.loads(line)["step"] for line in lines] == [1]
    writer.write(4, {"x": 4.0})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert len(said) == 1 and said[0].startswith("metrics.jsonl cannot be written")


@pytest.mark.parametrize("done", [2, -1])  # -1: step 0, the evaluation of the start model, is done again
def test_metrics_of_a_resumed_run_have_each_step_once(tmp_path, done):
    args = SimpleNamespace(use_wandb=False, use_tensorboard=None)
    writer = MetricsWriter(tmp_path, args)
    for step in (0, 1, 2, 3):
        writer.write(step, {"x": step * 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x"')  # killed while writing
    writer = MetricsWriter(tmp_path, args, done=done)
    writer.write(done + 1, {"x": 30.0})
    writer.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = [(step, step * 1.0) for step in range(done + 1)]
    assert [(record["step"], record["x"]) for record in records] == [*kept, (done + 1, 30.0)]


# ------------------------------------------------------------------------------------------------------------ processor


def test_a_tokenizer_without_padding_token_pads_with_the_end(tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    model = SimpleNamespace(config=SimpleNamespace(pad_token_id=None))
    tokenizer, _ = get_tokenizer_processor_vl(str(tmp_path), model)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.config.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"


# --------------------------------------------------------------------------------------------------------------- memory
def test_freed_memory_goes_back_to_the_system():
    def resident() -> int:
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

    chunks = [b"x" * 100_000 for _ in range(3000)]  # 286 MiB, each too small for a mapping of its own
    del chunks[:-1]  # the last one keeps the heap from shrinking
    before = resident()
    hand_back_memory()
    assert resident() < before - 200


@pytest.mark.parametrize(
    ("step", "warmup", "factor"),
    # 12 steps: warm-up 1/4 2/4 3/4 4/4; then 0.1 + 0.9 (1 + cos(pi (step - 4) / 8)) / 2
    [
        (0, 4, 0.25),
        (3, 4, 1.0),
        (4, 4, 1.0),
        (8, 4, 0.55),
        (10, 4, 0.1 + 0.45 * (1 - 2**-0.5)),
        (12, 4, 0.1),
        (16, 4, 0.1),  # after a resume with larger rollouts
        (0, 0, 1.0),
    ],
)
def test_no_step_of_the_schedule_has_the_learning_rate_0(step, warmup, factor):
    assert rate_factor(step, warmup, 12) == pytest.approx(factor)
