"""`python -m tests.server.fake_serve serve ...`: the real command line over the pretended engine."""

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.server.fake_engine import make_engine
from xllm.cli import main
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError
from xllm.engine.async_llm import AsyncLLM
from xllm.wire.messages import Loading


async def start(
    options: EngineOptions, *, in_process: bool = False, on_event: Any = None, listening: Any = None
) -> AsyncLLM:
    if options.model == "nowhere":
        raise ConfigError("there is no model called nowhere")
    report = on_event or (lambda _: None)
    report("KV cache 1 MiB: enough for a fake")
    report(Loading(what="weights", done=500_000, total=1_000_000))
    report(Loading(what="weights", done=1_000_000, total=1_000_000))
    if options.model == "slow":
        await asyncio.sleep(60)
    engine = make_engine(Path(tempfile.gettempdir()))
    engine._client.step_s = 0.02 if options.model == "steady" else 0.001  # type: ignore[attr-defined]
    return engine


if __name__ == "__main__":
    AsyncLLM.start = start  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
