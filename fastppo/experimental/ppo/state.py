"""What a run remembers: the trainer's state with its episode count, and checkpoints that are whole or not there."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerState

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WRITING = ".writing-"


@dataclass
class OnlineTrainerState(TrainerState):
    """TrainerState; episode: responses that were learnt from."""

    episode: int = 0


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
    """Whole checkpoints, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_old(output_dir: str | Path, keep: int | None) -> None:
    for path in checkpoints(output_dir)[: -keep if keep else None] if keep else ():
        shutil.rmtree(path, ignore_errors=True)
