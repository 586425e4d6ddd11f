"""mkdocs hooks.

settings.md: every field of the four configurations with its default and what its line says of it. README's tables of
measurements for the page that asks for them. Long names and tests' names in tables may break after an underscore.
"""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

HEAD = """# Every setting

Read from the classes when this site is built. On the command line, `learning_rate` is
`--learning-rate`. An unknown name or a value out of range raises and names the nearest valid one.
"""


def default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    name = getattr(field.default_factory, "__name__", "")
    return f"`{field.default_factory()!r}`" if name in ("dict", "list") else "set when made"


def table(rows: list[tuple[dataclasses.Field, str]]) -> str:
    lines = [
        f"| `{f.name}` | {default(f)} | {' '.join(text.split()).replace('|', chr(92) + '|')} |" for f, text in rows
    ]
    return "\n".join(["| setting | default | |", "|---|---|---|", *lines])


def classic() -> str:
    from fastppo.cli.options import comments
    from fastppo.config import PPOConfig

    said = comments(PPOConfig)
    return table([(f, said.get(f.name, "")) for f in dataclasses.fields(PPOConfig) if f.init])


def over(cls: type, base: type) -> str:
    """The fields that `cls` adds to `base` or gives another default."""
    known = {f.name: f.default for f in dataclasses.fields(base)}
    new: list[Any] = [f for f in dataclasses.fields(cls) if f.init and known.get(f.name, "absent") != f.default]
    return table([(f, f.metadata.get("help", "")) for f in new if "help" in f.metadata])


def page() -> str:
    from transformers import TrainingArguments

    from fastppo import RewardConfig, SFTConfig
    from fastppo.experimental.ppo import PPOConfig

    parts = [HEAD, "## PPOConfig of the classic trainer\n", classic()]
    for title, cls in (
        ("PPOConfig of the late trainer", PPOConfig),
        ("SFTConfig", SFTConfig),
        ("RewardConfig", RewardConfig),
    ):
        parts += [
            f"\n## {title}\n\nWhat it adds to `TrainingArguments`, or sets otherwise.\n",
            over(cls, TrainingArguments),
        ]
    return "\n".join(parts) + "\n"


def on_startup(**_: Any) -> None:
    """Brackets in docstrings, like [B][T], are shapes and no links; the pages' own links are checked apart from these."""
    logging.getLogger("mkdocs.plugins.mkdocs_autorefs").setLevel(logging.ERROR)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """README's tables, which `python -m bench.report` writes, in the place of their mark."""
    if "<!-- bench -->" not in markdown:
        return markdown
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    return markdown.replace("<!-- bench -->", re.split(r"<!-- bench:\w+.*?-->", readme)[1].strip())


def on_page_content(html: str, **_: Any) -> str:
    return re.sub(r"<td[^>]*>.*?</td>", breakable, html, flags=re.DOTALL)


def breakable(cell: re.Match) -> str:
    return re.sub(r"<code>(tests?[_/][^<]+|[^<]{33,})</code>", lambda code: code[0].replace("_", "_<wbr>"), cell[0])


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs before it reads the pages."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "settings.md", content=page()))
    return files
