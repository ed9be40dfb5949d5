"""A dataset of training rows without a model's processor."""

from types import SimpleNamespace

from audio_dataset import AudioPromptDataset

from aqa.common.constants import ASSISTANT_HEADER


class TextProcessor:
    """What the dataset needs of a processor; as strict about its input as a real tokenizer."""

    audio_token = "<|AUDIO|>"

    def apply_chat_template(self, messages, **_) -> str:
        parts = []
        for message in messages:
            content = message["content"]
            texts = content if isinstance(content, str) else "".join(p.get("text", self.audio_token) for p in content)
            parts.append(f"<|im_start|>{message['role']}\n{texts}<|im_end|>\n")
        return "".join(parts) + ASSISTANT_HEADER

    def tokenizer(self, texts, **_) -> dict:
        return {"input_ids": [text.encode("utf-8").split() for text in texts]}


def training_row(path: str) -> dict:
    """A good row that asks about the clip at ``path``."""
    content = [{"type": "audio", "audio_url": path}, {"type": "text", "text": "What is it?"}]
    return {"prompt": [{"role": "user", "content": content}], "audio_path": path, "reference": "dog", "label": "x"}


def make_dataset(columns: dict, **kwargs) -> AudioPromptDataset:
    """The dataset over columns with the names that avqa.py writes; kwargs are AudioPromptDataset's."""
    names = {"input_key": "prompt", "images_key": "audio_path", "reference_key": "reference", "label_key": "label"}
    processor, strategy = TextProcessor(), SimpleNamespace(args=SimpleNamespace(**names))
    return AudioPromptDataset(columns, processor.tokenizer, processor, 99, strategy, **kwargs)
