"""The command line: `fastppo demo | train | pipeline | ...`. Each command is a module here with `run(argv) -> exit status`."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

# name -> what it does, in one line
COMMANDS = {
    "demo": "train a small language model, then watch PPO improve it (no network, no GPU, under 3 minutes)",
    "train": "the same loop on your model, your prompts and your reward",
    "pipeline": "fine-tuning, a reward model and PPO against it, from one file of preference pairs",
    "sft": "supervised fine-tuning on text, messages, or prompts with completions",
    "reward": "a reward model from preference pairs",
    "ppo": "PPO with the late trainer against a reward model, a function or an endpoint",
    "report": "an HTML page of curves and samples over one or more runs",
    "plan": "memory per GPU, the largest micro-batch and tokens/s of a run, before you rent it",
    "info": "versions, device, and which back ends run here or why not",
}


def usage() -> str:
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: fastppo COMMAND [OPTIONS]", "", *lines, "", "'fastppo COMMAND --help' lists a command's options."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. Errors the user can act on are one line on stderr, not a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        import fastppo

        print("fastppo", fastppo.__version__)
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean 'fastppo {near[0]}'?" if near else ""
        print(f"fastppo: error: there is no command {command!r}.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    from fastppo.cli.errors import UserError
    from fastppo.cli.lock import on_cpus_alone, release

    if on_cpus_alone():
        os.environ["ACCELERATE_USE_CPU"] = "1"  # as accelerate launch --cpu does; transformers' arguments read it, too
    try:
        return importlib.import_module(f"fastppo.cli.{command}").run(rest)
    except UserError as error:
        print(f"\nfastppo {command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nfastppo {command}: interrupted", file=sys.stderr)
        return 130
    finally:
        release()
