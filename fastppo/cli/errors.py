"""What the user can put right: shown as one message with exit status 1; anything else is a bug and shows its traceback."""

import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Names what was wrong, what came, and what to do."""


class RewardError(UserError):
    """The user's reward raised, or returned something that is not one finite number per response."""


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean 'x'? ' plus the list, for the end of an error message."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if near and len(names) > 60:  # the list would bury the hint
        return hint
    return f"{hint} There is: {', '.join(names) or 'nothing'}."


def one_line(error: object, longest: int = 400) -> str:
    """An error's text without line breaks, cut after `longest` characters."""
    said = " ".join(str(error).split())
    return said if len(said) <= longest else f"{said[:longest]}..."


def disk_error(path: object, why: str, option: str = "--output-dir") -> UserError:
    """What the disk refused where `option` said, with what to do about it."""
    if Path(str(path)).is_file() and why == os.strerror(errno.EEXIST):
        return UserError(f"{option}: {path} is a file; a folder is wanted. Choose another {option}.")
    return UserError(
        f"cannot write {path}: {why}. Free some space, make the folder writable, or choose another {option}."
    )
