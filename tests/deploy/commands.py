"""Command lines out of manifests and units, read by the parsers that will read them in earnest."""

import argparse
import contextlib
import io
from collections.abc import Sequence

from xllm.cli import _parser
from xllm.cluster.policies import ROUTING
from xllm.config.flags import from_namespace
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError
from xllm.server.cluster_options import JoinOptions, RouterOptions
from xllm.server.options import ServerOptions

OPTIONS: dict[str, tuple[type, ...]] = {
    "serve": (ServerOptions, EngineOptions, JoinOptions),
    "router": (ServerOptions, RouterOptions),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Every option with its value, given or default. Raises ConfigError for what xllm would refuse to start with."""
    if not argv or argv[0] not in OPTIONS:
        raise ConfigError(f"a command of the service, not {argv[:1]}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            namespace = _parser(argv[0]).parse_args(argv)
    except SystemExit:
        raise ConfigError(complaint.getvalue().strip().splitlines()[-1]) from None
    values = vars(namespace)
    for options in OPTIONS[argv[0]]:
        values = {**values, **vars(from_namespace(options, namespace))}
    if "routing_policy" in values and values["routing_policy"] not in ROUTING:
        raise ConfigError(f"there is no routing policy {values['routing_policy']}")
    return argparse.Namespace(**values)
