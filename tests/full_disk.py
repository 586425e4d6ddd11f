"""Commands on a file system that fills up: run by tests in a mount namespace of its own, where `disk` is a small tmpfs.

python full_disk.py KIND FREE_BYTES: `fastppo KIND` on disk/run; before its third checkpoint all space but FREE_BYTES is taken.
Prints as JSON the exit status, what stands on stderr and in the folder, then, with the space free again, the status of the
same command and a digest of the weights that it made.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path

from kill_runs import TRAIN, command_line

import fastppo.checkpoint
import fastppo.trainer_checkpoints
from fastppo.cli import main

FILLER = Path("disk/filler")


def fill(free: int) -> None:
    with open(FILLER, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    if free:
        os.truncate(FILLER, max(0, FILLER.stat().st_size - free))


def fill_before(module, name: str, free: int) -> None:
    """The third call of module.name finds the disk full."""
    real, calls = getattr(module, name), []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            fill(free)
        return real(*arguments, **options)

    setattr(module, name, wrapped)


def command(kind: str, folder: str, again: bool) -> list[str]:
    if kind == "train":
        return ["train", "--resume", folder] if again else [*TRAIN.split(), "--output-dir", folder]
    return command_line(kind, folder)


def digest(kind: str, folder: str) -> str:
    path = Path(folder, "policy" if kind == "train" else "model", "model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(kind: str, free: int) -> dict:
    whole = main(command(kind, "disk/whole", False))
    wanted = digest(kind, "disk/whole")
    for module, name in ((fastppo.checkpoint, "_write_files"), (fastppo.trainer_checkpoints, "collect")):
        fill_before(module, name, free)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(command(kind, "disk/run", False))
    left = sorted(str(path.relative_to("disk/run")) for path in Path("disk/run").rglob("*") if path.is_dir())
    FILLER.unlink()
    again = main(command(kind, "disk/run", True))
    found = {"statuses": [whole, status, again], "said": said.getvalue(), "left": left}
    return found | {"same": digest(kind, "disk/run") == wanted}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]))))
