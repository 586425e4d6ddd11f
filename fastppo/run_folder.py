"""Checkpoint folders `checkpoint-<step>` of a run: which are whole, and how to write one in one go."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WRITING = ".writing-"


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` in one step, after everything was written."""
    temporary = folder.with_name(_WRITING + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():  # a run resumed from an older checkpoint comes by here again
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints, oldest first. transformers writes trainer_state.json last: without it a folder is a torso."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(filter(_is_whole, found), key=lambda path: int(path.name.rpartition("-")[2]))


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def resolve(output_dir: str | Path, resume: str | bool | None) -> str | None:
    """The checkpoint that `train(resume_from_checkpoint=resume)` means.

    True: the newest whole one, ValueError when there is none. "auto": the same, or None (a fresh start), so that one
    command both starts and resumes a run. A path is itself.
    """
    if resume not in (True, "auto"):
        return resume or None
    found = checkpoints(output_dir)
    if not found and resume is True:
        raise ValueError(f"train: no checkpoint to resume from in {output_dir}")
    return str(found[-1]) if found else None


def remove_old(output_dir: str | Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; None or 0 keeps all."""
    for path in checkpoints(output_dir)[:-keep] if keep else ():
        shutil.rmtree(path, ignore_errors=True)
