"""What the example asks of the LightRFT that it runs on."""

import argparse
from collections.abc import Sequence
from typing import Any, TextIO

from aqa.common.patch import Patch


class Host:
    """A LightRFT that runs this example: the runtime beside it (``runtime.py``), or LightRFT itself (``lightrft/``).

    A host overrides what it does itself. The rest does nothing here, or returns what stands for nothing.
    """

    name: str
    row_tags: bool  # rows and batches may have a fifth member: the tags that metrics are counted under

    def __init__(self) -> None:
        self.fixes: list[str] = []  # version fixes in use

    def prepare_import(self) -> None:
        """Make ``lightrft`` importable. Called first of all."""

    def find_problems(self, args: argparse.Namespace) -> list[str]:
        """Flags that this host refuses, because it would fail on them or ignore them; one message each."""

    def prepare(self, args: argparse.Namespace) -> None:
        """Complete the flags and mend the host's classes, before a strategy is made.

        :raises SystemExit: if the host cannot be imported, or is not as expected.
        """

    # ---- models and data
    def load_actor(self, args: argparse.Namespace, ds_config: dict[str, Any] | None) -> Any:
        """Actor or reference model from ``--pretrain``.

        :param ds_config: DeepSpeed configuration; None under FSDP2.
        :raises SystemExit: if it cannot be loaded.
        """

    def load_processor(self, args: argparse.Namespace, model: Any) -> tuple[Any, Any]:
        """Tokenizer and processor of ``--pretrain``.

        :param model: Its configuration learns the padding token, if the tokenizer has none.
        """

    def eval_batch_size(self, prompts: int, samples: int) -> int:
        """Prompts of a rank in one evaluation batch.

        :param prompts: Of a rank in one training batch.
        :param samples: Responses a prompt in training; evaluation samples one.
        """
        return prompts

    # ---- trainer
    def trainer_arguments(self, args: argparse.Namespace, processor: Any) -> dict[str, Any]:
        """Arguments of this host's trainer that the other's does not have."""
        return {}

    def without_adapters(self, actor: Any) -> Any:
        """The reference model of a LoRA run: the actor with its adapters off."""

    def share_tower(self, args: argparse.Namespace, strategy: Any, models: Sequence[Any]) -> None:
        """Let actor and reference model, and vLLM, encode each clip once where the audio tower is frozen."""

    def complete_trainer(
        self,
        trainer: Any,
        prompts_dataloader: Any,
        evaluators: Sequence[Any],
        states: dict[str, Any] | None,
        find_collapsed: Any = None,
    ) -> Patch:
        """Attach evaluators, metrics and the state of a resumed run, as far as this host's trainer lacks them.

        :param evaluators: What is measured every ``eval_steps`` beside the reward.
        :param find_collapsed: Finds types of evaluation questions whose answers are all alike; None: not looked for,
            as always inside LightRFT.
        :param states: What the checkpoint of a resumed run remembers; None for a new run.
        """

    # ---- patches
    def patch_strategy(self, patch: Patch, strategy: Any, processor: Any, files: dict[str, str] | None) -> None:
        """Rollouts with audio, and folders that have the processor. See ``targets.py``."""

    def patch_experience_maker(self, patch: Patch, exp_maker: Any, audio_token_id: int) -> None:
        """What this host's experience maker needs beyond :func:`aqa.patches.experience_maker.take_audio`."""

    def patch_actor(self, patch: Patch, actor: Any) -> None:
        """Let an actor or reference model hear the clips in the image slot."""

    # ---- terminal and other ranks
    def status(self, text: str) -> None:
        """Show what takes a while, until something is printed."""

    def say(self, text: str) -> None:
        """Print on rank 0, with ``--quiet`` too."""

    def error_stream(self) -> TextIO:
        """Where an error's message is seen by the person at the terminal."""

    def speaks_for_node(self) -> bool:
        """True on the rank that prints errors shared by its node."""

    def leave(self, error: BaseException | None = None, may_follow: bool = False) -> bool:
        """Tell the other ranks how this one ends, so that they end too.

        :param error: What ended this rank; None if all is well.
        :param may_follow: The error may be the consequence of another rank's end.
        :return: True if another rank ended first. Its name has been printed, so this rank prints nothing.
        """
        return False

    def exit_status(self, error: BaseException) -> int | None:
        """The exit status of an error of this host whose message says all; None for any other."""
        return None
