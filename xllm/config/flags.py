"""Command line flags and YAML keys out of option dataclasses, and option dataclasses back out of what was given.

A dataclass field made by `knob` is one flag: `max_num_seqs: int | None` becomes `--max-num-seqs INT`, a bool becomes
`--x / --no-x`, a list or tuple takes several values. Every flag's argparse default is *absent*: the namespace holds
only what the user typed, so "flag, else config file, else default" is a plain lookup in `from_namespace`. Read flags
through `from_namespace`, not off the namespace.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from xllm.core.errors import ConfigError

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True, slots=True)
class _Knob:
    """One dataclass field as the command line sees it."""

    name: str
    type: Any  # int for `int | None`
    many: bool  # list[int], tuple[int, ...]
    annotation: Any
    default: Any
    meta: types.MappingProxyType[Any, Any]

    @property
    def flags(self) -> list[str]:
        long = self.meta.get("flag") or "--" + self.name.replace("_", "-")
        short = self.meta.get("short")
        return [short, long] if short else [long]


def add_flags(parser: argparse.ArgumentParser, *classes: type, config_file: bool = True) -> None:
    """Give `parser` one group of flags per dataclass, and `--config FILE` that fills any of them from YAML."""
    for cls in classes:
        group = parser.add_argument_group(*_title(cls))
        for knob in _knobs(cls):
            if knob.meta:
                _add_flag(group, knob)
    if config_file:
        parser.add_argument(
            "--config",
            action=_ReadConfig,
            classes=classes,
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="YAML file of flag names and values; flags on the command line win",
        )


def from_namespace(cls: type[Options], namespace: argparse.Namespace, **fixed: Any) -> Options:
    """The dataclass that a parsed command line asks for: `fixed`, else flag, else config file, else default.

    A field without a flag (a positional such as MODEL) is taken from the namespace too, unless it is None there.
    """
    typed = vars(namespace)
    in_file = typed.get("config") or {}
    given = dict(fixed)
    for knob in _knobs(cls):
        if knob.name in given:
            continue
        if typed.get(knob.name) is not None:
            value = typed[knob.name]
            given[knob.name] = tuple(value) if typing.get_origin(knob.annotation) is tuple else value
        elif knob.name in in_file:
            given[knob.name] = in_file[knob.name]
    return cls(**given)


def to_argv(options: Any) -> list[str]:
    """The flags that make these options out of the defaults, for a command that is started with them."""
    argv: list[str] = []
    for knob in _knobs(type(options)):
        value = getattr(options, knob.name)
        if not knob.meta or value == knob.default:
            continue
        flag = knob.flags[-1]
        if knob.type is bool:
            argv.append(flag if value else "--no-" + flag.removeprefix("--"))
        elif knob.many:
            argv += [flag, *map(str, value)]
        else:
            argv += [flag, str(value)]
    return argv


def read_config(path: str | Path, classes: Sequence[type]) -> dict[str, Any]:
    """A YAML file's values under field names, with their types checked against the dataclasses.

    Keys are spelled like flags or like fields (`max-num-seqs`, `max_num_seqs`). Raises `ConfigError` that names the
    file and the key; for an unknown key also the near matches.
    """
    import yaml  # not on the path of --help

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read the config file {path}: {e.strerror or e}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"the config file {path} is not YAML: {e}") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"the config file {path} must hold `flag: value` lines at its top level")
    knobs = {knob.name: knob for cls in classes for knob in _knobs(cls)}
    by_flag = {flag.lstrip("-"): knob.name for knob in knobs.values() for flag in knob.flags}
    values = {}
    for key, value in content.items():
        spelled = str(key)
        name = by_flag.get(spelled.replace("_", "-"), spelled)
        if name not in knobs:
            raise ConfigError(f"{path}: unknown key `{spelled}`{_near(spelled, knobs)}")
        values[name] = _checked(knobs[name], value, where=f"{path}: `{spelled}`")
    return values


class _ReadConfig(argparse.Action):
    """`--config FILE`: keeps the file's checked values in the namespace; errors are the parser's own."""

    def __init__(self, *args: Any, classes: Sequence[type], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.classes = classes

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            setattr(namespace, self.dest, read_config(values, self.classes))
        except ConfigError as e:
            parser.error(e.message)


def _add_flag(group: argparse._ArgumentGroup, knob: _Knob) -> None:
    how: dict[str, Any] = {"dest": knob.name, "default": argparse.SUPPRESS, "help": _help(knob)}
    if knob.type is bool:
        group.add_argument(*knob.flags, action=argparse.BooleanOptionalAction, **how)
        return
    how["type"] = knob.type
    if knob.meta.get("choices"):
        how["choices"] = list(knob.meta["choices"])
    else:
        how["metavar"] = knob.meta.get("metavar") or knob.type.__name__.upper()
    if knob.many:
        how["nargs"] = "+"
    group.add_argument(*knob.flags, **how)


def _help(knob: _Knob) -> str:
    text = str(knob.meta.get("help") or "").replace("%", "%%")
    if knob.default is None or knob.default == "" or "(default" in text:
        return text
    shown = "yes" if knob.default is True else "no" if knob.default is False else knob.default
    if knob.many:
        shown = " ".join(str(v) for v in knob.default)
    return f"{text} (default: {shown})" if shown != "" else text


def _title(cls: type) -> tuple[str, str | None]:
    """`EngineOptions` -> "engine options"; the group's text is the first line of the class's own docstring."""
    name = "".join(" " + c.lower() if c.isupper() else c for c in cls.__name__).strip()
    doc = (cls.__doc__ or "").strip()
    generated = doc.startswith(cls.__name__ + "(")  # what dataclass writes when there is none
    return name, None if generated or not doc else doc.splitlines()[0]


def _knobs(cls: type) -> Iterator[_Knob]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        annotation = _without_none(hints[field.name])
        origin = typing.get_origin(annotation)
        many = origin in (list, tuple)
        base = typing.get_args(annotation)[0] if many else origin or annotation
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        yield _Knob(field.name, base, many, annotation, default, field.metadata)


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kept = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(kept) == 1:
            return kept[0]
        raise TypeError(f"a knob has one type, or one and None; not {annotation}")
    return annotation


def _checked(knob: _Knob, value: Any, *, where: str) -> Any:
    if value is None:
        if knob.default is None:
            return None
        raise ConfigError(f"{where} needs a value")
    if knob.type is str and not knob.many and isinstance(value, (dict, list)):
        value = msgspec.json.encode(value).decode()  # a flag that takes JSON, written as plain YAML
    try:
        checked = msgspec.convert(value, knob.annotation)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{where}: {e}") from e
    choices = knob.meta.get("choices")
    for one in checked if knob.many else [checked]:
        if choices and one not in choices:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, choices))}; not {one!r}")
    return checked


def _near(key: str, knobs: dict[str, _Knob]) -> str:
    matches = difflib.get_close_matches(key.replace("-", "_"), knobs, n=3, cutoff=0.6)
    if not matches:
        return "; --help lists the known ones"
    return "; did you mean " + " or ".join(f"`{m}`" for m in matches) + "?"
