"""From what was asked to an engine core that runs: decide, then build."""

import json
import time
from collections.abc import Callable

from xllm.config.decided import EngineConfig, ModelConfig
from xllm.config.facts import ModelFacts
from xllm.config.options import EngineOptions
from xllm.config.resolve import resolve
from xllm.core.errors import ConfigError
from xllm.device.facts import measure
from xllm.engine.admission import Admission
from xllm.engine.core import EngineCore
from xllm.executor.executor import Executor
from xllm.kv.pool import BlockPool
from xllm.models.checkpoint import read_model_config
from xllm.models.sizing import ITEM_BYTES, kv_bytes_per_token, weight_bytes
from xllm.models.source import locate
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.channel import Channel
from xllm.wire.messages import Loading


def decide(options: EngineOptions) -> EngineConfig:
    """Find the checkpoint, measure the machine, resolve. Torch-free; raises ConfigError with a sentence."""
    directory = locate(options.model, options.revision)
    overrides = _overrides(options.hf_overrides)
    model = read_model_config(directory, overrides, options.load_format)
    return resolve(options, model, _facts(model), measure(options.device))


def _facts(model: ModelConfig) -> ModelFacts:
    return ModelFacts(
        dtype=str(model.hf.get("dtype") or model.hf.get("torch_dtype") or "float32"),
        weight_bytes={dtype: weight_bytes(model, dtype) for dtype in ITEM_BYTES},
        kv_bytes_per_token={dtype: kv_bytes_per_token(model, dtype) for dtype in ITEM_BYTES},
    )


def _overrides(text: str | None) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        overrides = json.loads(text)
    except ValueError as e:
        raise ConfigError(f"--hf-overrides is not JSON: {e}") from e
    if not isinstance(overrides, dict):
        raise ConfigError("--hf-overrides must be a JSON object")
    return overrides


def build_core(
    config: EngineConfig, inbox: Channel, on_loading: Callable[[Loading], None], startup_s: dict[str, float]
) -> EngineCore:
    """Everything an engine needs, ready to run. `startup_s` receives the seconds of each part."""
    begin = time.perf_counter()
    from xllm.executor.build import build_runner  # torch comes with it: only who runs a core pays for it

    startup_s["import"] = time.perf_counter() - begin

    cache, scheduler_config = config.cache, config.scheduler
    executor = Executor(
        lambda: build_runner(
            config,
            on_loading=lambda what, done, total: on_loading(Loading(what=what, done=done, total=total)),
            startup_s=startup_s,
        ),
        depth=scheduler_config.depth,
    )
    pool = BlockPool(cache.num_blocks, cache.block_size, cache.prefix_caching)
    scheduler = Scheduler(scheduler_config, pool)
    admission = Admission(
        scheduler, eos_ids=frozenset(config.model.eos_ids), max_model_len=scheduler_config.max_model_len,
        seed=config.executor.seed,
    )  # fmt: skip
    return EngineCore(scheduler, executor, inbox, admission, depth=scheduler_config.depth)
