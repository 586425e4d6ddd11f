"""README.md of a saved model: what it was trained from, with what, and how to use it."""

from pathlib import Path
from typing import Any

import yaml

METHODS = {
    "sft": "supervised fine-tuning",
    "reward": "reward modelling on preference pairs ([Bradley-Terry](https://doi.org/10.2307/2334029))",
    "ppo": "PPO ([Fine-Tuning Language Models from Human Preferences](https://huggingface.co/papers/1909.08593))",
}


def write_model_card(
    folder: str | Path,
    method: str,
    *,
    model: Any,
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
) -> Path:
    """Write `folder`/README.md (the front matter of one that PEFT wrote is kept and added to) and return its path.

    method: one of METHODS. model: for the name of the base model and whether it is an adapter.
    """
    import torch
    import transformers

    import fastppo

    path = Path(folder) / "README.md"
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    name = model_name or Path(folder).resolve().name
    front = _front_matter(path)
    front.setdefault("library_name", "peft" if hasattr(model, "peft_config") else "transformers")
    front |= {"model_name": name} | ({"base_model": base} if base else {})
    front |= {"datasets": dataset_name} if dataset_name else {}
    own = ["fastppo", method, *([tags] if isinstance(tags, str) else tags or ())]
    front["tags"] = list(dict.fromkeys([*(front.get("tags") or []), *own]))
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n",
        f"# {name}\n",
        f"Trained with fastppo from {base or 'a model without a name'} by {METHODS[method]}.\n",
        "| package | version |\n|---|---|",
        *(f"| {module.__name__} | {module.__version__} |" for module in (fastppo, torch, transformers)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _front_matter(path: Path) -> dict:
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8").split("---\n")
    return (yaml.safe_load(parts[1]) or {}) if len(parts) >= 3 and not parts[0] else {}
