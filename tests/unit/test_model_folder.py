"""Folders that transformers 4.57 loads as 5 does, with modes as the umask says."""

import json
import os
import stat
import sys

import pytest
from conftest import run_code, run_command
from safetensors.torch import save_file
from torch import ones

from aqa.common.model_folder import complete

OLDER = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
LOAD = """
import json, sys
import numpy as np, torch, transformers
from transformers import AutoProcessor, AutoTokenizer, Qwen2AudioForConditionalGeneration
folder = sys.argv[1]
processor, tokenizer = AutoProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
model = Qwen2AudioForConditionalGeneration.from_pretrained(folder)
parts = [{"type": "audio", "audio_url": "x.wav"}, {"type": "text", "text": "What is it?"}]
text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
inputs = processor(text=text, audio=[np.sin(np.arange(16000) / 5)], sampling_rate=16000, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
shown = [text, inputs["input_ids"].tolist(), tokenizer(text)["input_ids"], sorted(tokenizer.all_special_tokens)]
shown += [answer.tolist(), tokenizer.decode(answer, skip_special_tokens=True), tokenizer.eos_token_id]
print("RESULT", transformers.__version__.split(".")[0], json.dumps(shown))
"""


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_names_of_both_versions_and_the_modes_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "adapter").mkdir()
        for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
            save_file({"weight": ones(1)}, tmp_path / name)
        tokenizer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "pad_token": "<p>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        rope = {"rope_type": "default", "rope_theta": 1e6}
        texts = ({"rope_parameters": rope}, {"rope_parameters": rope | {"mrope_section": [2, 3, 3]}})
        config = {"text_config": texts[0], "thinker_config": {"text_config": texts[1]}, "dtype": "float32"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        complete(tmp_path)
    finally:
        os.umask(before)
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in tokenizer
    assert tokenizer["additional_special_tokens"] == ["<a>"] and tokenizer["pad_token"] == "<p>"
    config = json.loads((tmp_path / "config.json").read_text())
    plain, sections = config["text_config"], config["thinker_config"]["text_config"]
    assert (plain["rope_theta"], plain["rope_scaling"]) == (1e6, None) and plain["rope_parameters"] == rope
    assert sections["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 3, 3]}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


@pytest.mark.docs
def test_transformers_4_57_loads_a_folder_as_5_does(tiny_model, tmp_path):
    """Processor, tokenizer, tokens and greedy answer are the same. Installs 4.57.6 aside, from the package index."""
    run_command(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, *OLDER)
    results = {}
    for path in ((), (tmp_path,)):
        done = run_code(LOAD, tiny_model, path=path, CUDA_VISIBLE_DEVICES="")
        [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        _, version, shown = line.split(" ", 2)
        results[version] = shown
    assert results.keys() == {"4", "5"} and results["4"] == results["5"]
