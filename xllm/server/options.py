"""What a user may ask of the HTTP server, every knob once. `--help` reads it: nothing heavy is imported."""

import os
from dataclasses import dataclass

from xllm.config.options import knob
from xllm.core.errors import ConfigError

API_KEY_VARIABLE = "XLLM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the API listens, who may use it, how it ends."""

    host: str = knob("127.0.0.1", "address to listen on (0.0.0.0: every interface)")
    port: int = knob(8000, "port to listen on (0: any free one)")
    api_key: tuple[str, ...] = ()  # a repeatable flag, added by `serve.add_arguments`; else XLLM_API_KEY
    root_path: str = knob("", "path that a proxy in front shows this server under and strips, such as /llm")
    allowed_origins: tuple[str, ...] = knob((), "browser origins that may call the API (CORS); * for any")
    chat_template: str | None = knob(
        None, "Jinja chat template, a file or the text itself, instead of the model's"
    )
    trust_request_chat_template: bool = knob(False, "let requests bring their own chat_template")
    shutdown_timeout: float = knob(
        30.0, "seconds that running requests get to finish after SIGTERM or Ctrl-C"
    )
    profiler_dir: str | None = knob(
        None, "take traces on POST /start_profile and /stop_profile, and write them here", metavar="DIR"
    )
    disable_log_requests: bool = knob(False, "write no line per request")
    disable_log_stats: bool = knob(False, "write no line of throughput and load every ten seconds of work")
    log_level: str = knob(
        "info", "least serious log lines shown", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must lie between 0 and 65535, not {self.port}")
        if not 0 <= self.shutdown_timeout <= 86400:
            raise ConfigError(
                f"--shutdown-timeout must lie between 0 and 86400 seconds, not {self.shutdown_timeout}"
            )
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("--api-key must not be empty: it would let everybody in")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError("--root-path starts with a slash and does not end with one")

    def api_keys(self) -> tuple[str, ...]:
        """The keys that open the API: the flags', else the environment's, else none and the API is open."""
        if self.api_key:
            return self.api_key
        from_environment = os.environ.get(API_KEY_VARIABLE, "").strip()
        return (from_environment,) if from_environment else ()
