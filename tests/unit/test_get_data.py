"""get_data.py: sound out of real videos, recordings out of real archives, broken ones among them."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import get_data
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from avqa import main as avqa
from conftest import EXAMPLE, run_command, wait_for
from pyarrow import parquet

from aqa.audio.decode import load_audio
from aqa.data import extract_audio, unpack_audio
from aqa.data.rows import AvqaError, read_records
from aqa.evaluation.items import EvalError, read_rows

SCRIPT = EXAMPLE / "data_preprocess" / "get_data.py"
needs_ffmpeg = pytest.mark.skipif(
    bool(extract_audio.missing_tools()), reason="ffmpeg and ffprobe are not installed (apt-get install ffmpeg)"
)


def ffmpeg(*arguments: object) -> None:
    run_command("ffmpeg", "-nostdin", "-v", "error", "-y", *arguments)


def make_video(path: Path, seconds: float = 2, sound: str = "sine=440", *options: str) -> Path:
    """A small video with a tone of 440 Hz; no sound if that is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = ("-f", "lavfi", "-i", f"color=d={seconds}:s=64x64:r=5")
    tone = ("-f", "lavfi", "-t", seconds, "-i", sound, "-c:a", "aac") if sound else ()
    ffmpeg(*picture, *tone, "-c:v", "mpeg4", *options, path)
    return path


def question(number: int, video: str) -> dict:
    fields = {"id": number, "video_name": video, "question_text": "What is heard in the video?"}
    return fields | {"multi_choice": ["horn", "bell"], "answer": 0}


def write_questions(path: Path, videos: list[str]) -> Path:
    path.write_text(json.dumps([question(number, video) for number, video in enumerate(videos)]))
    return path


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def kinds_of(folder: Path) -> dict[str, str]:
    return {problem["name"]: problem["kind"] for problem in report_of(folder)["problems"]}


# ----------------------------------------------------------------------------------------------------------------- AVQA
@needs_ffmpeg
def test_avqa_from_videos_to_parquet(tmp_path, capfd):
    videos = tmp_path / "videos"
    whole = make_video(videos / "a b" / "-HG3Omg_89c_000030.mp4", 3, "aevalsrc=sin(440*2*PI*t)|0:s=44100")
    make_video(videos / "täglich_0.webm", 2, "sine=440", "-c:v", "libvpx", "-c:a", "libopus")
    make_video(videos / "no_sound_000010.mp4", 2, "")
    make_video(videos / "quiet_000010.mp4", 2, "anullsrc", "-c:a", "pcm_s16le", "-f", "mov")
    front = make_video(videos / "cut_000001.mp4", 8, "sine=440", "-movflags", "+faststart")
    front.write_bytes(front.read_bytes()[:-40_000])
    back = make_video(videos / "cut_000002.mp4", 8)
    back.write_bytes(back.read_bytes()[:-40_000])
    (videos / "noise_000003.mp4").write_bytes(os.urandom(5000))
    (videos / "empty_000004.mp4").touch()
    (videos / "readme.txt").touch()
    broken = ["no_sound_000010", "quiet_000010", "cut_000001", "cut_000002", "noise_000003", "empty_000004", "gone_7"]
    names = ["-HG3Omg_89c_000030", "-HG3Omg_89c_000030", "täglich_0", *broken]
    questions = write_questions(tmp_path / "train_qa.json", names)
    out = tmp_path / "AVQA"

    arguments = ["avqa", "--questions", questions, "--media", videos, "--out_dir", out, "--num_workers", 2]
    assert get_data.main(list(map(str, arguments))) == 0
    shown = capfd.readouterr().err
    assert sorted(path.name for path in (out / "audios").iterdir()) == ["-HG3Omg_89c_30.wav", "täglich_0.wav"]
    info = soundfile.info(out / "audios" / "-HG3Omg_89c_30.wav")
    assert (info.samplerate, info.channels, info.subtype, info.format) == (16000, 1, "PCM_16", "WAV")
    wave = load_audio(out / "audios" / "-HG3Omg_89c_30.wav")
    assert abs(len(wave) / 16000 - 3) < 0.1
    assert np.abs(np.fft.rfft(wave[8000:24000])).argmax() == 440  # 1 s: a bin a hertz
    assert abs(np.abs(wave[8000:24000]).max() - 0.5) < 0.05  # the mean of the tone and a silent channel
    assert whole.exists()
    assert kinds_of(out) == {
        "no_sound_10.wav": "no_audio_stream",
        "quiet_10.wav": "unusable",
        "cut_1.wav": "cut_short",
        "cut_2.wav": "broken",
        "noise_3.wav": "broken",
        "empty_4.wav": "broken",
        "gone_7.wav": "missing",
    }
    report = report_of(out)
    assert report["rows"] == {"usable": 10, "unusable": 0, "with_audio": 3}
    assert (
        report["clips"] | {"asked_for": 9, "there": 2, "there_before": 0, "missing": 1, "broken": 3} == report["clips"]
    )
    assert report["files_of_other_names"] == 1
    reasons = {problem["name"]: problem["reason"] for problem in report["problems"]}
    assert "digital silence" in reasons["quiet_10.wav"] and "moov atom not found" in reasons["cut_2.wav"]
    assert "where the file promises 8.0 s" in reasons["cut_1.wav"]
    assert "2 of 9 clips" in shown and "for 3 of 10 rows (30.0%)" in shown

    # the next command, as it is printed
    words = shown.split("next:\n")[1].split()
    assert shutil.which(words[0]) and os.path.samefile(words[1], EXAMPLE / "data_preprocess" / "avqa.py")
    assert avqa(words[2:]) == 0
    assert "read 10 rows, wrote 3" in capfd.readouterr().err


@needs_ffmpeg
def test_a_second_file_of_a_clip_is_tried_and_sounds_are_taken_too(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    (media / "x_000001.mp4").write_bytes(b"no video")
    ffmpeg("-f", "lavfi", "-t", 1, "-i", "sine=440", "-ar", 48000, "-ac", 2, media / "x_000001.wav")
    ffmpeg("-f", "lavfi", "-t", 40, "-i", "sine=440", media / "long_5.flac")
    questions = write_questions(tmp_path / "q.json", ["x_000001", "long_000005"])
    arguments = ["avqa", "--questions", questions, "--media", media, "--out_dir", tmp_path / "out"]
    assert get_data.main(list(map(str, arguments))) == 0
    assert kinds_of(tmp_path / "out") == {}
    lengths = {path.name: soundfile.info(path).frames for path in (tmp_path / "out" / "audios").iterdir()}
    assert lengths == {"x_1.wav": 16000, "long_5.wav": 30 * 16000}


@needs_ffmpeg
def test_a_killed_run_goes_on(tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    media.mkdir()
    ffmpeg("-f", "lavfi", "-t", 20, "-i", "sine=440", media / "x_0.wav")
    names = [f"x_{number}" for number in range(30)]
    for name in names[1:]:
        os.link(media / "x_0.wav", media / f"{name}.wav")
    questions = write_questions(tmp_path / "q.json", names)
    words = ["avqa", "--questions", questions, "--media", media, "--out_dir", out, "--num_workers", 2]
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    for sent, status in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        before = len(list(out.glob("audios/*.wav")))
        # a shell's background job inherits that Ctrl-C is ignored
        before_it = signal.signal(signal.SIGINT, signal.default_int_handler)
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGINT, before_it)
        wait_for(lambda before=before: len(list(out.glob("audios/*.wav"))) >= before + 3)
        run.send_signal(sent)
        said = run.communicate(timeout=60)[1]
        assert run.returncode == status, said
        assert before + 3 <= len(list(out.glob("audios/*.wav"))) < 30
        assert not (out / "report.json").exists()
    assert "the same command goes on from here" in said
    finished = {path: path.stat().st_mtime_ns for path in out.glob("audios/*.wav")}
    assert all(soundfile.info(path).frames == 20 * 16000 for path in finished)  # each that has its name is whole
    victim = min(finished)
    os.truncate(victim, 1000)  # as a power cut may leave it

    run_command(*command)
    assert sorted(path.name for path in (out / "audios").iterdir()) == sorted(f"{name}.wav" for name in names)
    assert report_of(out)["clips"] == {"asked_for": 30, "there": 30, "there_before": len(finished) - 1}
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items() if path != victim)
    assert soundfile.info(victim).frames == 20 * 16000


@needs_ffmpeg
def test_a_clip_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x_1.mp4")  # nobody ever writes to it
    monkeypatch.setattr(extract_audio, "SECONDS", 0.3)
    outcome = extract_audio.extract("x_1.wav", [tmp_path / "x_1.mp4"], tmp_path)
    assert outcome.kind == "timeout" and "took more than 0.3 s and was stopped" in outcome.reason
    assert os.listdir(tmp_path) == ["x_1.mp4"]


@needs_ffmpeg
def test_a_playlist_opens_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "x_1.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n")
        outcome = extract_audio.extract("x_1.wav", [tmp_path / "x_1.mp4"], tmp_path)
        with pytest.raises(TimeoutError):
            server.accept()
    assert outcome.kind == "broken"


def test_a_full_disk_stops_and_does_not_blame_the_clips(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess(["ffmpeg"], 1, b"", b"No space left on device")
    monkeypatch.setattr(extract_audio, "probe_seconds", lambda source: 10.0)
    monkeypatch.setattr(extract_audio, "run", lambda command: failed)
    monkeypatch.setattr(extract_audio.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(extract_audio.ExtractError, match="the disk is full"):
        extract_audio.extract_all(["x_1.wav"], {"x_1.wav": [tmp_path / "x_1.mp4"]}, tmp_path, 1)


def test_without_ffmpeg_it_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    questions = write_questions(tmp_path / "q.json", ["x_1"])
    arguments = ["avqa", "--questions", questions, "--media", tmp_path, "--out_dir", tmp_path / "out"]
    assert get_data.main(list(map(str, arguments))) == 2
    assert "ffmpeg and ffprobe: not on the PATH; apt-get install ffmpeg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_settings_that_cannot_be_used_are_named(tmp_path, capsys):
    arguments = ["avqa", "--questions", "no.json", "--media", "nowhere", "--num_workers", "0", "--out_dir", "x"]
    assert get_data.main(arguments) == 2
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("--questions no.json: no such", "--media nowhere: no", "--num_workers 0:"))


# ----------------------------------------------------------------------------------------------------------------- MMAU
@pytest.fixture(scope="module")
def wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(16000) / 5), 16000, format="WAV")
    return file.getvalue()


def write_mmau(path: Path, names: list[str]) -> Path:
    rows = [{"id": str(i), "audio_id": name, "question": "?", "choices": ["a"]} for i, name in enumerate(names)]
    path.write_text(json.dumps(rows))
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def run_mmau(questions: Path, archive: Path | None, out: Path) -> int:
    source = [] if archive is None else ["--archive", str(archive)]
    return get_data.main(["mmau", "--questions", str(questions), *source, "--out_dir", str(out)])


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
def test_mmau_recordings_go_where_the_questions_say(tmp_path, wav, kind, capsys):
    names = [f"./test-mini-audios/{letter}.wav" for letter in "abcé"]
    files = {f"test-mini-audios/{letter}.wav": wav for letter in "abé"} | {"test-mini-audios/._a.wav": b"junk"}
    files |= {"elsewhere/c.wav": wav[:200], "test-mini-audios/z.wav": wav}
    archive = tmp_path / f"audios.{kind}"
    make_zip(archive, files) if kind == "zip" else make_tar(archive, files, "w:gz" if kind == "tar.gz" else "w")
    questions = write_mmau(tmp_path / "mmau-test-mini.json", names)
    out = tmp_path / "mmau"
    assert run_mmau(questions, archive, out) == 0
    assert sorted(path.name for path in (out / "test-mini-audios").iterdir()) == ["a.wav", "b.wav", "c.wav", "é.wav"]
    assert (out / "test-mini-audios" / "a.wav").read_bytes() == wav
    assert report_of(out)["recordings"] == {"asked_for": 4, "there": 3, "broken": 1}
    shown = capsys.readouterr().err
    assert "4 recordings unpacked, 2 other entries passed over" in shown
    assert "--skip_bad_audio" in shown.split("next:")[1] and f"--audio_dir {out}" in shown
    left = out / "test-mini-audios" / ".a.wav.0123abcd.part"  # by a run that was killed
    left.touch()
    assert run_mmau(questions, archive, out) == 0
    assert "0 recordings unpacked" in capsys.readouterr().err and not left.exists()


def test_the_real_questions_are_all_checked(tmp_path, shared_data, wav):
    questions = shared_data / "mmau" / "mmau-test-mini.json"
    names = [row["audio_id"].removeprefix("./") for row in json.loads(questions.read_text())]
    archive = make_tar(tmp_path / "a.tar.gz", dict.fromkeys(names[:-1], wav))
    assert run_mmau(questions, archive, tmp_path / "mmau") == 0
    report = report_of(tmp_path / "mmau")
    assert report["recordings"] == {"asked_for": 1000, "there": 999, "missing": 1}
    assert report["problems"][0]["name"] == f"./{names[-1]}"


def test_the_real_recording_is_found(tmp_path, shared_data):
    assert run_mmau(shared_data / "mmau" / "mmau-test-mini.json", None, tmp_path) == 2  # nothing is there
    shutil.copytree(shared_data / "mmau" / "test-mini-audios", tmp_path / "test-mini-audios")
    assert run_mmau(shared_data / "mmau" / "mmau-test-mini.json", None, tmp_path) == 0
    assert report_of(tmp_path)["recordings"] == {"asked_for": 1000, "there": 1, "missing": 999}


def test_nothing_leaves_the_folder(tmp_path, wav):
    out, outside = tmp_path / "out", tmp_path / "outside.wav"
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as file:
        for name, kind, link in (
            ("../outside.wav", tarfile.REGTYPE, ""),
            (str(outside), tarfile.REGTYPE, ""),
            ("audios", tarfile.SYMTYPE, str(tmp_path)),
            ("audios/a.wav", tarfile.SYMTYPE, "/etc/passwd"),
            ("audios/b.wav", tarfile.LNKTYPE, "/etc/passwd"),
            ("audios/c.wav", tarfile.FIFOTYPE, ""),
            ("audios/d.wav", tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = len(wav) if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(wav) if info.size else None)
    questions = write_mmau(tmp_path / "q.json", [f"audios/{letter}.wav" for letter in "abcd"])
    assert run_mmau(questions, archive, out) == 0
    assert not outside.exists()
    assert sorted(path.name for path in out.rglob("*") if not path.is_dir()) == ["d.wav", "report.json"]
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert [problem["kind"] for problem in report_of(out)["problems"]] == ["missing"] * 3


@pytest.mark.parametrize("name", ["../a.wav", "/tmp/a.wav", "x/../../a.wav", "..\\a.wav", "", "."])
def test_questions_that_lead_out_are_refused(tmp_path, wav, name, capsys):
    questions = write_mmau(tmp_path / "q.json", [name])
    assert run_mmau(questions, make_tar(tmp_path / "a.tar", {"a.wav": wav}, "w"), tmp_path / "out") == 2
    assert f"audio_id {name!a} is no path below a folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tar.gz", "zip", "damaged zip", "other", "header"])
def test_a_broken_archive_is_named_and_what_was_unpacked_stays(tmp_path, kind, capsys):
    noise = np.random.default_rng(0).normal(0, 0.1, 16000)  # does not compress, so that the cut is in the second file
    file = io.BytesIO()
    soundfile.write(file, noise, 16000, format="WAV")
    files = {"a.wav": file.getvalue(), "b.wav": file.getvalue()}
    archive = tmp_path / "archive"
    (make_zip if "zip" in kind else make_tar)(archive, files)
    whole = archive.read_bytes()
    broken = {"damaged zip": whole[:500] + bytes(100) + whole[600:], "other": b"<html>quota exceeded</html>"}
    broken["header"] = bytes.fromhex("1f8b0804000000000003")  # gzip's, with a further field that is not there
    archive.write_bytes(broken.get(kind, whole[:45_000]))
    assert run_mmau(write_mmau(tmp_path / "q.json", list(files)), archive, tmp_path / "out") == 2
    assert "Download it again" in capsys.readouterr().err
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == (["a.wav"] if kind == "tar.gz" else [])  # a zip's index is at its end


def test_sizes_are_limited(tmp_path, wav, monkeypatch, capsys):
    questions = write_mmau(tmp_path / "q.json", ["a.wav"])
    archive = make_tar(tmp_path / "a.tar.gz", {"zeros": bytes(10**6), "a.wav": wav})
    monkeypatch.setattr(unpack_audio, "MAX_ALL", 10**6)
    assert run_mmau(questions, archive, tmp_path / "out") == 2
    assert "not the benchmark's archive" in capsys.readouterr().err
    monkeypatch.setattr(unpack_audio, "MAX_ALL", 10**9)
    monkeypatch.setattr(unpack_audio, "MAX_FILE", 1000)
    assert run_mmau(questions, archive, tmp_path / "out") == 2
    assert "at most 1000 are taken" in capsys.readouterr().err
    assert not (tmp_path / "out" / "a.wav").exists()


def test_a_size_that_lies_is_noticed(tmp_path, monkeypatch):
    for size, error in ((3, unpack_audio.UnpackError), (9, EOFError)):
        member = unpack_audio.Member("a.wav", size, lambda: io.BytesIO(b"12345"))
        with pytest.raises(error, match=r"a\.wav"):
            unpack_audio.write(member, tmp_path / "a.wav")
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(unpack_audio, "members_of", lambda archive, member=member: [member])
        with pytest.raises(unpack_audio.UnpackError, match=r"a\.wav"):
            unpack_audio.unpack(Path("archive"), ["a.wav"], tmp_path)


# ------------------------------------------------------------------------------------------------- MMAU's parquet files
def embedded(identity: object, data: bytes | None, **changes: object) -> dict:
    """A row as MMAU distributes it."""
    attributes = json.dumps({"id": identity, "task": "sound", "difficulty": "easy"})
    return {
        "context": {"bytes": data, "path": "../../outside.wav"},
        "instruction": "What is heard?",
        "choices": ["horn", "bell"],
        "answer": "bell",
        "other_attributes": attributes,
    } | changes


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def test_sound_in_parquet_becomes_files(tmp_path, wav, capsys):
    flac = io.BytesIO()
    tone = 0.3 * np.sin(np.arange(31 * 8000) / 9)  # --audio_seconds may ask for more than 30 s
    soundfile.write(flac, np.stack([tone, tone / 2], 1), 8000, format="FLAC")
    unusable = [
        (embedded("../x", wav), "other_attributes has the id '../x', which cannot be the name of a file"),
        (embedded("a\\b", wav), "cannot be the name"),
        (embedded(".x", wav), "cannot be the name"),
        (embedded("/x", wav), "cannot be the name"),
        (embedded("x" * 201, wav), "cannot be the name"),
        (embedded("x\0", wav), "cannot be the name"),
        (embedded("", wav), "cannot be the name"),
        (embedded(None, wav), "the id None"),
        (embedded("a", wav), "the id 'a' occurs twice"),
        (embedded("b", None), "context is {'bytes': None,"),
        (embedded("c", wav, other_attributes="{"), "other_attributes is '{', no JSON"),
        (embedded("d", wav, other_attributes="[]"), "expected a JSON object"),
        (embedded("e", wav, instruction=None), "instruction is None, expected text"),
        (embedded("f", wav, choices=[]), "choices is [], expected a list of texts"),
        (embedded("g", wav, choices=["a", None]), "choices is ['a', None], expected"),
    ]
    deep = '{"id": 7, "task": "sound", "more": ' + "[" * 500 + "]" * 500 + "}"
    source, out = tmp_path / "shards", tmp_path / "out"
    write_parquet(source / "test-0.parquet", [embedded("a", wav), embedded("täg lich", flac.getvalue())])
    write_parquet(
        source / "test-1.parquet",
        [row for row, _ in unusable] + [embedded("z", wav[:200]), embedded(7, wav, other_attributes=deep)],
    )
    assert run_mmau(source, None, out) == 0
    audios = out / "audios"
    assert {path.name for path in audios.iterdir()} == {"a.wav", "täg lich.wav", "7.wav"}
    assert not (tmp_path / "outside.wav").exists()
    assert (audios / "a.wav").read_bytes() == wav
    (tmp_path / "original").write_bytes(flac.getvalue())
    assert soundfile.info(audios / "täg lich.wav").format == "WAV"
    whole, original = (load_audio(file, seconds=60) for file in (audios / "täg lich.wav", tmp_path / "original"))
    np.testing.assert_array_equal(whole, original)
    report = report_of(out)
    assert report["recordings"] == {"asked_for": 4, "there": 3, "broken": 1}
    for line, (number, (_, says)) in zip(report["rows_without_question"], enumerate(unusable), strict=True):
        assert line.startswith(f"{source / 'test-1.parquet'}, row {number}: ") and says in line
    questions = json.loads((out / "questions.json").read_text())
    assert [question["id"] for question in questions] == ["a", "täg lich", "z", "7"]
    first = {"id": "a", "audio_id": "audios/a.wav", "question": "What is heard?", "choices": ["horn", "bell"]}
    assert questions[0] == first | {"answer": "bell", "task": "sound", "difficulty": "easy"}
    assert f"--data_file {out / 'questions.json'} --audio_dir {out} --skip_bad_audio" in capsys.readouterr().err

    # once more, after a kill that left a draft and a recording too few
    before = {path: path.stat().st_mtime_ns for path in audios.iterdir() if path.name != "7.wav"}
    (audios / "7.wav").rename(audios / ".7.wav.0123abcd.part")
    assert run_mmau(source, None, out) == 0
    assert "1 recordings written, 4 questions" in capsys.readouterr().err
    assert {path.name for path in audios.iterdir()} == {"a.wav", "täg lich.wav", "7.wav"}
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())

    arguments = ["--input_jsonl", out / "questions.json", "--audio_dir", out, "--local_save_dir", tmp_path / "rows"]
    assert avqa([*map(str, arguments), "--skip_bad"]) == 0
    written = parquet.read_table(tmp_path / "rows" / "train.parquet").to_pylist()
    assert [(row["reference"], row["question_type"]) for row in written] == [("bell", "sound")] * 3
    assert {row["audio_path"] for row in written} == {str(path) for path in audios.iterdir()}


def test_parquet_that_cannot_be_used(tmp_path, wav, capsys):
    good = write_parquet(tmp_path / "good.parquet", [embedded("a", wav)])
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(good.read_bytes()[:-20])
    other = write_parquet(tmp_path / "other.parquet", [{"prompt": "x", "choices": ["a"]}])
    none = write_parquet(tmp_path / "none.parquet", [embedded("", wav)])
    (tmp_path / "empty").mkdir()
    for questions, archive, says in (
        (cut, None, "cut.parquet: cannot be read"),
        (other, None, "['prompt', 'choices'] lack MMAU's context, instruction, answer, other_attributes"),
        (none, None, "no row gives a question"),
        (tmp_path / "empty", None, "a folder without *.parquet"),
        (good, good, f"--archive {good}: the parquet of --questions holds the recordings"),
    ):
        assert run_mmau(questions, archive, tmp_path / "out") == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "out" / "questions.json").exists()
    command = ["mmau", "--questions", str(good), "--out_dir", "data/mmau"]
    for said in (read_error(read_records, good.read_bytes(), str(good)), read_error(read_rows, good)):
        assert said.endswith(f"get_data.py {' '.join(command)}")


def read_error(function, *arguments: object) -> str:
    with pytest.raises((AvqaError, EvalError)) as error:
        function(*arguments)
    return str(error.value)
