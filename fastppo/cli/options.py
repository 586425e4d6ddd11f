"""Options as dataclasses: flags by tyro, a YAML file by --config, flags win; a wrong name is answered with the nearest."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastppo.cli.errors import UserError, nearest

Options = TypeVar("Options")


def comments(cls: type) -> dict[str, str]:
    """field -> what the class's source says about it: the comment on its line, or the docstring under it."""
    said = {}
    pattern = r'^ {4}(\w+):[^\n#]*(?:#\s*([^\n]*))?\n(?: {4}"""(.*?)""")?'
    for name, comment, docstring in re.findall(pattern, inspect.getsource(cls), re.MULTILINE | re.DOTALL):
        said[name] = " ".join((docstring or comment or "").split())
    return said


def as_flat_class(name: str, doc: str, *parts: type) -> type:
    """One dataclass with the fields of all `parts` and none of their checks: those run once all values are known.

    A YAML file may set batch_size and a flag mini_batch_size: neither alone need be valid.
    """
    made = {}
    for part in parts:
        hints, said = typing.get_type_hints(part), comments(part)
        for field in dataclasses.fields(part):
            if field.init and field.name not in made:
                hint = with_help(hints[field.name], said.get(field.name, ""))
                default = dataclasses.field(default=field.default, default_factory=field.default_factory)
                made[field.name] = (field.name, hint, default)
    return dataclasses.make_dataclass(name, made.values(), namespace={"__doc__": doc})


def with_help(hint: Any, text: str) -> Any:
    """`hint` with its help text; a dictionary is given on the command line as YAML: '{project: stories}'."""
    import tyro
    import yaml

    marks = [tyro.conf.arg(help=text)] if text else []
    if typing.get_origin(hint) is dict or hint is dict:
        marks.append(
            tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar="YAML",
                instance_from_str=lambda words: yaml.safe_load(words[0]),
                is_instance=lambda value: isinstance(value, dict),
                str_from_instance=lambda value: [yaml.safe_dump(value, default_flow_style=True).strip()],
            )
        )
    return Annotated[(hint, *marks)] if marks else hint


def parse(cls: type[Options], argv: Sequence[str], prog: str, description: str | None = None) -> Options:
    """Parse --config's YAML file and the flags, which win, into the dataclass `cls`.

    A wrong flag or value ends the process with status 2, as shells expect of usage errors. Raises UserError.
    """
    argv, file = take_config(argv)
    return parse_over(cls, argv, read_yaml(file, cls) if file else {}, prog, description)


def parse_over(
    cls: type[Options], argv: Sequence[str], values: Mapping[str, Any], prog: str, description=None
) -> Options:
    """`values` as cls, with the flags in argv over them."""
    import tyro

    note = f"{description or ''}\n\n--config FILE reads any of these from a YAML file; flags win over it."
    try:
        default = cls(**values)
        return tyro.cli(cls, args=argv, default=default, prog=prog, description=note)
    except ValueError as error:
        raise UserError(str(error)) from error


def take_config(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """argv without --config FILE (or --config=FILE), and the file."""
    rest, file, words = [], None, iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            file = word.partition("=")[2] or next(words, None)
            if not file:
                raise UserError("--config needs a YAML file after it")
        else:
            rest.append(word)
    return rest, Path(file) if file else None


def read_yaml(file: Path, cls: type) -> dict[str, Any]:
    """The file's values, by field of `cls`; keys may be written with - or _."""
    return check_values(load_yaml(file), cls, f"--config: {file}")


def load_yaml(file: Path) -> Mapping[Any, Any]:
    """The mapping in `file`. Raises UserError."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config: cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {file} is not YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"--config: {file} must hold 'name: value' lines; got a {type(values).__name__}")
    return values


def check_values(values: Mapping[Any, Any], cls: type, where: str) -> dict[str, Any]:
    """`values` by field of `cls`, in the fields' types; `where` names their source in errors."""
    hints, read = typing.get_type_hints(cls), {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise UserError(f"{where} sets {key!r}, which is no option.{nearest(name, hints)}")
        try:
            read[name] = convert(value, hints[name])
        except (TypeError, ValueError):
            wanted = hints[name].__name__ if isinstance(hints[name], type) else str(hints[name])
            raise UserError(f"{where}: {key} must be {wanted}; got {value!r}") from None
    return read


def convert(value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it. YAML reads 1e-5, which has no dot, as text; it is a number here."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return convert(value, next(option for option in options if option is not type(None)))
    kind = typing.get_origin(hint) or hint
    if kind is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError
        return value
    if kind is list:
        (inner,) = typing.get_args(hint)
        return [convert(each, inner) for each in (value if isinstance(value, list) else [value])]
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is Any:
        return value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError
    return value


def to_yaml_values(options: Any, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """What read_yaml reads back."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in leave_out}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
