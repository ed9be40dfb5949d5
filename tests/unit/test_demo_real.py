"""The parts of ``make demo-real`` that need no download: Whisper's file, the split, what the files' names say."""

import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from demo.real_sounds import Clip, fetch, find_clips, hold_out, unpack, write_clips
from demo.whisper import SIZES, ModelFileError, read_variables, read_wheel, tower_weights


def name(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def variable(text: str, shape: tuple[int, ...], kind: int, data: bytes) -> bytes:
    return name(text) + struct.pack(f"<B{len(shape)}IBI", len(shape), *shape, kind, len(data)) + data


# Written by hand after CTranslate2's ModelSpec._serialize: two variables, one other name.
HEAD = struct.pack("<I", 6) + name("WhisperSpec") + struct.pack("<I", 3)
HALVES = variable("encoder/a", (2, 2), 4, b"\x00\x3c\x00\x40\x00\xc0\x00\x38")  # float16: 1, 2, -2, 0.5
NUMBER = variable("encoder/num_heads", (), 2, b"\x06\x00")
TAIL = struct.pack("<I", 1) + name("other") + name("encoder/a")
FILE = HEAD + struct.pack("<I", 2) + HALVES + NUMBER + TAIL


def test_a_model_file_is_read_as_it_was_written():
    read = read_variables(FILE)
    assert list(read) == ["encoder/a", "encoder/num_heads"]
    np.testing.assert_array_equal(read["encoder/a"], np.array([[1, 2], [-2, 0.5]], np.float16), strict=True)
    np.testing.assert_array_equal(read["encoder/num_heads"], np.array(6, np.int16), strict=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FILE[:-1], f"ends at byte {len(FILE) - 1}, within"),
        (FILE + b"\0", "1 bytes follow"),
        (struct.pack("<I", 7) + FILE[4:], r"version \(7,"),
        (FILE.replace(b"WhisperSpec", b"WhisperSpek"), "WhisperSpek"),
        (FILE.replace(b"a\0\2\2", b"a\0\2\3", 1), r"8 bytes of type 4 are no array of shape \[3, 2\]"),
        (HEAD + struct.pack("<I", 1) + variable("a", (1,), 9, b"\0") + struct.pack("<I", 0), "type 9"),
        (HEAD + struct.pack("<I", 2) + NUMBER + NUMBER + TAIL, "num_heads: occurs twice"),
        (FILE.replace(b"other\0", b"other "), "is no name"),
        (FILE.replace(b"a\0\2\2", b"a\0\2\xff", 1), "no array of shape"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(data, message):
    with pytest.raises(ModelFileError, match=message):
        read_variables(data)


def whisper(d: int, layers: int) -> dict[str, np.ndarray]:
    """Variables of a small encoder, each with its own values."""
    shapes = {"conv1/weight": (d, 2, 3), "conv1/bias": (d,), "conv2/weight": (d, d, 3), "conv2/bias": (d,)}
    shapes |= {"layer_norm/gamma": (d,), "layer_norm/beta": (d,), "position_encodings/encodings": (1500, d)}
    for i in range(layers):
        for block, sizes in (("self_attention", ((3 * d, d), (d, d))), ("ffn", ((4 * d, d), (d, 4 * d)))):
            at = f"layer_{i}/{block}"
            shapes |= {f"{at}/layer_norm/gamma": (d,), f"{at}/layer_norm/beta": (d,)}
            for k, size in enumerate(sizes):
                shapes |= {f"{at}/linear_{k}/weight": size, f"{at}/linear_{k}/bias": size[:1]}
    rng = np.random.default_rng(0)
    variables = {f"encoder/{key}": rng.standard_normal(shape).astype(np.float16) for key, shape in shapes.items()}
    for i in range(layers):
        variables[f"encoder/layer_{i}/self_attention/linear_0/bias"][d : 2 * d] = 0  # Whisper's keys have none
    return variables | {"encoder/num_heads": np.array(6, np.int16), "decoder/x": np.zeros(1, np.float16)}


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    (tmp_path / "text").write_text("no wheel")
    for path, reason in ((tmp_path / "gone", "No such file"), (tmp_path / "text", "not a zip")):
        with pytest.raises(SystemExit, match=f"--whisper {path}: .*{reason}.*; make demo-real leaves"):
            read_wheel(path)


def test_whispers_encoder_gives_what_its_formula_says():
    """All weights of the tower are set, strictly, and it computes Whisper's encoder (Radford et al. 2022, section 2.2).

    The expected values follow the paper with numpy, from the variables under their names in the file.
    """
    torch = pytest.importorskip("torch")
    from transformers import Qwen2AudioEncoderConfig
    from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

    d, heads, frames = 12, 6, 3000
    variables = whisper(d, SIZES["encoder_layers"])
    sizes = SIZES | {"num_mel_bins": 2, "d_model": d, "encoder_ffn_dim": 4 * d}
    tower = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**sizes)).eval()
    tower.load_state_dict({key: torch.from_numpy(value) for key, value in tower_weights(variables).items()})
    mel = np.random.default_rng(1).standard_normal((2, frames)).astype(np.float32)
    with torch.no_grad():
        ours = tower(torch.from_numpy(mel)[None]).last_hidden_state[0].numpy()

    v = {key.removeprefix("encoder/"): value.astype(np.float64) for key, value in variables.items()}
    erf = np.vectorize(__import__("math").erf)

    def gelu(x):
        return x * (1 + erf(x / 2**0.5)) / 2

    def norm(x, at):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * v[f"{at}/gamma"] + v[f"{at}/beta"]

    def conv(x, at, stride):
        x = np.pad(x, ((0, 0), (1, 1)))
        columns = np.stack([x[:, i : i + 3] for i in range(0, x.shape[1] - 2, stride)])
        return np.einsum("tik,oik->ot", columns, v[f"{at}/weight"]) + v[f"{at}/bias"][:, None]

    x = gelu(conv(gelu(conv(mel, "conv1", 1)), "conv2", 2)).T + v["position_encodings/encodings"]
    for i in range(SIZES["encoder_layers"]):
        at = f"layer_{i}/self_attention"
        y = norm(x, f"{at}/layer_norm") @ v[f"{at}/linear_0/weight"].T + v[f"{at}/linear_0/bias"]
        q, k, w = (part.reshape(1500, heads, -1).transpose(1, 0, 2) for part in np.split(y, 3, axis=1))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(d / heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True) @ w).transpose(1, 0, 2).reshape(1500, d)
        x = x + y @ v[f"{at}/linear_1/weight"].T + v[f"{at}/linear_1/bias"]
        at = f"layer_{i}/ffn"
        y = gelu(norm(x, f"{at}/layer_norm") @ v[f"{at}/linear_0/weight"].T + v[f"{at}/linear_0/bias"])
        x = x + y @ v[f"{at}/linear_1/weight"].T + v[f"{at}/linear_1/bias"]
    expected = norm(x.reshape(750, 2, d).mean(1), "layer_norm")  # Qwen2-Audio's average of neighbours
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)  # float32 against float64


# file, kind of question, right answer, group (+ is the package), language; a file alone is not asked about
FILES = [
    [cell.strip() for cell in line.split("|")]
    for line in """\
asterisk-core-sounds-en-wav/asterisk/sounds/en_US_f_Allison/letters/f.wav | letter | F | Allison | en
asterisk-core-sounds-es-wav/asterisk/sounds/es_MX_f_Allison/digits/2.wav | digit | two | Allison | es
asterisk-core-sounds-fr-wav/asterisk/sounds/fr_CA_f_June/digits/mon-3.wav | month | april | June | fr
asterisk-prompt-es-co/asterisk/sounds/es/mon-1.gsm | month | february | + | es
asterisk-prompt-it-menardi-wav/asterisk/sounds/it_IT_f_Menardi/phonetic/ICAO/b_p.wav | code word | bravo | + Menardi
klettres-data/klettres/en_GB/alpha/Q.ogg | letter | Q | + en_GB | en
klettres-data/klettres/en/alpha/r.ogg | letter | R | + en | en
tuxpaint-stamps-default/tuxpaint/stamps/symbols/math/3_ru.ogg | digit | three | + ru | ru
tuxpaint-stamps-default/tuxpaint/stamps/symbols/math/6.ogg | digit | six | + | en
hydrogen-drumkits/hydrogen/data/drumkits/ColomboAcousticDrumkit/SnareOff-1.wav
hydrogen-drumkits/hydrogen/data/drumkits/BJA_Pacific/SN3_01.aiff
hydrogen-drumkits/hydrogen/data/drumkits/ForzeeStereo/TomLow-1.wav
hydrogen-drumkits/hydrogen/data/drumkits/ForzeeStereo/RideBow-2.wav | drum | cymbal | + ForzeeStereo RideBow
hydrogen-drumkits/hydrogen/data/drumkits/Millo_MultiLayered2/bd_03.flac | drum | kick | + Millo bd
hydrogen-drumkits/hydrogen/data/drumkits/BJA_Pacific/SN4_01.aiff | drum | snare | + BJA_Pacific SN4
lmms-common/lmms/samples/drums/kick01.ogg | drum | kick | + kick01.ogg
sonic-pi-samples/sonic-pi/samples/drum_snare_hard.flac | drum | snare | + drum_snare_hard.flac
tuxpaint-stamps-default/tuxpaint/stamps/animals/birds/owl.ogg | source | animal | + birds/owl
tuxpaint-stamps-default/tuxpaint/stamps/animals/birds/owl_desc_fr.ogg
asterisk-core-sounds-it-wav/asterisk/sounds/it_IT_m_Carlo/phonetic/a_p.wav
sonic-pi-samples/sonic-pi/samples/guit_em9.flac | source | music | + guit_em9.flac
""".splitlines()
]


def test_a_recordings_name_says_what_is_asked_of_it(tmp_path):
    import soundfile

    rng = np.random.default_rng(0)
    for number, (file, *_) in enumerate(FILES):
        path = tmp_path / "unpacked" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = {"format": "RAW", "subtype": "GSM610"} if path.suffix == ".gsm" else {}
        soundfile.write(path, rng.uniform(-0.5, 0.5, (4000, 32000)[number % 2]), 8000, **raw)
    twin = tmp_path / "unpacked" / FILES[0][0].replace("letters/f", "letters/r")
    twin.write_bytes((tmp_path / "unpacked" / FILES[0][0]).read_bytes())  # the same recording twice

    clips = list(find_clips(tmp_path / "unpacked"))
    found = {str(c.path.relative_to(tmp_path / "unpacked")): (c.kind, c.label, c.group, c.language) for c in clips}
    wanted = {file: [*rest, ""][:4] for file, *rest in FILES if rest}
    for file, (kind, label, group, language) in wanted.items():
        assert found.pop(file) == (kind, label, group.replace("+", file.split("/")[0]), language)
    assert not found

    pools = write_clips(clips, 0, tmp_path / "data")
    sides = {split: {c for of in p.values() for m in of.values() for c, _ in m} for split, p in pools.items()}
    assert sides["train"] | sides["test"] == set(clips)
    assert {clip.group for clip in sides["test"]} == hold_out(clips, 0)
    files = sorted(Path(tmp_path / "data").rglob("*.wav"))
    assert len(files) == len(clips)
    ends = []
    for path in files:
        wave, rate = soundfile.read(path)
        assert len(wave) == 2.25 * rate  # of each, so that no length tells a drum
        heard = np.flatnonzero(wave) / rate
        assert heard[0] >= 0.25
        ends.append(heard[-1])
    assert min(ends) < 1 and 1.7 < max(ends) < 1.75  # only the beginning of longer recordings


def test_the_test_set_is_drawn_and_holds_no_language_that_training_lacks():
    spoken = [("a", "en"), ("b", "en"), ("c", "en"), ("d", "es"), ("d", "en"), ("e", "fr")]  # d speaks two
    clips = [Clip(Path(f"{g}{n}"), "p", "digit", str(n), g, lang) for g, lang in spoken for n in range(4)]
    clips += [Clip(Path(g), "p", "digit", "1", g, "it") for g in "fg"]
    clips += [Clip(Path(f"{g}{n}"), "p", "drum", "kick", g, "") for g in "wxyz" for n in range(4)]
    clips += [Clip(Path(f"big{n}"), "p", "drum", "kick", "big", "") for n in range(40)]
    clips += [Clip(Path(g), "p", "drum", "snare", g, "") for g in "stuv"]
    drawn = {seed: hold_out(clips, seed) for seed in range(20)}
    for held in drawn.values():
        # of 6 clips of a digit at most one, so one of the voices; Spanish and French have one voice each, Italian two
        assert len(held & set("abc")) == 1
        assert len(held & set("fg")) == 1
        assert not held & {"d", "e", "big"}
        assert len(held & set("wxyz")) == 3  # 12 of 56 kicks; a fourth would make it 16, more than a quarter
        assert len(held & set("stuv")) == 1  # a quarter of the snares, though all drums are 60
    assert len({frozenset(held) for held in drawn.values()}) > 5


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "apt-get is missing"),
        ("echo 'E: Version not found' >&2; exit 100", "E: Version not found"),
        ("echo other > {file}", "has the SHA-256"),
        ("echo half > {file}; kill -INT $PPID; sleep 5", None),  # Ctrl-C
    ],
)
def test_what_cannot_be_downloaded_is_said_and_leaves_no_half_a_file(tmp_path, monkeypatch, script, message):
    tools, downloads = tmp_path / "bin", tmp_path / "downloads"
    tools.mkdir()
    if script:
        file = "asterisk-core-sounds-en-wav_1.6.1-1_all.deb"
        for tool in ("apt-get", "dpkg-deb"):
            (tools / tool).write_text(f"#!/bin/sh\n{script.format(file=file)}\n")
            (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin" if script else str(tools))
    with pytest.raises(SystemExit if message else KeyboardInterrupt, match=message):
        fetch(downloads)
    assert list(downloads.iterdir()) == []


def test_two_demos_may_unpack_into_one_folder(tmp_path, monkeypatch):
    wanted = ("share/klettres/en/alpha/r.ogg", "share/doc/klettres-data/copyright")
    for name in (*wanted, "share/klettres/en/alpha/z.ogg"):  # Z is not asked about
        (tmp_path / "usr" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "usr" / name).write_text("x")
    with tarfile.open(tmp_path / "files.tar", "w") as archive:
        archive.add(tmp_path / "usr", "./usr")
    (tmp_path / "dpkg-deb").write_text(f"#!/bin/sh\nmkdir $OTHER; touch $OTHER/theirs; cat {tmp_path}/files.tar\n")
    (tmp_path / "dpkg-deb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    target = tmp_path / "downloads" / "unpacked" / "klettres-data"
    target.parent.mkdir(parents=True)
    for other, expected in ((tmp_path / "elsewhere", set(wanted)), (target, {"theirs"})):
        monkeypatch.setenv("OTHER", str(other))
        unpack(tmp_path / "klettres.deb", target)
        assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == expected
        shutil.rmtree(target)
    assert list(target.parent.parent.iterdir()) == [target.parent]


def test_the_projector_starts_centred_on_the_recordings(tmp_path):
    import soundfile
    import torch

    from demo.tiny_model import build_model, build_processor, centre_projector
    from demo.warm_start import embed_sounds

    rng = np.random.default_rng(0)
    waves = [rng.uniform(-0.5, 0.5, samples).astype(np.float32) for samples in (8000, 16000, 24000)]
    for i, wave in enumerate(waves):
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000, subtype="FLOAT")
    (tmp_path / "README.md").write_text("no recording")
    processor = build_processor()
    model = build_model(processor, 0)
    centre_projector(model, processor, tmp_path)

    embeddings = torch.cat([embed_sounds(model, processor, [wave])[0] for wave in waves])
    assert len(embeddings) == 12 + 25 + 37  # 40 ms a token
    torch.testing.assert_close(embeddings.mean(0), torch.zeros(128), rtol=0, atol=1e-4)
    assert embeddings.std() > 0.1
