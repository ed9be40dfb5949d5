"""What the documents name exists: flags, targets, files, links, variables, messages; and their quick commands run.

``make test-docs`` also runs the commands that need ``make demo``'s folder.
"""

import ast
import functools
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import EXAMPLE, LAUNCH_SCRIPT, ROOT, run_command

TRAIN = EXAMPLE / "train_colocate.py"
MANUAL = EXAMPLE / "README.md"
DOCUMENTS = [path for folder in (".", "docs", "benchmarks/gpu") for path in sorted((ROOT / folder).glob("*.md"))]
DOCUMENTS += [MANUAL, EXAMPLE / "METHODS.md"]
OUTSIDE = r"(?<![\w/.-])(?:runtime|tests|benchmarks|docs|requirements)/|\bMakefile\b|\b(?:CONTRIBUTING|CHANGELOG)\b"
FOLDERS = "examples|runtime|tests|benchmarks|docs|requirements|aqa"
FOREIGN = {"--signal", "--nproc-per-node", "--input", "--recursive"}  # of Slurm, torchrun, MMAU's script
SEED = (  # the sections of the founding document, in its order
    "Overview, File Structure, Quick Start, Prerequisites, Step 1: Prepare the AVQA Dataset, "
    "Step 2: Configure and Run Training, Step 3: Dry-Run (Minimal Test), Step 4: Evaluate on MMAU Test-Mini, "
    "Batch Size Constraints, Common Issues, 1. Audio Path Not Found, 2. VRAM / OOM, 3. Inference Engine Issues, "
    "4. Output Key Mismatch with MMAU, 5. Think Mode, Design Decisions, Verification Checklist"
)
PYTHON = "python examples/r1_aqa/"
RESULTS = "results/demo/result_before.json results/demo/result_after.json"
DEMO = {f"{PYTHON}eval_mmau.py compare {RESULTS}", "make report RUN=results/demo/run", "make doctor", "make lint"}
SHOWN = {  # commands of the documents, and what they print; those of DEMO need its folder, or some seconds
    f"{PYTHON}train_colocate.py --plan --pretrain Qwen/Qwen2-Audio-7B-Instruct --bf16 --zero_stage 3": "8,397,094,912",
    f"{PYTHON}data_preprocess/get_data.py --help": "mmau",
    f"{PYTHON}report.py --help": "--groups",
    f"{PYTHON}aqa/report/metrics.py": "| `rollout/reward` |",
    "make help": "make demo",
    f"{PYTHON}eval_mmau.py compare {RESULTS}": "McNemar's test",
    "make report RUN=results/demo/run": "report.html",
    "make doctor": "transformers",
    "make lint": "All checks passed",
}
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code_of(path: Path) -> list[str]:
    """The lines of a document's blocks, continued lines joined, and its inline code."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", read(path), re.S | re.M)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", read(path), flags=re.S | re.M))
    return [" ".join(code.split()) for code in lines + inline]


def section(path: Path, heading: str) -> str:
    """From a heading to the next of any level."""
    return re.split(r"\n#+ ", read(path).split(f"# {heading}\n")[1])[0]


@functools.cache
def flags_of(script: Path) -> frozenset[str]:
    """The flags of a script and of its subcommands, from its help."""
    texts, words = [], [[]]
    for word in words:
        shown = run_command(sys.executable, script, *word, "--help", cwd=ROOT).stdout
        if "--help_all" in shown:
            shown = run_command(sys.executable, script, *word, "--help_all", cwd=ROOT).stdout
        texts.append(shown)
        commands = None if word else re.search(r"^\s+\{([\w,]+)\}", shown, re.M)
        words += [[name] for name in commands.group(1).split(",")] if commands else []
    return frozenset(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", "\n".join(texts)))


@functools.cache
def all_flags() -> frozenset[str]:
    """Those of everything that a person starts with flags."""
    folders = (EXAMPLE, EXAMPLE / "data_preprocess", EXAMPLE / "demo", ROOT / "benchmarks", ROOT / "benchmarks/gpu")
    scripts = [path for folder in folders for path in sorted(folder.glob("*.py")) if "__main__" in read(path)]
    return frozenset().union(
        *(flags_of(path) for path in scripts if re.search(r"\bParser\(|make_parser\(", read(path))), flags_of(TRAIN)
    )


@every_document
def test_flags_exist(path):
    missing = []
    for code in code_of(path):
        named = re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", code)
        if named and not re.search(r"\b(pip|ssh|sbatch|srun|git)\b", code):
            script = re.search(r"(?:examples|benchmarks)/[\w/]+\.py", code)
            known = flags_of(ROOT / script.group(0)) if script else all_flags()
            missing += [f"{flag} in: {code}" for flag in named if flag not in known | FOREIGN]
    assert missing == []


@every_document
def test_targets_files_and_links_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.M))
    missing = []
    for code in code_of(path) if path.name != "CHANGELOG.md" else []:  # it names what is gone
        missing += [f"make {name}" for name in re.findall(r"\bmake ([a-z][a-z-]*)", code) if name not in targets]
        names = re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w/.-]*", code)
        missing += [name for name in names if not (ROOT / name).exists() and not (EXAMPLE / name).exists()]
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", read(path)):
        file, _, anchor = target.partition("#")
        where = (path.parent / file).resolve() if file else path
        if not where.exists() or (anchor and anchor not in anchors_of(where)):
            missing.append(target)
    assert missing == []


def anchors_of(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", read(path))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_example_is_complete_in_its_folder():
    """No link of the manual, nor any message of the example, names a file outside it: it can be copied alone."""
    links = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", read(MANUAL))
    assert [link for link in links if ".." in link] == [] and re.findall(OUTSIDE, read(MANUAL)) == []
    headings = re.findall(r"(?m)^#{2,3} (.+)$", read(MANUAL))
    assert ", ".join(heading for heading in headings if heading in SEED) == SEED
    assert len(read(MANUAL).splitlines()) <= 300
    named = re.findall(OUTSIDE, "".join(re.findall("echo .*", read(LAUNCH_SCRIPT))))
    for path in EXAMPLE.rglob("*.py"):
        if path.name != "doctor.py":  # it names lists of versions where it finds them, else the manual
            named += [f"{path}: {text}" for text in messages(path) if re.search(OUTSIDE, text)]
    assert named == []


def messages(path: Path) -> list[str]:
    """The texts of a module, less its docstrings."""
    nodes = list(ast.walk(ast.parse(read(path))))
    prose = [node.value for node in nodes if isinstance(node, ast.Expr)]
    texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in texts if node not in prose]


def test_the_launch_scripts_variables_and_their_defaults():
    table = read(MANUAL).split("| variable | default | meaning |")[1].split("\n\n")[0]
    wrong = []
    for row in table.splitlines()[2:]:
        names, defaults = (cell.strip() for cell in row.strip("|").split("|")[:2])
        for name, value in zip(re.findall(r"`([A-Z][A-Z0-9_]*)(?:=\w+)?`", names), defaults.split(", "), strict=False):
            found = re.search(rf"{name}:-([^}}]*)}}", read(LAUNCH_SCRIPT))
            wrong += [name] * (name not in read(LAUNCH_SCRIPT) or bool(found and found.group(1) not in (value, "")))
    assert wrong == []


def test_messages_versions_and_the_commit_are_the_programs():
    """Messages in the first column of the troubleshooting tables, pinned versions, and LightRFT's commit."""
    from aqa.hosts.lightrft.contract import TESTED

    sources = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "runtime").rglob("*.py"), ROOT / "Makefile"]
    text = re.sub(r'"\s*f?"', "", "\n".join(map(read, sources)))  # a message may go over several lines
    rows = re.findall(r"(?m)^\| (.*?) \| ", read(ROOT / "docs/metrics.md").split("## Troubleshooting")[1])
    quoted = [message for cell in rows for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 30 and [message for message in quoted if message not in text] == []
    everything = "\n".join(map(read, (*DOCUMENTS, ROOT / "Makefile")))
    pins = set(re.findall(r"[\w-]+==[\d.]+", read(ROOT / "requirements/gpu.txt")))
    assert set(re.findall(r"[\w-]+==[\d.]+\d", read(MANUAL))) == pins
    assert set(re.findall(r"(?:checkout|commit) ([0-9a-f]{7,40})\b", everything)) == {TESTED.split()[-1]}


def shell(command: str, folder: Path = ROOT, **settings: object) -> str:
    """What commands print; the first that fails ends them."""
    command = re.sub(r"(?m)^python ", f"{shlex.quote(sys.executable)} ", command)
    return run_command("bash", "-e", "-c", command, cwd=folder, **settings).stdout


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.docs] * (c in DEMO)) for c in SHOWN])
def test_commands_run_and_show_what_is_said(command):
    assert any(command in code for path in DOCUMENTS for code in code_of(path)), "not documented"
    assert SHOWN[command] in shell(command)


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """An empty folder from which the documents' relative paths lead to the example and to make demo's folder."""
    (tmp_path / "results").mkdir()
    for name in ("examples", ".venv", "results/demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def block(path: Path, heading: str, begins: str) -> str:
    """A section's first block for bash that begins so."""
    return next(b for b in re.findall(r"```bash\n(.*?)```", section(path, heading), re.S) if b.startswith(begins))


@pytest.mark.docs
def test_the_manuals_steps_run_with_the_demos_files(elsewhere):
    shell(block(MANUAL, "Step 3: Dry-Run (Minimal Test)", "export"), elsewhere, PYTHON=sys.executable)
    (run,) = (elsewhere / "results/lightrft-r1-aqa-grpo-training").iterdir()
    records = [json.loads(line) for line in read(run / "metrics.jsonl").splitlines()]
    assert max(record["rollout/logprob_gap_max"] for record in records) < 1e-3
    for heading, hint, written in (
        ("Step 1: Prepare the AVQA Dataset", "With the demo's data:", "out/train.parquet"),
        ("Step 4: Evaluate on MMAU Test-Mini", "Demo:", "out.score.json"),
    ):
        command = re.search(r"(python \S+(?:avqa|mmau)\.py .*?[^\\])\n", section(MANUAL, heading), re.S).group(1)
        flags = section(MANUAL, heading).split(hint)[1].split(".\n")[0].replace("`", "").replace("\n", " ")
        out = "--local_save_dir out" if "out/" in written else "--out_file out.json"
        shell(f"{command.split('#')[0].replace('<your_run>', 'run').rstrip()} {flags} {out}", elsewhere)
        assert (elsewhere / written).is_file()


@pytest.mark.docs
def test_the_way_from_ones_own_sounds_to_a_score(elsewhere):
    """All commands of that document, on ten low tones and ten high ones."""
    text = read(ROOT / "docs/own_sounds.md")
    row, script, commands = (
        "".join(re.findall(rf"```{kind}\n(.*?)```", text, re.S)) for kind in ("json", "python", "bash")
    )
    for i in range(20):
        high, path = i % 2, elsewhere / "mine" / ("low", "high")[i % 2] / f"{i // 2}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = np.sin(2 * np.pi * (200 + 3000 * high + 40 * i) * np.arange(24000) / 16000)
        soundfile.write(path, tone, 16000)
    shell(f"python - <<'END'\n{script}END\n", elsewhere)
    rows = map(json.loads, read(elsewhere / "mine/rows.jsonl").splitlines())
    rows = [json.dumps(json.loads(row) | written | {"device": i // 4}) for i, written in enumerate(rows)]
    (elsewhere / "mine/rows.jsonl").write_text("\n".join(rows))
    shell(commands, elsewhere)
    assert json.loads(read(elsewhere / "results/own/result.score.json"))["accuracy"] == 1.0
