"""A processor without a model, as strict about its input as a real tokenizer."""

from __future__ import annotations

from audio_dataset import RESPONSE_HEADER


class TextProcessor:
    """What the dataset needs of a processor, without a model; as strict about its input as a real tokenizer."""

    audio_token = "<|AUDIO|>"

    def apply_chat_template(self, messages, **_) -> str:
        parts = []
        for message in messages:
            content = message["content"]
            texts = content if isinstance(content, str) else "".join(p.get("text", self.audio_token) for p in content)
            parts.append(f"<|im_start|>{message['role']}\n{texts}<|im_end|>\n")
        return "".join(parts) + RESPONSE_HEADER

    def tokenizer(self, texts, **_) -> dict:
        return {"input_ids": [text.encode("utf-8").split() for text in texts]}
