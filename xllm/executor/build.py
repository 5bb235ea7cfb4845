"""From a decided configuration to a Runner that is ready to step: device, operators, weights, memory, warm-up."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from xllm.config.decided import EngineConfig, TierConfig
from xllm.config.memory import gib
from xllm.core.errors import ConfigError
from xllm.core.plan import NewSequence, StepPlan
from xllm.core.sampling import SamplingParams
from xllm.device.facts import cpu_facts
from xllm.device.table import Device, open_device
from xllm.executor.buffers import InputBuffers
from xllm.executor.contiguous import ContiguousMemory, contiguous_cache, with_ranges_told
from xllm.executor.disk_tier import DiskTier
from xllm.executor.fingerprint import fingerprint
from xllm.executor.host_tier import HostTier
from xllm.executor.kv_memory import ElasticMemory, elastic_cache, whole_segments
from xllm.executor.measure import with_measured_cache
from xllm.executor.mover import Mover
from xllm.executor.rehearsal import rehearsed
from xllm.executor.remote_tier import RemoteTier
from xllm.executor.runner import Runner
from xllm.executor.sampling import Sampler
from xllm.executor.stores.table import check_url, open_store
from xllm.models.forward import Model
from xllm.models.loader import load_model
from xllm.ops.table import Ops, load_ops

OnLoading = Callable[[str, int, int], None]  # what, done, total (bytes)
MOVERS = 2  # threads of each kind between tiers
CAPTURE_S = (
    3.0  # for graphs before the first request; the rest are captured when there is time, or on first use
)


def build_runner(
    config: EngineConfig, *, on_loading: OnLoading | None = None, startup_s: dict[str, float] | None = None
) -> tuple[Runner, EngineConfig]:
    """The runner, and the configuration with its KV cache sized where that was left to us.

    `startup_s` receives the seconds of each part. Raises ConfigError for a checkpoint that does not fit its config.
    """
    parts = {} if startup_s is None else startup_s
    with _timed(parts, "device"):
        device = open_device(config.executor.device)
        device.prepare(threads=config.executor.threads)
    dtype: torch.dtype = getattr(torch, config.executor.dtype)
    with _timed(parts, "kernels"):
        ops = load_ops(config.executor.device, dtype, config.executor.quantization)
    with _timed(parts, "weights"), rehearsed(config, device, ops):
        model = load_model(
            config.model,
            dtype=dtype,
            device=device.torch_device,
            ops=ops,
            seed=config.executor.seed,
            progress=on_loading,
        )
        device.release()  # what loading needed beside the weights
    if config.cache.num_blocks == 0:
        with _timed(parts, "measure"):
            config = with_measured_cache(config, device, lambda trial: assemble(trial, model, device, ops))
    each = 0
    if config.cache.pool == "elastic":
        config, each = whole_segments(config, device)
    elif config.cache.pool == "contiguous":
        config = with_ranges_told(config)
    with _timed(parts, "memory"):
        runner = assemble(config, model, device, ops, blocks_each=each, trial=False)
    if config.tiers is not None:
        with _timed(parts, "tiers"):
            runner.mover = _mover(config, config.tiers, device, runner)
    with _timed(parts, "warm-up"):
        _warm_up(runner)
    if config.executor.graph_sizes:
        with _timed(parts, "graphs"):
            runner.improve_for(CAPTURE_S)
    return runner, config


def assemble(
    config: EngineConfig, model: Model, device: Device, ops: Ops, *, blocks_each: int = 0, trial: bool = True
) -> Runner:
    """Memory around a model: KV cache, input buffers, sampler state. With `blocks_each` the cache is in segments of so
    many blocks, whose memory comes and goes. For a `trial` the cache is in plain memory whatever the pool."""
    m, cache, scheduler = config.model, config.cache, config.scheduler
    spare = int(device.asynchronous)  # a slot and a block for rows that only fill a graph
    memory: ElasticMemory | None = None
    places: ContiguousMemory | None = None
    if blocks_each:
        kv_cache, memory = elastic_cache(config, device, blocks_each, spare)
    elif cache.pool == "contiguous" and not trial:
        kv_cache, places = contiguous_cache(config, device, spare)
    else:
        kv_cache = device.empty(
            (cache.num_blocks + spare, m.num_layers, 2, cache.block_size, m.num_kv_heads, m.head_dim),
            getattr(torch, cache.kv_dtype),
        )
    buffers = InputBuffers(
        max_num_seqs=scheduler.max_num_seqs, max_model_len=scheduler.max_model_len,
        block_size=cache.block_size, device=device, ops=ops, spare_block=cache.num_blocks,
    )  # fmt: skip
    sampler = Sampler(
        max_num_seqs=scheduler.max_num_seqs + spare,
        vocab_size=m.vocab_size,
        tokens=buffers.tokens,
        device=device,
        ops=ops,
    )
    runner = Runner(model, kv_cache, buffers, sampler, device, graph_sizes=config.executor.graph_sizes)
    runner.memory = memory
    runner.places = places
    return runner


def _mover(config: EngineConfig, tiers: TierConfig, device: Device, runner: Runner) -> Mover:
    """Tiers below the device, and who moves blocks between them. ConfigError where there is no room for them, or a store
    cannot be reached."""
    block_bytes = config.cache.block_bytes
    lent = 0 if tiers.remote is None else check_url(tiers.remote)
    wanted, free = tiers.host_blocks * block_bytes, cpu_facts().free_bytes - lent
    if wanted > free:  # Linux would promise it, and end somebody's process once it is used
        raise ConfigError(
            f"--kv-offloading-size: {gib(wanted)} of host memory are asked for, {gib(free)} are free"
        )
    try:
        memory = device.pinned(wanted)
    except (OSError, RuntimeError, ValueError) as e:
        raise ConfigError(f"--kv-offloading-size: {gib(wanted)} of host memory cannot be had: {e}") from e
    host = HostTier(memory, tiers.host_blocks, block_bytes)
    owner = fingerprint(config) if tiers.disk_path is not None or tiers.remote is not None else b""
    disk = remote = None
    if tiers.disk_path is not None:
        disk = DiskTier(Path(tiers.disk_path) / "xllm-kv-blocks", tiers.disk_blocks, block_bytes, owner)
    if tiers.remote is not None:
        try:
            remote = RemoteTier(open_store(tiers.remote), block_bytes, owner)
        except BaseException:
            if disk is not None:
                disk.close()
            raise
    ready = (lambda: None) if runner.memory is None else runner.memory.range.follow
    # where steps are computed elsewhere, checksums may have half the cores: two read memory slower than a card copies it
    workers = max(MOVERS, config.executor.threads // 2) if device.asynchronous else MOVERS
    return Mover(device, runner.kv_cache, host, disk, remote, workers=workers, ready=ready)


def _warm_up(runner: Runner) -> None:
    """One prefill and one decode, so that no request pays for what is set up on first use.

    Writes KV of block 0 only, which no hash names yet.
    """
    first = NewSequence(
        slot=0, request_id="warm-up", token_ids=[0, 0], prompt_len=2, params=SamplingParams(temperature=0.0),
        seed=0, stop_ids=(), blocks=[0],
    )  # fmt: skip
    runner.run(StepPlan(step=-2, new=[first], slots=[0], starts=[0], counts=[2], samples=[True], appended=[]))
    runner.run(StepPlan(step=-1, new=[], slots=[0], starts=[2], counts=[1], samples=[True], appended=[]))


@contextmanager
def _timed(into: dict[str, float], part: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    into[part] = time.perf_counter() - begin
