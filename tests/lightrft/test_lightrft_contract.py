"""The contract with LightRFT: a package that keeps it passes, and whatever breaks it is named.

Most tests run on small packages made here. With LIGHTRFT_HOME set, LightRFT's own source is checked too.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from aqa.hosts.lightrft.contract import CONTRACT, TESTED, Spot, check_contract, find_violations

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "r1_aqa"
PATHS = [spot.path for spot in CONTRACT]
WITH_PARAMETERS = [spot.path for spot in CONTRACT if spot.parameters]


def split(path: str) -> tuple[list[str], list[str]]:
    """Module and names of a path: the names begin with a class, or are only the last."""
    parts = path.split(".")
    name = len(parts) - (2 if ".".join(parts[:-1]) in PATHS else 1)  # of a call, the function that makes it
    first = next((i for i, part in enumerate(parts) if part != part.lower()), name)
    return parts[:first], parts[first:]


def build(folder: Path, contract: list[Spot]) -> Path:
    """Write a package that has these spots and nothing else."""
    modules: dict[tuple[str, ...], dict] = {}
    for spot in contract:
        module, names = split(spot.path)
        for depth in range(1, len(module)):
            modules.setdefault(tuple(module[:depth]), {})
        node = modules.setdefault(tuple(module), {})
        for name in names:
            node = node.setdefault(name, {})
        node["("] = spot.parameters
    for module, names in modules.items():
        is_package = any(other[:-1] == module for other in modules)
        file = folder.joinpath(*module, "__init__.py") if is_package else folder.joinpath(*module).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(write(name, node, "") for name, node in names.items()), encoding="utf-8")
    return folder / "lightrft"


def write(name: str, node: dict, indent: str) -> str:
    """Source of a class, constant or function and of what is in it."""
    inside = {key: value for key, value in node.items() if key != "("}
    parameters = node.get("(", ())
    if name.isupper():
        return f"{indent}{name} = {{}}"
    if name != name.lower():
        body = [write(key, value, indent + "    ") for key, value in inside.items()]
        return "\n".join([f"{indent}class {name}:", *(body or [f"{indent}    pass"])])
    calls = [f"{indent}    it.{key}({', '.join(f'{p}=0' for p in value['('])})" for key, value in inside.items()]
    listed = ", ".join([*(["self"] if indent else []), *parameters])
    return "\n".join([f"{indent}def {name}({listed}):", *(calls or [f"{indent}    pass"])])


def named(violations: list[str]) -> set[str]:
    return {line.split(": ")[0] for line in violations}


def of(path: str) -> Spot:
    return next(spot for spot in CONTRACT if spot.path == path)


def check(folder: Path, files: dict[str, str] | str, name: str, *parameters: str, **fields) -> str | None:
    """What is said about ``lightrft.m.<name>`` in a package of these files; None if it fits."""
    for file, source in ({"m.py": files} if isinstance(files, str) else files).items():
        path = folder / "lightrft" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    found = find_violations(folder / "lightrft", [Spot(f"lightrft.m.{name}", parameters, "0.1.0", "why", **fields)])
    assert len(found) <= 1
    return found[0] if found else None


# ------------------------------------------------------------------------------------------------------ the whole table
def test_the_table_is_read_as_it_is_meant():
    assert len(CONTRACT) == 79
    assert len(set(PATHS)) == len(PATHS)
    for spot in CONTRACT:
        assert re.fullmatch(r"lightrft(\.\w+){2,}", spot.path), spot
        assert re.fullmatch(r"0\.1\.[01]|2026-0[123]-\d\d", spot.since), spot
        assert all(name.isidentifier() for name in spot.parameters), spot
        assert len(set(spot.parameters)) == len(spot.parameters), spot
        assert 0 <= spot.positional <= len(spot.parameters), spot
        assert spot.why and spot.why == spot.why.strip() and "|" not in spot.why, spot
    assert of("lightrft.strategy.deepspeed.deepspeed.DeepspeedStrategy.load_ckpt") == Spot(
        "lightrft.strategy.deepspeed.deepspeed.DeepspeedStrategy.load_ckpt",
        ("model", "load_dir", "optimizer", "scheduler"),
        "0.1.0",
        "resumes",
        positional=2,
    )
    trainer = of("lightrft.trainer.ppo_trainer_vl.PPOTrainerVL.__init__")  # over several lines of the table
    assert (len(trainer.parameters), trainer.positional, trainer.explicit) == (23, 10, True)
    assert (trainer.parameters[0], trainer.parameters[-1]) == ("strategy", "disable_ds_ckpt")


def test_a_package_with_all_spots_passes(tmp_path):
    package = build(tmp_path, CONTRACT)
    assert find_violations(package) == []
    assert check_contract(package) is None


@pytest.mark.parametrize("path", PATHS)
def test_a_missing_spot_is_named(tmp_path, path):
    gone = {other for other in PATHS if f"{other}.".startswith(f"{path}.")}  # with the calls in a function
    violations = find_violations(build(tmp_path, [spot for spot in CONTRACT if spot.path not in gone]))
    assert named(violations) == gone
    assert len(violations) == len(gone)
    assert all("found missing: no " in line and line.endswith(of(line.split(": ")[0]).why) for line in violations)


@pytest.mark.parametrize("path", WITH_PARAMETERS)
def test_a_renamed_parameter_is_named(tmp_path, path):
    spot = of(path)
    renamed = replace(spot, parameters=("renamed", *spot.parameters[1:]))
    (line,) = find_violations(build(tmp_path, [renamed if other is spot else other for other in CONTRACT]))
    assert named([line]) == {path}
    assert f"expected ({', '.join(spot.parameters)})" in line
    assert f"({', '.join(renamed.parameters)})" in line.split("; found ")[1]


# ----------------------------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ("def f(a, b): ...", {}),
        ("def f(b, a): ...", {}),
        ("def f(a, b, c=0, *, d=0): ...", {"positional": 2}),
        ("def f(a, *, b): ...", {"positional": 1}),
        ("def f(a, b, /): ...", {"positional": 2}),
        ("def f(a, **kwargs): ...", {"positional": 1}),
        ("def f(**kwargs): ...", {}),
        ("def f(*args, b): ...", {"positional": 1}),
        ("def f(*args, **kwargs): ...", {"positional": 2}),
        ("def f(a, *args, b, **kwargs): ...", {"positional": 1, "explicit": True}),
        ("async def f(a, b): ...", {}),
        ("from elsewhere import f", {}),
        ("from lightrft_of_others import f", {}),
    ],
)
def test_parameters_that_fit(tmp_path, source, fields):
    assert check(tmp_path, source, "f", "a", "b", **fields) is None


@pytest.mark.parametrize(
    ("source", "fields", "found"),
    [
        ("def f(a): ...", {}, "(a)"),
        ("def f(b, a): ...", {"positional": 1}, "(b, a)"),
        ("def f(a, c=0, b=0): ...", {"positional": 2}, "(a, c, b)"),
        ("def f(b=0, *args, a=0): ...", {"positional": 1}, "(b, *args, a)"),
        ("def f(*, a=0, b=0): ...", {"positional": 1}, "(*, a, b)"),
        ("def f(a, b, /): ...", {"positional": 1}, "(a, b)"),
        ("def f(a, *args): ...", {"positional": 1}, "(a, *args)"),
        ("def f(a, **kwargs): ...", {"positional": 2}, "(a, **kwargs)"),
        ("def f(a, **kwargs): ...", {"positional": 1, "explicit": True}, "(a, **kwargs)"),
        ("def f(a, b, new): ...", {}, "(a, b, new)"),
        ("def f(a, b, *, new): ...", {}, "(a, b, *, new)"),
        ("f = make()", {}, "Assign, whose parameters cannot be read"),
        ("class f: ...", {}, "ClassDef, whose parameters cannot be read"),
    ],
)
def test_parameters_that_do_not_fit_are_shown(tmp_path, source, fields, found):
    assert check(tmp_path, source, "f", "a", "b", **fields) == (
        f"lightrft.m.f: expected (a, b), as since 0.1.0; found {found}; here: why"
    )


@pytest.mark.parametrize("parameters", ["self, a", "this, /, a", "self, *args"])
def test_self_is_no_parameter(tmp_path, parameters):
    source = f"class C:\n    def f({parameters}): ...\n    @classmethod\n    def g({parameters}): ..."
    assert check(tmp_path, source, "C.f", "a", positional=1) is None
    assert check(tmp_path, source, "C.g", "a", positional=1) is None


def test_static_methods_and_functions_have_no_self(tmp_path):
    source = "class C:\n    @staticmethod\n    def f(a): ...\ndef g(a): ..."
    assert check(tmp_path, source, "C.f", "a", positional=1) is None
    assert check(tmp_path, source, "g", "a", positional=1) is None


# ---------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    "source",
    [
        "class C:\n    x = 0",
        "class C:\n    x: int",
        "class C:\n    class x: ...",
        "class C:\n    def any(self):\n        self.x = 0",
        "class C:\n    def any(self):\n        if 1:\n            self.y, self.x = 0, 0",
        "class C:\n    def any(self):\n        self.x: int = 0",
        "class C:\n    if 1: ...\n    else:\n        def x(self): ...",
        "if 1:\n    class C:\n        x = 0",
        "try:\n    import gone\nexcept ImportError:\n    class C:\n        x = 0",
        "with 1:\n    class C:\n        x = 0",
    ],
)
def test_attributes_that_are_there(tmp_path, source):
    assert check(tmp_path, source, "C.x") is None


@pytest.mark.parametrize(
    "source",
    [
        "class C: ...",
        "x = 0\nclass C: ...",
        "class C:\n    def any(self):\n        return self.x",
        "class C:\n    def any(self):\n        x = 0",
        "class C:\n    def any(self, other):\n        other.x = 0",
        "class C:\n    def any(self):\n        self.x.y = 0",
        "class D:\n    x = 0\nclass C(D): ...",  # the class itself has to define it
    ],
)
def test_attributes_that_are_not_there(tmp_path, source):
    where = f"lightrft{os.sep}m.py"
    assert check(tmp_path, source, "C.x") == (
        f"lightrft.m.C.x: expected it to exist, as since 0.1.0; found missing: no C.x in {where}; here: why"
    )


@pytest.mark.parametrize("standin", ["f = None", "def f(): ...", "from elsewhere import f"])
def test_of_several_definitions_the_last_counts_and_an_assignment_last_of_all(tmp_path, standin):
    assert check(tmp_path, f"try:\n    {standin}\nexcept E: ...\ndef f(a): ...", "f", "a") is None
    assert check(tmp_path, "def f(a): ...\nf = decorated(f)", "f", "a") is None
    assert check(tmp_path, "def f(a): ...\ndef f(b): ...", "f", "a") is not None


# ---------------------------------------------------------------------------------------------------------------- calls
@pytest.mark.parametrize(
    "body",
    ["it.g(a=0, b=0)", "g(b=0, a=0, more=0)", "x = [y.z.g(0, a=0, b=0)]", "it.g(**all)", "g(a=0)\n    g(a=0, b=0)"],
)
def test_calls_that_pass_the_keywords(tmp_path, body):
    assert check(tmp_path, f"def f(x):\n    {body}", "f.g", "a", "b") is None
    assert check(tmp_path, f"class C:\n  def f(self):\n    {body}", "C.f.g", "a", "b") is None


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("it.g(a=0)", "calls with (a)"),
        ("it.g(0, 0)", "calls with ()"),
        ("it.g(a=0); it.g(b=0, c=0)", "calls with (a), (b, c)"),
        ("it.h(a=0, b=0)", f"missing: no f.g in lightrft{os.sep}m.py"),
        ("it.g", f"missing: no f.g in lightrft{os.sep}m.py"),
    ],
)
def test_calls_that_do_not_are_shown(tmp_path, body, found):
    source = f"def f(x):\n    {body}\ndef other():\n    it.g(a=0, b=0)"
    assert f"; found {found}; here: why" in check(tmp_path, source, "f.g", "a", "b")


# ----------------------------------------------------------------------------------------------------------- re-exports
@pytest.mark.parametrize(
    "files",
    [
        {"m/__init__.py": "from .part import f", "m/part.py": "def f({}): ..."},
        {"m/__init__.py": "from .part import x, g as f", "m/part.py": "def g({}): ..."},
        {"m/__init__.py": "from lightrft.m.part import f", "m/part.py": "def f({}): ..."},
        {"m/__init__.py": "from ..n.part import f", "n/__init__.py": "", "n/part.py": "def f({}): ..."},
        {"m.py": "from .n import f", "n/__init__.py": "from .part import f", "n/part.py": "def f({}): ..."},
        {"m.py": "from lightrft import f", "__init__.py": "def f({}): ..."},
        {"m.py": "from .n import f", "n.py": "from elsewhere import f\ndef f({}): ..."},
    ],
)
def test_reexports_are_followed(tmp_path, files):
    assert check(tmp_path, {name: source.format("a") for name, source in files.items()}, "f", "a") is None
    wrong = check(tmp_path, {name: source.format("b") for name, source in files.items()}, "f", "a")
    assert "found (b);" in wrong


def test_members_of_reexported_classes_and_modules_are_found(tmp_path):
    files = {"m/__init__.py": "from .part import C\nfrom .. import n", "m/part.py": "class C:\n    def f(self, a): ..."}
    files["n.py"] = "def g(a): ..."
    assert check(tmp_path, files, "C.f", "a", positional=1) is None
    assert "found (a);" in check(tmp_path, files, "C.f", "b")
    assert check(tmp_path, files, "n.g", "a", positional=1) is None


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"m.py": "from .n import f", "n.py": ""}, f"missing: no f in lightrft{os.sep}n.py"),
        ({"m.py": "from .n import f", "n.py": "from .m import f"}, "missing: modules import it from each other"),
        ({"m.py": "from .n.p import f", "n/p.py": "f ="}, f"{Path('lightrft/n/p.py')}, which does not parse"),
        ({"__init__.py": "", "n.py": "def f(): ..."}, f"missing: no m in {Path('lightrft/__init__.py')}"),
        ({"m/part.py": "def f(): ..."}, f"missing: no {Path('lightrft/m/__init__.py')}"),
        ({"m.py": "import f.g"}, f"missing: no f in lightrft{os.sep}m.py"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, files, found):
    assert f"; found {found}" in check(tmp_path, files, "f")


@pytest.mark.parametrize("content", [b"def f(:", b"\xff\xfe", b"x = '\0'"], ids=["syntax", "encoding", "null"])
def test_a_module_that_does_not_parse_is_a_violation_of_its_spots_alone(tmp_path, content):
    package = build(tmp_path, CONTRACT)
    (package / "models" / "actor_al.py").write_bytes(content)
    violations = find_violations(package)
    assert named(violations) == {path for path in PATHS if path.startswith("lightrft.models.actor_al.")}
    assert all(f"{Path('lightrft/models/actor_al.py')}, which does not parse: " in line for line in violations)


# -------------------------------------------------------------------------------------------------------------- message
def test_one_message_lists_all_violations(tmp_path):
    broken = [
        "lightrft.utils.add_arguments",
        "lightrft.strategy.get_strategy",
        "lightrft.trainer.ppo_trainer_vl.PPOTrainerVL.fit",
    ]
    package = build(tmp_path, [spot for spot in CONTRACT if spot.path not in broken])
    with pytest.raises(SystemExit) as stop:
        check_contract(package)
    first, *listed, last = stop.value.code.split("\n")
    assert first == (
        f"LightRFT (unknown version) in {package} differs from the one tested, {TESTED}, in 3 of the 79 places that "
        "this example relies on:"
    )
    assert [line.removeprefix("  - ") for line in listed] == find_violations(package)
    assert named([line.removeprefix("  - ") for line in listed]) == set(broken)
    assert "49e62cb" in last and "report this list" in last
    assert TESTED == "0.1.1 at commit 49e62cb"


@pytest.mark.parametrize(
    ("init", "setup", "version"),
    [
        ("__version__ = '9.8.7'\n", 'setup(\n    version="0.1.1",\n)', "9.8.7"),
        ("", 'setup(\n    name="x",\n    version="0.1.1",\n)', "0.1.1"),
        ("", "setup()", "(unknown version)"),
        ("def broken(:\n__version__ = '9.8.7'\n", None, "9.8.7"),
    ],
)
def test_the_message_names_the_version(tmp_path, init, setup, version):
    (tmp_path / "lightrft").mkdir()
    (tmp_path / "lightrft" / "__init__.py").write_text(init, encoding="utf-8")
    if setup is not None:
        (tmp_path / "setup.py").write_text(setup, encoding="utf-8")
    with pytest.raises(SystemExit, match=re.escape(f"LightRFT {version} in {tmp_path / 'lightrft'} differs")):
        check_contract(tmp_path / "lightrft")


def test_nothing_is_a_violation_of_everything(tmp_path):
    assert named(find_violations(tmp_path / "lightrft")) == set(PATHS)


def test_nothing_is_imported(tmp_path):
    package = build(tmp_path, CONTRACT)
    for file in package.rglob("*.py"):
        file.write_text(f"raise SystemExit('imported')\n{file.read_text(encoding='utf-8')}", encoding="utf-8")
    code = "import sys, pathlib; from aqa.hosts.lightrft import contract as c; "
    code += "c.check_contract(pathlib.Path(sys.argv[1])); print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE), str(tmp_path)])}
    command = [sys.executable, "-S", "-c", code, str(package)]  # -S: without any installed package
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    outside = {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert outside - {"__main__"} == {"aqa"}


# ------------------------------------------------------------------------------------------------------- the real thing
@pytest.fixture(scope="module")
def checkout() -> Path:
    if "LIGHTRFT_HOME" not in os.environ:
        pytest.skip("LIGHTRFT_HOME is not set: no checkout of LightRFT to compare with")
    return Path(os.environ["LIGHTRFT_HOME"]) / "lightrft"


@pytest.fixture(scope="module")
def copied(checkout, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("checkout") / "lightrft"
    return Path(shutil.copytree(checkout, target, ignore=shutil.ignore_patterns("__pycache__")))


def test_lightrft_itself_passes_quickly(checkout):
    started = time.process_time()
    check_contract(checkout)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("path", PATHS)
def test_a_spot_renamed_in_lightrft_is_named(copied, path):
    module, names = split(path)
    file = copied.joinpath(*module[1:]).with_suffix(".py")
    if not file.is_file():
        file = copied.joinpath(*module[1:], "__init__.py")
    source = file.read_bytes()
    assert find_violations(copied, [of(path)]) == []
    try:
        file.write_bytes(re.sub(rb"\b%s\b" % names[-1].encode(), b"renamed", source))
        (line,) = find_violations(copied, [of(path)])
    finally:
        file.write_bytes(source)
    assert named([line]) == {path}
    assert "; found missing: no " in line


def test_a_function_gone_from_behind_a_reexport_is_named(copied):
    file = copied / "utils" / "cli_args.py"
    source = file.read_bytes()
    try:
        file.write_bytes(source.replace(b"def add_arguments(", b"def renamed("))
        (line,) = find_violations(copied)
    finally:
        file.write_bytes(source)
    assert line.startswith("lightrft.utils.add_arguments: ")
