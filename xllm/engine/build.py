"""From what was asked to an engine core that runs: decide, then build."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from xllm.config.decided import EngineConfig, ModelConfig, TierConfig
from xllm.config.facts import ModelFacts, kept_in
from xllm.config.options import EngineOptions
from xllm.config.resolve import resolve
from xllm.core.errors import ConfigError
from xllm.device.facts import measure
from xllm.engine.admission import Admission
from xllm.engine.core import EngineCore
from xllm.engine.kv_events import EventStream
from xllm.executor.executor import Executor
from xllm.executor.stores.table import check_url
from xllm.kv.elastic import Elastic
from xllm.kv.events import DEVICE, DISK, HOST, EventLog
from xllm.kv.pool import BlockPool
from xllm.kv.ranges import Ranges
from xllm.kv.tiers.cost import Cost
from xllm.kv.tiers.offload import Offload
from xllm.kv.tiers.slots import SlotIndex
from xllm.kv.tiers.store import StoreView
from xllm.models.checkpoint import read_model_config
from xllm.models.quantisation import read_packing
from xllm.models.sizing import ITEM_BYTES, KV_ITEM_BYTES, kv_bytes_per_token, weight_bytes
from xllm.models.source import locate
from xllm.scheduler.scheduler import Scheduler
from xllm.wire.channel import Channel
from xllm.wire.messages import Loading

if TYPE_CHECKING:
    from xllm.engine.sharing import Sharing  # brings torch

AHEAD = 32  # tokens before a sequence fills its block, a page for the next is mapped
RESERVE_SEGMENTS = 2  # of an elastic pool, mapped ahead of demand


def decide(options: EngineOptions) -> EngineConfig:
    """Find the checkpoint, measure the machine, resolve. Torch-free; raises ConfigError with a sentence."""
    directory = locate(options.model, options.revision)
    overrides = _overrides(options.hf_overrides)
    model = read_model_config(directory, overrides, options.load_format)
    if options.kv_remote is not None:
        check_url(options.kv_remote)
    return resolve(options, model, model_facts(model, options.quantization), measure(options.device))


def check_traceable(config: EngineConfig, flag: str) -> None:
    """ConfigError where a trace of the engine would be empty; `flag` is what asked for it."""
    if config.executor.device == "cpu":
        raise ConfigError(
            f"{flag}: a trace shows what a card does; on a CPU the operators are plain C, which `perf record` sees and this does not"
        )


def model_facts(model: ModelConfig, quantization: str | None = None) -> ModelFacts:
    """`quantization` is what the user asks for: weights are sized in it too."""
    packing = read_packing(model.hf)
    schemes = {None, quantization, packing.scheme if packing else None}
    return ModelFacts(
        dtype=str(model.hf.get("dtype") or model.hf.get("torch_dtype") or "float32"),
        weight_bytes={
            kept_in(dtype, scheme): weight_bytes(model, dtype, scheme)
            for dtype in ITEM_BYTES
            for scheme in schemes
        },
        kv_bytes_per_token={dtype: kv_bytes_per_token(model, dtype) for dtype in KV_ITEM_BYTES},
        quantization=packing.scheme if packing else None,
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
    config: EngineConfig, inbox: Channel, on_loading: Callable[[Loading], None], startup_s: dict[str, float],
    *, followed: bool = False, sharing: "Sharing | None" = None,
) -> tuple[EngineCore, EngineConfig]:  # fmt: skip
    """Everything an engine needs, ready to run, and the configuration with what only the engine could measure.

    `startup_s` receives the seconds of each part. `followed`: clients may ask what is cached (`FollowKv`).
    `sharing`: KV goes to and comes from other engines.
    """
    with ExitStack() as undo:
        events = None
        if followed or config.kv_events is not None:  # before anything slow: the address may be taken
            events = EventStream(config.kv_events, config.cache.block_size)
            undo.callback(events.close)
        built = _build(config, inbox, on_loading, startup_s, events, sharing)
        undo.pop_all()
        return built


def _build(
    config: EngineConfig, inbox: Channel, on_loading: Callable[[Loading], None], startup_s: dict[str, float],
    events: EventStream | None, sharing: "Sharing | None",
) -> tuple[EngineCore, EngineConfig]:  # fmt: skip
    begin = time.perf_counter()
    # torch comes with these: only who runs a core pays for it
    from xllm.device.table import device_class
    from xllm.executor.build import build_runner
    from xllm.executor.runner import Runner

    startup_s["import"] = time.perf_counter() - begin
    runners: list[Runner] = []

    def build() -> Runner:
        nonlocal config
        runner, config = build_runner(
            config,
            on_loading=lambda what, done, total: on_loading(Loading(what=what, done=done, total=total)),
            startup_s=startup_s,
        )
        runners.append(runner)
        return runner

    asynchronous = device_class(config.executor.device).asynchronous
    executor = Executor(build, depth=config.scheduler.depth, asynchronous=asynchronous)
    scheduler_config = config.scheduler
    log = None if events is None else events.log
    pool, elastic, ranges = _memory(config, executor, log)
    offload = _offload(config.tiers, log, executor)
    if events is not None:
        events.cached = {DEVICE: pool.index.names, **({} if offload is None else offload.told())}
    scheduler = Scheduler(scheduler_config, pool, offload, elastic, ranges, peers=sharing is not None)
    admission = Admission(
        scheduler, eos_ids=frozenset(config.model.eos_ids), max_model_len=scheduler_config.max_model_len,
        seed=config.executor.seed, vocab_size=config.model.vocab_size,
    )  # fmt: skip
    peers = (
        None if sharing is None else sharing.open(runners[0].kv_cache, config, scheduler, admission, inbox)
    )
    core = EngineCore(
        scheduler, executor, inbox, admission, depth=scheduler_config.depth, events=events, peers=peers
    )
    return core, config


def _memory(
    config: EngineConfig, executor: Executor, log: EventLog | None
) -> tuple[BlockPool, Elastic | None, Ranges | None]:
    """Whose blocks are whose, and who decides which of them have memory, and at which addresses."""
    cache, scheduling = config.cache, config.scheduler
    each, places = executor.blocks_per_segment, executor.places
    pool = BlockPool(
        cache.num_blocks, cache.block_size, cache.prefix_caching, log, mapped=each or None,
        claimable=places is not None,
    )  # fmt: skip
    elastic = ranges = None
    if each:
        per_step = scheduling.max_num_batched_tokens // cache.block_size
        in_use = (1 + scheduling.depth) * per_step
        elastic = Elastic(pool, each, RESERVE_SEGMENTS * each, reserve_in_use=in_use)
    if places is not None:
        ranges = Ranges(
            pool, places.num_ranges, places.per_range, places.first_place, most_mapped=places.most_mapped,
            ahead=min(AHEAD, cache.block_size // 2),
        )  # fmt: skip
    return pool, elastic, ranges


def _offload(tiers: TierConfig | None, log: EventLog | None, executor: Executor) -> Offload | None:
    """What the tiers below the device hold, which on disk is what an earlier run has left there."""
    if tiers is None:
        return None
    host = SlotIndex(tiers.host_blocks, HOST, log)
    disk = SlotIndex(tiers.disk_blocks, DISK, log) if tiers.disk_blocks else None
    store = None if tiers.remote is None else StoreView()  # no events: who wants to know asks the store
    offload = Offload(host, disk, Cost(), store)
    if disk is not None:
        offload.recover(executor.recovered())
    return offload
