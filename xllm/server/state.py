"""What every route of one server shares. Made once by `create_app`; only `draining` changes afterwards."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.requests import Request

from xllm.config.options import EngineOptions
from xllm.core.sampling import SamplingParams
from xllm.core.targets import Targets
from xllm.server.engine import Engine
from xllm.server.errors import model_not_found
from xllm.server.metrics import Metrics
from xllm.server.options import ServerOptions
from xllm.text.chat import ChatTemplate


@dataclass(kw_only=True)
class ServerState:
    engine: Engine
    asked: EngineOptions
    options: ServerOptions
    metrics: Metrics
    chat_template: ChatTemplate | None  # None: the model cannot chat
    created: int = field(default_factory=lambda: int(time.time()))
    targets: Targets | None = None  # for requests that bring none; None where nobody looks at them
    draining: bool = False
    # long texts are tokenised off the event loop, one at a time: the engine wants the other cores
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "xllm-tokenize"))

    @property
    def model(self) -> str:
        return served_name(self.asked)

    @property
    def max_model_len(self) -> int:
        return self.engine.config.scheduler.max_model_len

    @property
    def scheduling(self) -> str:
        return self.engine.config.scheduler.order

    @property
    def default_params(self) -> dict[str, Any]:
        """Of the model's own sampling defaults, those that `SamplingParams` knows."""
        known = SamplingParams.__struct_fields__
        return {name: value for name, value in self.engine.default_params.items() if name in known}

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise model_not_found(name)

    def close(self) -> None:
        self.tokenizing.shutdown(wait=False, cancel_futures=True)


def served_name(asked: EngineOptions) -> str:
    return asked.served_model_name or asked.model


def of(request: Request) -> ServerState:
    return cast(ServerState, request.app.state.server)
