"""Real recordings for ``make demo-real``: sounds that Debian's packages hold, and questions about them.

Nothing of them is in this repository. ``apt-get download`` fetches the packages of ``real_packages.json``, in these
versions and with these hashes; neither root nor an installation is needed. ``SOURCES.md`` beside the data says from
which package each clip is, and under which licence.

    python examples/r1_aqa/demo/real_sounds.py --out_dir data/real --downloads data/downloads

Five kinds of question ask what is said or played, a sixth which kind of sound it is. A group is a voice, a drum with
all its strokes, or a single recording. A group is in the training or in the test set as a whole, so that the model is
tested on voices and drums that it has never heard; which ones they are, the seed decides (``hold_out``). No two clips
have the same bytes.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aqa.audio.decode import AudioError, load_audio
from aqa.common.arguments import Parser
from demo import written
from demo.make_data import test_row, train_row
from demo.whisper import check

PACKAGES = Path(__file__).with_name("real_packages.json")
REMEDY = (
    "the versions are Debian 12's (bookworm): there, run apt-get update once as root, and try again with a network; "
    "elsewhere, use a container of it (debian:bookworm)"
)
MAX_SECONDS = 1.5  # of longer recordings only the beginning is used, so that a step stays short
# Every clip stands within silence and is as long as all others. Whisper knows sounds within silence, and Qwen2-Audio
# shows it the clip's own frames alone: of clips that are cut close it hears less. Their length would tell a cymbal from
# a kick, also in an evaluation with silence, which keeps it.
SILENCE_BEFORE, CLIP_SECONDS = 0.25, 2.25
NUM_OPTIONS = 3
QUESTIONS = {
    "letter": "Which letter is read out?",
    "digit": "Which number is read out?",
    "month": "Which month is named?",
    "code word": "Which code word of the spelling alphabet is read out?",
    "drum": "Which part of a drum kit is played?",
    "source": "What do you hear?",
}
# Six answers of each kind, so that each is practised often enough in ten minutes. The letters are the first consonants
# whose names keep their sound from language to language (C, G, H and J do not), without those that a telephone, which
# some voices come through, blurs with others (B, D, P and T; M and N).
LETTERS = "fklmqr"
DIGITS = ["one", "two", "three", "four", "five", "six"]
MONTHS = ["january", "february", "march", "april", "may", "june"]
CODE_WORDS = ["alfa", "bravo", "charlie", "delta", "echo", "foxtrot"]
# Patterns of file names. Rim shots, side sticks and rolls (SN3 in BJA_Pacific) are left out, and toms, which sound like
# kicks or snares from one kit to the next.
DRUMS = {
    "kick": r"kick|bassdrum|(^|_)bd",
    "snare": r"snare(?!off|rim|stick)|(^|_)s[dn]4?_",
    "cymbal": r"crash|ride|splash|china|^cc|^r[cd]",
}
LANGUAGES = "en|de|nl|sv|nb|nn|fr|es|ca|it|pt|ro|ru|bg|be|sl|lt"  # of Europe, whose words for numbers are related
VOICE = r"asterisk/sounds/(?P<language>[a-z]{2})\w*?(?P<group>[a-zA-Z]*)/"
# kind of question, and a pattern of the path's end: the group (voice, kit) and the label (the right answer)
PATTERNS = (
    ("letter", VOICE + rf"letters/(?P<label>[{LETTERS}])\.\w+"),
    ("letter", rf"klettres/(?P<group>(?P<language>[a-z]+)\w*)/alpha/(?P<label>(?i:[{LETTERS}]))\.ogg"),
    ("letter", rf"english/filled/\w+/(?P<label>(?i:[{LETTERS}]))_filled_(?P<group>(?P<language>en)_GB)\.ogg"),
    ("digit", VOICE + r"digits/(?P<label>[1-6])\.\w+"),
    ("digit", rf"symbols/math/(?P<label>[1-6])_?(?P<group>|(?P<language>{LANGUAGES})(_GB)?)\.ogg"),
    ("month", VOICE + r"(digits/)?mon-(?P<label>[0-5])\.\w+"),
    ("code word", VOICE + r"phonetic/(ICAO/)?(?P<label>[a-f])_p\.\w+"),
    # a drum's name, then strength or number of the stroke; Millo's three kits are of one drummer, who has one of each
    ("drum", r"hydrogen/data/drumkits/(?P<group>Millo|[^/]+)[^/]*/(?P<label>(?P<drum>[^-_ .]+)[^/]*)"),
    ("drum", r"sonic-pi/samples/(?P<group>(?P<label>(bd|drum|sn)_[^/]+))"),
    ("drum", r"lmms/samples/drums/(?P<group>(?P<label>[^/]+))"),
    ("source", r"stamps/(?P<label>animals)/(?P<group>(?!.*_desc).*)\.ogg"),
    # music without beats and loops, which are drums as well
    ("source", r"sonic-pi/samples/(?P<group>(?P<label>bass|ambi|guit)_.*)"),
    ("source", r"lmms/samples/(?P<group>(?P<label>basses|bassloops|instruments|stringsnpads)/.*)"),
)
# Italian cities in place of code words; a kit of found noises, whose drumkit.xml plays tom-0105.wav as the kick
NOT_USED = r"(Carlo|Menardi)/phonetic/._p|drumkits/Audiophob"
TEST_CLIPS = 12  # of each answer, at most


class Clip(NamedTuple):
    """A recording: the kind of question that it is for, the right answer, who or what is heard, in which language."""

    path: Path
    package: str
    kind: str
    label: str
    group: str
    language: str


def fetch(folder: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """Download and unpack the packages that are not there yet.

    :param folder: The packages' files go here, and a folder with what is used of their contents.
    :return: That folder, and the packages by name.
    :raises SystemExit: without apt, or if a package cannot be had or is another than expected.
    """
    packages = {entry["package"]: entry for entry in json.loads(PACKAGES.read_text(encoding="utf-8"))}
    folder.mkdir(parents=True, exist_ok=True)
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(
                f"make demo-real takes its sounds from Debian 12's packages, and {tool} is missing: {REMEDY}"
            )
    unpacked = folder / f"unpacked-{hashlib.sha256(repr(PATTERNS).encode()).hexdigest()[:8]}"
    for number, (name, entry) in enumerate(packages.items(), 1):
        file = folder / f"{name}_{entry['version'].replace(':', '%3a')}_all.deb"
        if not file.exists():
            print(f"real sounds: downloading {number} of {len(packages)}, {name} ({entry['licence']})", flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:  # so that no half a file takes the name
                command = ["apt-get", "-qq", "download", f"{name}={entry['version']}"]
                done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
                if done.returncode != 0:
                    raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}\n{REMEDY}")
                check(Path(temporary) / file.name, entry["sha256"])
                (Path(temporary) / file.name).rename(file)
        check(file, entry["sha256"])
        unpack(file, unpacked / name)
    return unpacked, packages


def unpack(package: Path, target: Path) -> None:
    """Write what questions can be asked about, and the licence; an eighth of the packages' contents."""
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    wanted = re.compile("|".join(re.sub(r"\?P<\w+>", "", pattern) for _, pattern in PATTERNS) + "|/copyright$")
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        tempfile.TemporaryDirectory(dir=target.parent.parent) as temporary,
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile() and wanted.search(member.name):
                path = Path(temporary, member.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())  # Debian 12's Python has no safe extract() yet
        try:
            (Path(temporary) / "usr").rename(target)
        except OSError:
            if not target.exists():  # else another demo was faster
                raise


def label_of(kind: str, text: str) -> str | None:
    """The right answer, from what the file's name says; None if it is not asked about."""
    if kind == "letter":
        return text.upper()
    if kind == "digit":
        return DIGITS[int(text) - 1]
    if kind == "month":
        return MONTHS[int(text)]
    if kind == "code word":
        return CODE_WORDS["abcdef".index(text)]
    if kind == "drum":
        if re.search(r"rim|stick|roll|click|bell", text, re.IGNORECASE):
            return None
        return next((drum for drum, names in DRUMS.items() if re.search(names, text, re.IGNORECASE)), None)
    return "animal" if text == "animals" else "music"


def find_clips(unpacked: Path) -> Iterator[Clip]:
    """The recordings that questions can be asked about, each content once, in the order of their names.

    :param unpacked: Folder with one folder a package.
    """
    seen = set()
    for path in sorted(path for path in unpacked.rglob("*") if path.is_file() and not path.is_symlink()):
        name = path.relative_to(unpacked).as_posix()
        if re.search(NOT_USED, name):
            continue
        for kind, pattern in PATTERNS:
            match = re.search(pattern + "$", name)
            label = match and label_of(kind, match["label"])
            if not label:
                continue
            package = name.split("/")[0]
            # one of Asterisk's voices speaks in two packages, in others no voice has a name
            group = " ".join(filter(None, (match["group"], match.groupdict().get("drum"))))
            group = group if package.startswith("asterisk-core") else f"{package} {group}".strip()
            # numbers without a language are English, and code words are the same in all
            language = match.groupdict("en").get("language", "") if kind in ("letter", "digit", "month") else ""
            content = hashlib.sha256(path.read_bytes()).digest()
            if content not in seen:
                seen.add(content)
                yield Clip(path, package, kind, label, group, language)
            break


def read_clip(path: Path) -> tuple[np.ndarray, int] | None:
    """Waveform ``(samples, channels)`` and sampling rate in Hz; None if it is damaged or silent."""
    raw = {"format": "RAW", "subtype": "GSM610", "channels": 1, "samplerate": 8000} if path.suffix == ".gsm" else {}
    try:
        wave, rate = soundfile.read(path, always_2d=True, **raw)
        if not raw:
            load_audio(path)  # refuses what training would refuse
    except (AudioError, soundfile.LibsndfileError):
        return None
    wave = wave[: int(MAX_SECONDS * rate)]
    return (wave, rate) if wave.any() else None


def hold_out(clips: list[Clip], seed: int) -> set[str]:
    """The groups of the test set, in the order of a hash: up to a quarter of the clips of each answer of a kind.

    A voice that is held out for one kind is held out for the others, too, whose share may be larger then.

    A voice is held out only if another one speaks its language in the training set: nobody understands the numbers of
    a language that he has never heard.
    """
    held: set[str] = set()
    for kind in dict.fromkeys(clip.kind for clip in clips):
        members = [clip for clip in clips if clip.kind == kind]
        limits = Counter(clip.label for clip in members)
        for group in sorted(
            {clip.group for clip in members}, key=lambda g: hashlib.sha256(f"{seed} {g}".encode()).digest()
        ):
            test = held | {group}
            own = {(clip.kind, clip.language) for clip in clips if clip.group == group and clip.language}
            others = {(clip.kind, clip.language) for clip in clips if clip.group not in test}
            counts = Counter(clip.label for clip in members if clip.group in test)
            if own <= others and all(counts[label] <= limit / 4 for label, limit in limits.items()):
                held = test
    return held


class Question(NamedTuple):
    """One question about one clip, and its options."""

    clip: Clip
    file: str
    kind: str
    options: list[str]
    answer: str


Pools = dict[str, dict[str, list[tuple[Clip, str]]]]  # clips and their files, by kind of question and right answer


def write_clips(clips: list[Clip], seed: int, folder: Path) -> dict[str, Pools]:
    """Write the usable clips as wav files, whose names do not give their contents away.

    :param seed: Of the split.
    :return: The pools of ``train`` and of ``test``.
    """
    pools: dict[str, Pools] = {split: {kind: {} for kind in QUESTIONS} for split in ("train", "test")}
    held = hold_out(clips, seed)
    for number, clip in enumerate(clips):
        if (sound := read_clip(clip.path)) is None:
            continue
        split = "test" if clip.group in held else "train"
        file = f"{'test-' if split == 'test' else ''}audios/{number:05d}.wav"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        wave, rate = sound
        padded = np.zeros((int(CLIP_SECONDS * rate), wave.shape[1]))
        start = int(SILENCE_BEFORE * rate)
        padded[start : start + len(wave)] = wave
        soundfile.write(folder / file, padded, rate, subtype="PCM_16")
        pools[split][clip.kind].setdefault(clip.label, []).append((clip, file))
        if clip.kind != "source":
            source = "drum" if clip.kind == "drum" else "voice"
            pools[split]["source"].setdefault(source, []).append((clip, file))
    return pools


def ask(kind: str, answers: list[str], clip: Clip, file: str, answer: str, rng: np.random.Generator) -> Question:
    """Ask about a clip, with two wrong options of its kind."""
    others = [other for other in answers if other != answer]
    options = [answer, *rng.choice(others, NUM_OPTIONS - 1, replace=False)]
    return Question(clip, file, kind, [str(options[i]) for i in rng.permutation(NUM_OPTIONS)], answer)


def draw_questions(pools: Pools, asked: Counter[str], count: int, rng: np.random.Generator) -> list[Question]:
    """Training questions: all answers of a kind come equally often, and a kind that is asked more often takes more.

    :param asked: Test questions of each kind; the shares are their square roots, so that rare kinds are learned, too.
    """
    questions = []
    weights = np.sqrt([asked[kind] for kind in QUESTIONS])
    for kind in rng.choice(list(QUESTIONS), count, p=weights / weights.sum()).tolist():
        answers = sorted(pools[kind])
        answer = str(rng.choice(answers))
        clip, file = pools[kind][answer][rng.integers(len(pools[kind][answer]))]
        questions.append(ask(kind, answers, clip, file, answer, rng))
    return questions


def test_questions(pools: Pools, rng: np.random.Generator) -> list[Question]:
    """Test questions: as many clips of each answer as there are, up to a limit."""
    questions = []
    for kind, by_answer in pools.items():
        for answer, members in sorted(by_answer.items()):
            for i in rng.permutation(len(members))[:TEST_CLIPS]:
                questions.append(ask(kind, sorted(by_answer), *members[i], answer, rng))
    return questions


def make_data(out_dir: Path, downloads: Path, seed: int, count: int) -> None:
    """Write the data folder, in the demo's layout; it appears under its name only once it is complete.

    :param out_dir: Folder to write; one of the demo is replaced.
    :param downloads: Where the packages are, or will be.
    :param count: Number of training questions.
    """
    unpacked, packages = fetch(downloads)
    train_rng, test_rng = (np.random.default_rng([seed, stream]) for stream in range(2))
    with written(out_dir, "demo-test.json") as folder:
        pools = write_clips(list(find_clips(unpacked)), seed, folder)
        test = test_questions(pools["test"], test_rng)
        train = draw_questions(pools["train"], Counter(q.kind for q in test), count, train_rng)
        rows = [
            train_row(i, QUESTIONS[q.kind], q.options, q.answer, q.file)
            | {"question_type": q.kind, "group": q.clip.group}
            for i, q in enumerate(train)
        ]
        (folder / "train_qa.data").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        rows = [
            test_row(f"{q.kind}-{i}", QUESTIONS[q.kind], q.options, q.answer, q.file)
            | {"task": q.kind, "sub-category": q.clip.group, "group": q.clip.group}
            for i, q in enumerate(test)
        ]
        (folder / "demo-test.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        describe(pools, packages, folder)


def describe(pools: dict[str, Pools], packages: dict[str, dict[str, str]], folder: Path) -> None:
    """Print what there is of each kind, and write where each clip is from.

    :raises SystemExit: if a group is on both sides.
    """
    clips = {split: {file: c for of in p.values() for m in of.values() for c, file in m} for split, p in pools.items()}
    groups = {split: {clip.group for clip in found.values()} for split, found in clips.items()}
    if both := groups["train"] & groups["test"]:
        raise SystemExit(f"in the training and in the test set: {', '.join(sorted(both))}")
    lines = [
        "# Where the sounds are from",
        "",
        "Each package's own text is in the downloads' folder, unpacked-*/PACKAGE/share/doc/PACKAGE/copyright.",
        "",
        "| package | version | licence | clips |",
        "|---|---|---|---|",
    ]
    numbers = Counter(clip.package for found in clips.values() for clip in found.values())
    for name, entry in packages.items():
        lines.append(f"| {name} | {entry['version']} | {entry['licence']} | {numbers[name]} |")
    lines += ["", "| clip | package | file |", "|---|---|---|"]
    lines += [
        f"| {file} | {clip.package} | {clip.path.name} |" for found in clips.values() for file, clip in found.items()
    ]
    (folder / "SOURCES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split, found in clips.items():
        kinds = Counter(clip.kind for clip in found.values())
        print(
            f"real sounds, {split}: {len(found)} clips of {len(groups[split])} voices, drums and single recordings: "
            + ", ".join(f"{kind} {number}" for kind, number in kinds.items())
        )


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument("--downloads", type=Path, required=True, help="folder of the packages, kept for the next time")
    parser.add_argument("--seed", type=int, default=0, help="seed of split and questions (default: %(default)s)")
    parser.add_argument("--train_questions", type=int, default=1280, help="their number (default: %(default)s)")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        make_data(args.out_dir, args.downloads, args.seed, args.train_questions)
    except KeyboardInterrupt:
        raise SystemExit("real sounds: stopped; the packages that are complete are kept") from None
    print(f"real sounds: {time.perf_counter() - start:.1f} s -> {args.out_dir}; licences: {args.out_dir}/SOURCES.md")


if __name__ == "__main__":
    main()
