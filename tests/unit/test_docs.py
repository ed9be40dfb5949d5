"""What the documents name exists: flags, targets, files, links, variables and their defaults; and what they show runs.

``make test-docs`` also runs the commands that need only ``make demo``'s folder.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import ROOT, child_environment
from doc_figures import ByTest, kept
from test_slurm import SCONTROL, SRUN

DOCUMENTS = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/r1_aqa/README.md")]
    + list((ROOT / "docs").glob("*.md"))
)
EXAMPLE = ROOT / "examples" / "r1_aqa"
LAUNCHER = EXAMPLE / "run_grpo_r1_aqa_qwen2_audio_7b.sh"
MANUAL = EXAMPLE / "README.md"
FOLDERS = "examples|runtime|tests|benchmarks|docs|requirements"
FOREIGN = {"--signal", "--nproc-per-node", "--input", "--recursive"}  # of Slurm, torchrun, MMAU's script
# commands of the documents that run with make demo's folder alone, and what they show
EXAMPLES = "python examples/r1_aqa/"
RESULTS = "results/demo/result_before.json results/demo/result_after.json"
SHOWN = {
    f"{EXAMPLES}eval_mmau.py compare {RESULTS}": "p: McNemar's",
    f"{EXAMPLES}train_colocate.py --plan --pretrain Qwen/Qwen2-Audio-7B-Instruct --bf16 --zero_stage 3": "8,397,094,9",
    f"{EXAMPLES}data_preprocess/get_data.py --help": "avqa|mmau",
    f"{EXAMPLES}doctor.py --json": '"python"',
    f"{EXAMPLES}report.py --help": "--groups",
    f"{EXAMPLES}metric_table.py": "| `rollout/reward` |",
    "python benchmarks/bench_scaling.py --predict": "8.40 G parameters",
    "make report": "report.html",
    "make help": "make demo",
    "make lint": "All checks passed",
}
# who runs the other commands of the documents, by how they begin or what is in them: the same script and flags, with
# the demo's or the test's own files in place of the documents', and --plan where they are for GPUs
RUN_BY = {
    r"^source \.venv": ByTest("docs::test_the_manuals_steps_run"),
    r"^PATH_TO_YOUR_BASE_MODEL=Qwen/\S+ PATH_TO_YOUR_AVQA_DATASET=\S+ bash": ByTest("docs::test_commands_for_gpus"),
    r"^(PATH_TO_YOUR.*)?sbatch |^(nodes=|for i in|ssh |done$|wait$)": ByTest("docs::test_commands_for_gpus"),
    r"--pretrain Qwen/Qwen2\.5-Omni-7B \.\.\.": ByTest("omni::test_grpo_steps_move"),
    r"^LIGHTRFT_HOME=\S+ bash": ByTest("lightrft::test_the_manuals_command"),
    r"^git clone": ByTest("docs::test_the_commit_that_is_named"),
    r"^pip install lightrft$": ByTest("host::test_the_empty_package"),
    r"get_data\.py avqa": ByTest("get_data::test_avqa_from_videos_to_parquet"),
    r"get_data\.py mmau": ByTest("get_data::test_mmau_recordings_go_where"),
    r"data_preprocess/avqa\.py": ByTest("docs::test_the_manuals_steps_run"),
    r"eval_mmau\.py --model_path": ByTest("docs::test_the_manuals_steps_run"),
    r"demo/make_model\.py --rows|train_colocate\.py --pretrain results/own": ByTest("docs::test_the_readmes_way"),
    r"^PYTHON=\.venv/bin/python PATH_TO": ByTest("docs::test_the_manuals_dry_run"),
    r"^RESUME=1 bash": ByTest("faults::test_the_launch_script"),
    r"train_colocate\.py \.\.\. --load_checkpoint": ByTest("training::test_resume_continues"),
    r"^MLP_WORKER_NUM=2": ByTest("two_hosts::test_two_hosts_train"),
    r"^make report RUN": ByTest("docs::test_commands_run"),
    r"^bash \.\.\.sh --lora_rank": ByTest("training::test_launch_script_dry_run"),
}
# by documented.py, under this name, or by a benchmark of this name: what they found is kept in benchmarks/results
KEPT = {
    r"^make setup": "setup",
    r"^make demo$|^make demo SEED": "demo",
    r"^make demo DEMO_DIR=results/demo_lora": "lora",
    r"demo/run_demo\.py --family qwen2_5_omni": "omni",
    r"^make doctor$": "doctor",
    r"^make test$": "test",
    r"^make test-all$": "test_all",
    r"^make test-docs$": "docs",
    r"^make test-faults$": "faults",
    r"^make test-lightrft": "host_tests",
    r"^make soak$": "soak",
    r"^make bench$": "step",
    r"run_all\.py --only step scaling": "scaling",
    r"bench_rollout\.py": "rollout",
    r"bench_gather\.py": "gather",
    r"bench_sandbox\.py": "sandbox",
    r"bench_host\.py": "host",
    r"bench_7b\.py$": "gpu_7b",  # on a CPU, with --small
    r"^pip install -r requirements/gpu\.txt": "gpu_set",  # with --dry-run
    r"^pip install pre-commit": "hooks",
    r"^pip install bitsandbytes": "setup",
    r"/mmau/evaluation\.py": "mmau",
    r"documented\.py$": "plan",  # one of those that it runs
}
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@functools.cache
def flags_of(script: Path) -> frozenset[str]:
    """The flags of a script and of its subcommands, from its help."""
    texts = []
    words: list[list[str]] = [[]]
    for word in words:
        done = subprocess.run(
            [sys.executable, str(script), *word, "--help"],
            capture_output=True,
            text=True,
            env=child_environment() | {"COLUMNS": "200"},
            cwd=ROOT,
            timeout=120,
        )
        assert done.returncode == 0, f"{script} --help: {done.stderr}"
        texts.append(done.stdout)
        if not word:
            commands = re.search(r"^\s+\{([\w,]+)\}", done.stdout, re.M)
            words += [[name] for name in commands.group(1).split(",")] if commands else []
    return frozenset(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", "\n".join(texts)))


def scripts() -> list[Path]:
    """Everything that a person starts with flags."""
    folders = (EXAMPLE, EXAMPLE / "data_preprocess", EXAMPLE / "demo", ROOT / "benchmarks", ROOT / "benchmarks" / "gpu")
    found = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return [path for path in found if "ArgumentParser(" in path.read_text() or path.name == "train_colocate.py"]


@functools.cache
def all_flags() -> frozenset[str]:
    return frozenset().union(*map(flags_of, scripts()))


def code_of(text: str) -> list[str]:
    """The commands of a document, one line each, and its inline code."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.S | re.M)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    return lines + re.findall(r"`([^`]+)`", rest)


@every_document
def test_flags_exist(path):
    missing = []
    for code in code_of(path.read_text(encoding="utf-8")):
        named = re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", code)
        if not named or "pip " in code or re.search(r"\b(ssh|sbatch|srun)\b|#SBATCH", code):
            continue
        script = re.search(r"(?:examples|benchmarks)/[\w/]+\.py", code)
        known = flags_of(ROOT / script.group(0)) if script else all_flags()
        missing += [f"{flag} in: {code}" for flag in named if flag not in known | FOREIGN]
    assert missing == []


@every_document
def test_targets_files_and_links_exist(path):
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    missing = [
        f"make {target}"
        for code in code_of(text)
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", code)
        if target not in targets
    ]
    for code in code_of(text):
        for name in re.findall(
            r"(?<![\w/.-])(?:examples|runtime|tests|benchmarks|docs|requirements)/[\w/.-]+\.\w+", code
        ):
            if not name.startswith("benchmarks/results/") and not (ROOT / name).exists():
                missing.append(name)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        where = (path.parent / file).resolve() if file else path
        if not where.exists() or (anchor and anchor not in anchors_of(where)):
            missing.append(target)
    assert missing == []


def anchors_of(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_launch_scripts_variables_and_their_defaults():
    manual, script = MANUAL.read_text(encoding="utf-8"), LAUNCHER.read_text(encoding="utf-8")
    table = manual[manual.index("| variable | default | meaning |") :]
    wrong = []
    for row in table[: table.index("\n\n")].splitlines()[2:]:
        names, defaults = (cell.strip() for cell in row.strip("|").split("|")[:2])
        names = re.findall(r"`([A-Z][A-Z0-9_]*)(?:=\w+)?`", names)
        wrong += [f"{name}: not in {LAUNCHER.name}" for name in names if name not in script]
        values = defaults.split(", ")
        if len(values) == len(names):
            for name, value in zip(names, values, strict=True):
                found = re.search(rf"{name}:-([^}}]*)}}", script)
                if found and value != "not set" and found.group(1) != value:
                    wrong.append(f"{name}: {value} in the manual, {found.group(1)} in {LAUNCHER.name}")
    assert wrong == []


def test_messages_that_the_documents_quote_are_the_programs():
    """Those in the first column of docs/troubleshooting.md; in the source they may go over several lines."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "runtime").rglob("*.py"), ROOT / "Makefile"]
    text = re.sub(r'"\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    cells = [row.split(" | ")[0] for row in re.findall(r"(?m)^\| (.*) \|$", page)]
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 30 and [message for message in quoted if message not in text] == []


@pytest.mark.skipif("DOCS" not in os.environ, reason="make test-docs runs it")
@pytest.mark.parametrize("command", SHOWN)
def test_commands_run_and_show_what_is_said(command):
    assert any(command in " ".join(code_of(path.read_text(encoding="utf-8"))) for path in DOCUMENTS), "not documented"
    if "results/demo" in command and not (ROOT / "results" / "demo" / "summary.json").is_file():
        pytest.fail("make demo first: the command needs its folder")
    words = shlex.split(command)
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=600, env=child_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert SHOWN[command] in done.stdout


def commands_of(path: Path) -> list[str]:
    """The commands of a document: the lines of its blocks for bash, and inline code that can be typed."""
    text, found = path.read_text(encoding="utf-8"), []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.S | re.M):
        lines = (line.partition(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
        found += [" ".join(line.split()) for line in lines if line and not line.startswith("#")]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M))
    begins = r"(python|make|bash|pip|sbatch|source|FAULTS=1) .*[^.]$"
    return found + [" ".join(code.split()) for code in inline if re.match(begins, " ".join(code.split()))]


def test_every_command_is_run_by_something():
    """By test-docs, another test, or a script that keeps what it has measured."""
    ledger = RUN_BY | KEPT
    commands = {(path.name, command) for path in DOCUMENTS for command in commands_of(path)}
    run = {" ".join(command.split()) for command in (*SHOWN, *(block.values[0] for block in shown_blocks()))}
    left = [
        f"{page}: {command}"
        for page, command in sorted(commands)
        if command not in run
        and not any(re.search(pattern, command) for pattern in ledger)
        and not (re.search("-m pytest |^FAULTS=1 pytest ", command) and in_the_suite(command))
    ]
    unused = [pattern for pattern in ledger if not any(re.search(pattern, command) for _, command in commands)]
    gone = [by.name for by in RUN_BY.values() if not by.exists()]
    found = {*kept("_documented"), *kept(""), kept("_host")["name"]}
    not_kept = [name for name in KEPT.values() if name not in found]
    assert (left, unused, gone, not_kept) == ([], [], [], [])


def in_the_suite(command: str) -> bool:
    """Whether a command of pytest names tests of the suite, which make test runs."""
    names = re.findall(r"tests/[\w*]+\.py", command)
    return bool(names) and all(list(ROOT.glob(name)) for name in names)


def test_what_documented_py_runs_is_documented():
    """Its commands stand in the documents as they are, but for a folder that is emptied first or is new."""
    import documented

    text = " ".join(code for path in DOCUMENTS for code in code_of(path.read_text(encoding="utf-8")))
    text = " ".join(text.split())
    missing = []
    for name, run in documented.RUNS.items():
        command = re.sub(r"^rm -rf \S+ && ", "", run.command) if run.shown is None else run.shown
        command = re.sub(r" (VENV|RUN|COMPARE)=('[^']*'|\S+)", "", command)
        if command not in text:
            missing.append(f"{name}: {command}")
    assert missing == []


def shown_blocks() -> list[Any]:
    """Blocks that begin with a command and go on with what it prints."""
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"^```\n\$ (.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M):
            command, _, output = block.replace("\\\n", " ").partition("\n")
            found.append(pytest.param(command, output.splitlines(), id=f"{path.name}: {command[:60]}"))
    return found


@pytest.mark.skipif("DOCS" not in os.environ, reason="make test-docs runs it")
@pytest.mark.parametrize(("command", "output"), shown_blocks())
def test_a_block_shows_what_its_command_prints(command, output):
    """Line by line and in order; a block may leave lines out."""
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120, env=child_environment())
    printed = iter(done.stdout.splitlines())
    assert output, command
    assert [line for line in output if line not in printed] == [], done.stdout + done.stderr


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """An empty folder from which the documents' relative paths lead to the example and to make demo's folder."""
    (tmp_path / "results").mkdir()
    for name in ("examples", ".venv", "results/demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run_block(commands: str, folder: Path, **settings: object) -> str:
    """Run commands in bash; the first that fails ends them.

    :param commands: As a document has them.
    :param folder: Where they run.
    :param settings: More of the environment.
    :return: What they printed.
    """
    command = ["bash", "-e", "-c", commands]
    env = child_environment() | {name: str(value) for name, value in settings.items()}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def blocks_of(heading: str) -> str:
    """A section of the manual."""
    return MANUAL.read_text(encoding="utf-8").split(f"### {heading}")[1].split("\n## ")[0].split("\n### ")[0]


@pytest.mark.skipif("DOCS" not in os.environ, reason="make test-docs runs it")
def test_the_manuals_dry_run(elsewhere):
    section = blocks_of("Step 3: dry run")
    run_block(re.search(r"```bash\n(.*?)```", section, re.S).group(1), elsewhere)
    (run,) = (elsewhere / "results" / "lightrft-r1-aqa-grpo-training").iterdir()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["train/grad_norm"] is not None]
    assert f"{len(records)} rollouts, {len(steps)} optimizer" in " ".join(section.split())
    assert max(record["rollout/logprob_gap_max"] for record in records) < 1e-3


STAND_INS = {
    "srun": SRUN,
    "scontrol": SCONTROL,
    "sbatch": """#!/bin/bash
# the job at once; this host is both its nodes
while [[ "$1" == --* ]]; do shift 2; done
export SLURM_JOB_ID=123456 SLURM_JOB_NUM_NODES=2 SLURM_JOB_NODELIST=localhost,localhost SLURM_GPUS_ON_NODE=8
exec bash "$@"
""",
    "ssh": """#!/bin/bash
exec bash -c "$2"
""",
}


@pytest.mark.skipif("DOCS" not in os.environ, reason="make test-docs runs it")
@pytest.mark.parametrize(
    ("page", "begins", "shows"),
    [
        ("README.md", "PATH_TO_YOUR_BASE_MODEL=Qwen", "GPUs       8 x 80 GiB"),
        ("examples/r1_aqa/README.md", "PATH_TO_YOUR_BASE_MODEL=Qwen", "GPUs       8 x 80 GiB"),
        ("examples/r1_aqa/README.md", "sbatch", "GPUs       16 x 80 GiB"),
        ("docs/multi_node.md", "PATH_TO_YOUR_BASE_MODEL=/models", "batch      32 prompts x 8 = 256 responses"),
        ("docs/multi_node.md", "nodes=", "batch      32 prompts x 8 = 256 responses"),
    ],
)
def test_commands_for_gpus_and_clusters_say_what_they_would_start(page, begins, shows, elsewhere):
    """Each with ``--plan``, which goes the whole way from sbatch or ssh to the ranks' flags and starts no training."""
    lines = commands_of(ROOT / page)
    first = next(i for i, line in enumerate(lines) if line.startswith(begins))
    last = lines.index("wait", first) if begins == "nodes=" else first
    command = "\n".join(lines[first : last + 1])
    command = re.sub(r"(\.sh|\.sbatch)\b", r"\1 --plan", command)
    for theirs, ours in (("=/models/", "=Qwen/"), ("=/data/", "=~/data/"), ("node0 node1", "localhost localhost")):
        command = command.replace(theirs, ours)
    for name, text in STAND_INS.items():
        path = elsewhere / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (elsewhere / "data").mkdir()
    (elsewhere / "data" / "avqa_lightrft").symlink_to(ROOT / "results" / "demo" / "parquet")
    settings = {"HOME": elsewhere, "PATH": f"{elsewhere}/bin:{elsewhere}/.venv/bin:{os.environ['PATH']}"}
    settings["PATH_TO_YOUR_AVQA_DATASET"] = elsewhere / "data" / "avqa_lightrft"
    printed = run_block(command, elsewhere, **settings)
    assert shows in printed and "It fits" in printed
    if "8 x 80 GiB" in shows:  # what the manual shows as R1-AQA's settings
        plan = re.search(r"GiB a GPU +rollout.*?\ntotal.*?\n", printed, re.S).group(0)
        assert plan in MANUAL.read_text(encoding="utf-8")


def test_the_commit_that_is_named_is_the_contracts():
    """Wherever the documents name one of LightRFT's."""
    from aqa.hosts.lightrft.contract import TESTED

    named = {
        commit
        for path in (*DOCUMENTS, ROOT / "Makefile")
        for commit in re.findall(r"(?:checkout|commit|LightRFT) ([0-9a-f]{7,40})\b", path.read_text(encoding="utf-8"))
    }
    assert named == {TESTED.split()[-1]}


@pytest.mark.skipif("DOCS" not in os.environ, reason="make test-docs runs it")
@pytest.mark.parametrize(
    ("heading", "hint", "out", "written"),
    [
        ("Step 1: prepare AVQA", "With the demo's data:", "--local_save_dir out", "out/train.parquet"),
        ("Step 4: evaluate on MMAU test-mini", "With the demo's model:", "--out_file out.json", "out.score.json"),
    ],
)
def test_the_manuals_steps_run_with_the_demos_files(elsewhere, heading, hint, out, written):
    section = blocks_of(heading)
    command = (
        re.search(r"```bash\n(python .*?)\n(?:\n|```)", section, re.S)
        .group(1)
        .split("#")[0]
        .replace("<your_run>", "run")
    )
    flags = " ".join(re.search(rf"{hint} `([^`]+)`", section).group(1).split())
    run_block(f"source .venv/bin/activate; {command.rstrip()} {flags} {out}", elsewhere)
    assert (elsewhere / written).is_file()


@pytest.mark.skipif("DOCS" not in os.environ, reason="make test-docs runs it")
def test_the_readmes_way_from_ones_own_sounds_to_a_score(elsewhere):
    """Its block of commands, on ten low tones and ten high ones."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own sounds")[1]
    row, commands = (re.search(rf"```{kind}\n(.*?)```", section, re.S).group(1) for kind in ("json", "bash"))
    (elsewhere / "mine").mkdir()
    rows = []
    for i in range(20):
        high, name = i % 2, f"{('low', 'high')[i % 2]}_{i // 2}.wav"
        tone = np.sin(2 * np.pi * (200 + 3000 * high + 40 * i) * np.arange(24000) / 16000)
        soundfile.write(elsewhere / "mine" / name, tone, 16000)
        rows.append(json.dumps(json.loads(row) | {"id": i, "answer": high, "audio_path": name}))
    (elsewhere / "mine" / "rows.jsonl").write_text("\n".join(rows))
    run_block(commands, elsewhere)
    assert json.loads((elsewhere / "results/own/result.score.json").read_text())["accuracy"] == 1.0
    assert (elsewhere / "results/own/run/report.html").is_file()


def test_lines_of_a_run_are_made_as_the_documents_show_them():
    """A step's, the bar below it, and what a run says that has lost a rank."""
    from tqdm import tqdm

    from lightrft.utils.progress import BAR, PHASE_WIDTH, step_lines
    from lightrft.utils.rank_watch import SILENT

    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    names = ("rollout/reward", "rollout/accuracy_reward", "rollout/response_length", "train/kl")
    names += ("rollout/logprob_gap_max", "time/step")
    steps = re.findall(r"(?m)^step +(\d+)/(\d+)  reward .*$", text)
    lines = re.findall(r"(?m)^step +\d+/\d+  reward .*$", text)
    for (step, total), line in zip(steps, lines, strict=True):
        values = map(float, re.search(r"d (\S+)  acc (\S+)  len (\S+)  kl (\S+)  gap (\S+)  (\S+) s$", line).groups())
        assert step_lines(int(step), int(total), dict(zip(names, values, strict=True))) == [line]
    phase, done, total, elapsed, left = re.search(r"(?m)^(\w+) .*\| (\d+)/(\d+)  (\S+) < (\S+)$", text).groups()
    minutes, seconds = map(int, elapsed.split(":"))
    assert left == tqdm.format_interval((60 * minutes + seconds) * (int(total) - int(done)) / int(done))
    bar = tqdm.format_meter(
        int(done), int(total), 60 * minutes + seconds, 80, f"{phase:<{PHASE_WIDTH}}", bar_format=BAR
    )
    shown = re.search(r"(?m)^(train +)\S+(\|.*)$", text)
    assert bar.startswith(shown.group(1)) and bar.endswith(shown.group(2)) and len(lines) == 3
    peers = (ROOT / "runtime" / "lightrft" / "strategy" / "peers.py").read_text(encoding="utf-8")
    lost = re.search(r"(?m)^ERROR: rank \d on \w+ is lost: (.*)\n(This run ends, also on) \w+\. (.*)$", text).groups()
    assert lost[0] == SILENT and lost[1] in peers and lost[2] in re.sub(r'"\s*"', "", peers)


@pytest.mark.skipif("DOCS" not in os.environ, reason="make test-docs runs it")
def test_the_demos_figures_are_within_what_the_readme_shows():
    """Held-out accuracy and log-prob gap of make demo's folder against the README's lines; times are the machine's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    summary = json.loads((ROOT / "results" / "demo" / "summary.json").read_text())
    before, after, silent = map(
        float, re.search(r"before ([\d.]+)\s+after ([\d.]+)\s+after, but silent ([\d.]+)", readme).groups()
    )
    assert summary["accuracy_before"] == pytest.approx(before, abs=0.03)
    assert summary["accuracy_after"] == pytest.approx(after, abs=0.05)
    assert summary["accuracy_silent"] < 0.35 and silent < 0.35
    trained, seconds = (float(re.search(p, readme).group(1)) for p in (r"steps in (\d+) s", r"(\d+) s in all;"))
    assert seconds == pytest.approx(kept("_documented")["demo"]["seconds"], rel=1 / 3) and trained < seconds
    gap, steps = re.search(r"log-probs at most (\S+) apart in (\d+) steps", readme).groups()
    assert summary["steps"] == int(steps) and summary["logprob_gap_max"] < 3 * float(gap)
    table = r"(?m)^(\w[\w ,-]*?)  +([\d.e-]+) +([\d.e-]+) +([\d.e-]+)$"
    log = (ROOT / "results" / "demo" / "run" / "logs" / "rank0.log").read_text(encoding="utf-8", errors="replace")
    printed = {name: values for name, *values in re.findall(table, log)}
    said = {name: values for name, *values in re.findall(table, readme)}
    assert len(said) == 8 and said.keys() <= printed.keys()
    for name in said.keys() - {"step, seconds", "log-prob gap, max"}:  # on another machine it may take another way
        values = [float(value) for value in said[name]]
        assert [float(value) for value in printed[name]] == pytest.approx(values, rel=0.5, abs=0.05), name
