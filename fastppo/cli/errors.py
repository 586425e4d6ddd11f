"""What the user can put right: shown as one message with exit status 1; anything else is a bug and shows its traceback."""

import difflib
from collections.abc import Iterable


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


def disk_error(path: object, why: str) -> UserError:
    """What the disk refused in the output folder, with what to do about it."""
    return UserError(
        f"cannot write {path}: {why}. Free some space, make the folder writable, or choose another --output-dir."
    )
