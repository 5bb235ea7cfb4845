"""Jinja as chat templates expect it, where a template can neither get out nor run without end."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 100_000  # loop iterations and macro calls of one rendering
MAX_LENGTH = 64 * 2**20  # characters a rendering, or a value it builds by multiplication, may have

# filters and methods of texts whose result may be longer than what they are given together
_AMPLIFIERS = {
    "center",
    "expandtabs",
    "format",
    "format_map",
    "indent",
    "join",
    "ljust",
    "replace",
    "rjust",
    "zfill",
}
# a width or precision from 1000, or one taken from the values
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)|\{[^{}]*:[^{}]*(\d{4}|\{)")
_steps: ContextVar[list[int]] = ContextVar("template_steps")


class TooMuch(TemplateError):
    """The template does more work than any chat needs."""


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training. Here its body is just shown."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Macro) -> str:
        return caller()


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The dialect of `transformers`: its whitespace rules, tags, filters and globals.

    Every turn of a loop and every call of a macro is charged to the rendering's budget; the charge is put
    into the syntax tree, so there is no construct that repeats for free. What makes texts longer than their
    parts (`*`, `~`, `%`, and the filters and methods in `_AMPLIFIERS`) is refused before it makes one of more
    than `MAX_LENGTH`.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        for name in _AMPLIFIERS & self.filters.keys():
            self.filters[name] = _guarded(name, self.filters[name])
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
            "namespace": _Namespace,
            "dict": _Dict(),
        }

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for node in list(source.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            charge = nodes.Call(nodes.EnvironmentAttribute("charge"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(charge).set_lineno(node.lineno))  # type: ignore[attr-defined]
        for joined in list(source.find_all(nodes.Concat)):
            parts = nodes.Call(nodes.EnvironmentAttribute("join_bounded"), joined.nodes, [], None, None)
            parts.set_lineno(joined.lineno)
            joined.nodes = [parts]
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    @staticmethod
    def charge() -> None:
        left = _steps.get()
        left[0] -= 1
        if left[0] < 0:
            raise TooMuch("the template takes too many steps")

    @staticmethod
    def join_bounded(*parts: Any) -> str:
        texts = [str(part) for part in parts]
        _bound(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _bound(_size(left) + _size(right))
        elif operator == "*" and not (isinstance(left, int) and isinstance(right, int)):
            _bound(_times(left) * _times(right))
        elif operator == "**" and (abs(left) > 2**32 or abs(right) > 64):
            raise TooMuch("the template computes a power that is too large")
        elif operator == "%" and isinstance(left, str):
            _bound_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__name__", None) in _AMPLIFIERS:
            method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
            _bound_growth(function.__name__, getattr(method, "__self__", None), *args, *kwargs.values())
        return super().call(context, function, *args, **kwargs)


@contextmanager
def budget(steps: int = MAX_STEPS) -> Iterator[None]:
    """What is rendered inside may take so many steps, then `TooMuch` is raised."""
    token = _steps.set([steps])
    try:
        yield
    finally:
        _steps.reset(token)


def _guarded(name: str, amplifier: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at its arguments before it does its work."""

    @functools.wraps(amplifier)  # also copies the marks by which Jinja knows what to pass first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _bound_growth(name, *args, *kwargs.values())
        return amplifier(*args, **kwargs)

    return bounded


def _bound_growth(name: str, *arguments: Any) -> None:
    """Refuse what could become too long: results have at most the product of all lengths and numbers."""
    product = 1
    for argument in arguments:
        product *= max(_times(argument), 1)
        if name.startswith("format") and isinstance(argument, str):
            _bound_format(argument)
    _bound(product)


def _bound_format(text: str) -> None:
    if _WIDE.search(text):
        raise TooMuch("the template formats text too wide")


def _bound(length: int) -> None:
    if length > MAX_LENGTH:
        raise TooMuch("the template builds a text that is too long")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def _times(value: Any) -> int:
    return abs(value) if isinstance(value, int) else _size(value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML, which would change what the model reads
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` without the type itself, whose attributes lead out."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's, but names that begin with an underscore cannot be set."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # no named parameter, not even self, so that a template may use any name
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the name {name!r}, which begins with an underscore")
