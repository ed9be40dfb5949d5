"""The example's package; each module says what it does."""

import os as _os
import sys as _sys

# As the runtime sets it, for the scripts without the runtime, before torch is imported: OpenMP's threads spin while
# they wait, which makes a script many times slower on a machine with other work.
_os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _show_error(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Answer Ctrl-C by a line in place of a traceback, also while a script imports what it needs."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"\n{_os.path.basename(_sys.argv[0])}: interrupted", file=_sys.stderr)
    else:
        _sys.__excepthook__(kind, error, trace)


_sys.excepthook = _show_error
