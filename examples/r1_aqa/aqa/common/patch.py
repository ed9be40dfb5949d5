"""Replaced attributes of somebody else's objects: checked before, applied once, put back afterwards."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_MARK = "_r1_aqa_audio_patch"
_MISSING = object()


class PatchError(ImportError):
    """A symbol to be replaced is missing, or takes other arguments than expected."""


class Patch:
    """Replacements, and how to undo them: by :meth:`undo`, or at the end of a ``with`` block."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, make: Callable[[Any], Any], parameters: Sequence[str] | None = None) -> bool:
        """Replace a symbol by ``make(original)``, unless that has been done before.

        The original stays reachable as ``__wrapped__`` of the replacement.

        :param owner: Object, class or module where the caller looks the symbol up.
        :param parameters: Names that the symbol must take.
        :return: Whether it was replaced by this call.
        :raises PatchError: if the symbol is missing or does not take the parameters.
        """
        original = require(owner, name, parameters)
        if is_patched(owner, name):
            return False
        replacement = make(original)
        setattr(replacement, _MARK, True)
        replacement.__wrapped__ = original
        self.replace(owner, name, replacement)
        return True

    def put(self, owner: Any, name: str, function: Callable, parameters: Sequence[str] | None = None) -> bool:
        """As :meth:`wrap`, for a replacement that does not call the original."""
        # a partial object of its own: the mark must not be set on the function, which others may call
        return self.wrap(owner, name, lambda original: functools.partial(function), parameters)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, and remember what was there; nothing is checked."""
        old = vars(owner).get(name, _MISSING)
        if old is _MISSING:
            self._undo.append(lambda: delattr(owner, name))
        else:
            self._undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    def override(self, instance: Any, name: str, function: Callable[..., Any]) -> None:
        """Give one object a method of its own, by a class of its own; nothing is checked.

        A bound method among the object's attributes would refer back to it, so that a model that is deleted would keep
        its memory until the garbage collector runs.

        :param function: Takes the object first.
        """
        old = type(instance)
        self._undo.append(lambda: setattr(instance, "__class__", old))
        names = {"__module__": old.__module__, "__qualname__": old.__qualname__, "__doc__": old.__doc__}
        instance.__class__ = type(old)(old.__name__, (old,), names | {name: function})

    def undo(self) -> None:
        """Put everything back, last replacement first."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


@contextmanager
def all_or_nothing() -> Iterator[Patch]:
    """A patch that is undone if the block raises: its caller would have no :class:`Patch` to undo half of it with."""
    patch = Patch()
    try:
        yield patch
    except BaseException:
        patch.undo()
        raise


def require(owner: Any, name: str, parameters: Sequence[str] | None = None) -> Any:
    """The attribute, if it exists and takes the named parameters.

    :raises PatchError: otherwise; the message names the dotted path, the host and the versions that were tested.
    """
    where = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', type(owner).__qualname__)}.{name}"
    if inspect.ismodule(owner):
        where = f"{owner.__name__}.{name}"
    host = sys.modules.get("lightrft")
    host_text = f"lightrft {getattr(host, '__version__', '(no version)')} in {getattr(host, '__file__', 'nowhere')}"
    tested = "tested with LightRFT 0.1.1 and this project's runtime"
    target = getattr(owner, name, _MISSING)
    if target is _MISSING:
        raise PatchError(f"{where} does not exist in {host_text} ({tested}); it cannot be patched")
    if parameters is not None:
        present = list(inspect.signature(target).parameters)
        missing = [p for p in parameters if p not in present]
        if missing:
            raise PatchError(f"{where} takes {present}, without {missing}, in {host_text} ({tested})")
    return target


def is_patched(owner: Any, name: str) -> bool:
    """Whether a symbol has been replaced by :meth:`Patch.wrap`."""
    return getattr(getattr(owner, name, None), _MARK, False)
