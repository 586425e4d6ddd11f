"""Checkpoint folders `checkpoint-<step>` of a run: which are whole, and how to write one in one go."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastppo.disk import CheckpointError, finish_removing, make_folder, remove, sync_folder, sync_tree

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WRITING, _BEFORE = ".writing-", ".before-"
# resume.json tells a checkpoint that fastppo wrote; trainer_state.json is transformers' own
RESUME, STATE = "resume.json", "trainer_state.json"


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` in one step, after everything was written and is on the disk."""
    temporary, before = (folder.with_name(prefix + folder.name) for prefix in (_WRITING, _BEFORE))
    make_folder(folder.parent)
    if before.exists() and not folder.exists():  # a run was killed between the two renames below
        os.rename(before, folder)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            os.rename(folder, before)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(before, ignore_errors=True)


def remove_leftovers(output_dir: str | Path) -> None:
    """Delete what killed runs left of checkpoints half-written or half-deleted."""
    for prefix in (_WRITING, _BEFORE):
        for path in Path(output_dir).glob(f"{prefix}checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
    finish_removing(Path(output_dir))


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints, oldest first, told by trainer_state.json, which transformers writes last; `resolve` looks closer."""
    return [path for path in _all(output_dir) if _is_whole(path)]


def _all(output_dir: str | Path) -> list[Path]:
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of)


def later_than(output_dir: str | Path, step: int) -> list[Path]:
    """Checkpoints of steps past `step`, whole or not."""
    return [path for path in _all(output_dir) if step_of(path) > step]


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def resolve(
    output_dir: str | Path, resume: str | bool | None, accelerator: "Accelerator | None" = None
) -> tuple[str | None, list[str]]:
    """The checkpoint that `train(resume_from_checkpoint=resume)` means, and why newer ones were passed over.

    True: the newest one that is whole, ValueError when there is none. "auto": the same, or None (a fresh start), so that one
    command both starts and resumes a run. A path is itself. With many processes the first one looks, for all.
    Raises CheckpointError when there are checkpoints and not one is whole: to start anew is for the user to say.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return _resolve(output_dir, resume)
    from accelerate.utils import broadcast_object_list

    from fastppo.distributed import together

    chosen = [None]
    with together(accelerator, "looking for a checkpoint"):
        if accelerator.is_main_process:
            chosen = [_resolve(output_dir, resume)]
    broadcast_object_list(chosen)
    return chosen[0]


def _resolve(output_dir: str | Path, resume: str | bool | None) -> tuple[str | None, list[str]]:
    from fastppo import manifest

    if resume not in (True, "auto"):
        # one of ours whose manifest is gone is none of transformers'
        if resume and any((Path(resume) / name).exists() for name in (manifest.MANIFEST, RESUME)):
            manifest.check(Path(resume))
        return (str(resume), []) if resume else (None, [])
    passed_over = []
    for path in reversed(_all(output_dir)):
        try:
            manifest.check(path)
            return str(path), passed_over
        except CheckpointError as error:
            logger.warning("checkpoint passed over: %s", error)
            passed_over.append(str(error))
    if passed_over:
        raise CheckpointError(
            f"{output_dir}: no checkpoint that can be loaded: {'; '.join(passed_over)}. To start anew, remove them or "
            "choose another output folder."
        )
    if resume is True:
        raise ValueError(f"train: no checkpoint to resume from in {output_dir}")
    return None, []


def remove_old(output_dir: str | Path, keep: int | None, best: str | Path | None = None) -> None:
    """Delete all but `keep` checkpoints: the newest ones, and among them the best one; None or 0 keeps all."""
    found = checkpoints(output_dir)
    old = [path for path in found[:-1] if best is None or path.resolve() != Path(best).resolve()]
    best_is_old = len(old) < len(found) - 1
    for path in old[: max(0, len(found) - max(keep, 1 + best_is_old))] if keep else ():
        remove(path)
