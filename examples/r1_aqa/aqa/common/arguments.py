"""The command line of every script: paths may begin with ``~``, and a mistake is one line."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

Flags = dict[str, tuple]  # of add_flags


def add_flags(parser: Any, table: Flags) -> None:
    """Add the flags of a table to a parser or to a group of its flags.

    :param table: Name to ``(default, help)``, or ``(default, help, further keywords of add_argument)``. A type in place
        of the default: the flag has none, and is None where it is not given. Booleans make a switch: --x and --no-x.
    """
    for name, (default, text, *further) in table.items():
        first = default[0] if isinstance(default, (list, tuple)) else default
        kind = first if isinstance(first, type) else type(first)
        value = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        if not isinstance(default, type):
            value["default"] = default
        parser.add_argument(name, help=text, **value, **(further[0] if further else {}))


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse's parser. It replaces ``~`` at the start of any value, which a shell leaves in ``--flag=~/x``, behind a
    comma and in variables, and answers a wrong flag with the one that is meant instead of all flags.

    :param essential: The flags that ``--help`` shows, where there are many; ``--help_all`` then shows all of them.
    :param examples: Commands, which ``--help`` shows behind its flags.
    """

    def __init__(self, *args: Any, essential: Sequence[str] = (), examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.essential, self.examples = essential, examples
        if essential:
            self.add_argument("--help_all", action=HelpAll, help="show all flags and exit")

    def format_help(self) -> str:
        """What ``--help`` shows."""
        if not self.essential:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s FLAGS", [], [])
        formatter.add_text(self.description)
        formatter.start_section("the flags that matter most")
        formatter.add_arguments([self._option_string_actions[flag] for flag in self.essential])
        formatter.end_section()
        shown = formatter.format_help() + f"\n{self.examples}\n" * bool(self.examples)
        return f"{shown}\n--help_all shows all {len(self._actions)} flags\n"

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's, which :meth:`parse_args` calls."""
        self.given = [expand_home(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(self.given, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and end with status 2."""
        known = flags_of(self)
        for word in self.given[: self.given.index("--") if "--" in self.given else None]:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(flag.startswith(name) for flag in known):
                close = difflib.get_close_matches(name, known, n=1)
                message += f"; {name}: did you mean {close[0]}?" if close else ""
        self.exit(
            2, f"{self.prog}: error: {message} ({'--help_all' if self.essential else '--help'} lists all flags)\n"
        )


class HelpAll(argparse._HelpAction):
    """Shows all flags, and ends."""

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        print(argparse.ArgumentParser.format_help(parser), end="")
        parser.exit()


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Long flags of a parser and of its commands."""
    flags = []
    for action in parser._actions:
        flags += [flag for flag in action.option_strings if flag.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for command in action.choices.values() for flag in flags_of(command)]
    return flags


def shell_command(script: str, *arguments: object) -> str:
    """A command line for a shell in this folder that runs a script below examples/r1_aqa.

    :param arguments: Absolute paths below this folder become relative ones.
    """
    example = Path(__file__).resolve().parents[2]
    same = os.path.dirname(shutil.which("python") or "") == os.path.dirname(sys.executable)
    words = ["python" if same else sys.executable, str(example / script), *map(str, arguments)]
    here = f"{os.getcwd()}/"
    return shlex.join(word.removeprefix(here) for word in words)


def expand_home(word: str) -> str:
    """A word of the command line with ``~`` replaced at its start, behind ``--flag=`` and behind each comma."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + ",".join(map(os.path.expanduser, value.split(",")))
