import argparse

from xllm.bench.cli import add_parsers


def bench(*argv: str) -> int:
    """`xllm bench ...` without the process around it."""
    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    namespace = parser.parse_args(["bench", *argv])
    code: int = namespace.run(namespace)
    return code
