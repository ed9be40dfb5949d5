"""Tokenizer and processor of a checkpoint."""

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from lightrft.utils.families import family_of


def get_tokenizer_processor_vl(
    pretrain: str, model: Any, padding_side: str = "left"
) -> tuple[PreTrainedTokenizerBase, ProcessorMixin]:
    """Load processor and tokenizer, and make sure that there is a padding token.

    :param model: Model whose configuration learns the padding token, if the tokenizer had none.
    """
    processor = family_of(pretrain).processor_class().from_pretrained(pretrain, use_fast=True)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = padding_side
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, processor
