"""The example's package; each module says what it does."""

import os as _os

# As the runtime sets it, for the scripts without the runtime, before torch is imported: OpenMP's threads spin while
# they wait, which makes a script many times slower on a machine with other work.
_os.environ.setdefault("GOMP_SPINCOUNT", "3000")
