"""The one error type for mistakes that a user can mend, and the search for the nearest right name."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, where (file, line, field), what was found, and what to do. The command line prints it and ends with `status`."""

    status = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'lora'?"`, or an empty string when nothing known is near `word`."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room (safetensors tells it in words only)."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    found = re.search(r"os error (\d+)", str(error))
    return found is not None and int(found[1]) in full
