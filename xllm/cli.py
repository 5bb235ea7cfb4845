"""The command line: finds the command's room and hands over. No heavy import before `--help`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

# command -> (module whose `add_parsers(subparsers)` defines it, one line for --help)
COMMANDS = {
    "serve": ("xllm.server.serve", "serve a model over an OpenAI-compatible HTTP API"),
    "up": ("xllm.server.up", "serve a model with several engines behind a router, on this machine"),
    "router": ("xllm.server.router", "serve the instances of a cluster as one"),
    "chat": ("xllm.server.chat", "talk to a model in the terminal"),
    "complete": ("xllm.server.complete", "let a model continue a text in the terminal"),
    "bench": ("xllm.bench.cli", "measure a server or the engine"),
}
COLLECT_ENV = "collect-env"  # has a parser of its own

EXAMPLES = """\
examples:
  xllm serve demo                        the model that comes with xLLM, on http://127.0.0.1:8000/v1
  xllm chat demo                         the same model in the terminal
  xllm chat --url http://127.0.0.1:8000  a model that is being served
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 asked for something that cannot be, 130 interrupted."""
    from xllm.core.errors import ConfigError, XllmError

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == [COLLECT_ENV]:
            from xllm.bench import collect_env

            return collect_env.main(arguments[1:])
        namespace = _parser(arguments[0] if arguments else "").parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = namespace.run
        return run(namespace)
    except ConfigError as e:
        print(f"xllm: {e.message}", file=sys.stderr)
        return 2
    except XllmError as e:
        print(f"xllm: {e.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser(first: str) -> argparse.ArgumentParser:
    """Only the command that is going to run is defined in full."""
    parser = argparse.ArgumentParser(
        prog="xllm",
        description="xLLM: an inference engine and service for large language models.",
        epilog=EXAMPLES,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, help) in COMMANDS.items():
        if name == first:
            import_module(module).add_parsers(subparsers)
        else:
            subparsers.add_parser(name, help=help)
    subparsers.add_parser(COLLECT_ENV, help="print versions and hardware for a bug report")
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Makes room for the longest command, whose indentation argparse forgets when it lays out the columns."""

    def __init__(self, prog: str):
        super().__init__(prog)
        self._action_max_length = len(COLLECT_ENV) + 4


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from xllm.server.version import version

        print(f"xllm {version()}")
        parser.exit()


if __name__ == "__main__":
    raise SystemExit(main())
