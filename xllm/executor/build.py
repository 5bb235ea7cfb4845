"""From a decided configuration to a Runner that is ready to step: device, operators, weights, memory, warm-up."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from xllm.config.decided import EngineConfig
from xllm.core.plan import NewSequence, StepPlan
from xllm.core.sampling import SamplingParams
from xllm.device.table import Device, open_device
from xllm.executor.buffers import InputBuffers
from xllm.executor.runner import Runner
from xllm.executor.sampling import Sampler
from xllm.models.forward import Model
from xllm.models.loader import load_model
from xllm.ops.table import load_ops

OnLoading = Callable[[str, int, int], None]  # what, done, total (bytes)


def build_runner(
    config: EngineConfig, *, on_loading: OnLoading | None = None, startup_s: dict[str, float] | None = None
) -> Runner:
    """`startup_s` receives the seconds of each part. Raises ConfigError for a checkpoint that does not fit its config."""
    parts = {} if startup_s is None else startup_s
    device = open_device(config.executor.device)
    device.prepare(threads=config.executor.threads)
    dtype: torch.dtype = getattr(torch, config.executor.dtype)
    with _timed(parts, "kernels"):
        ops = load_ops(config.executor.device, dtype)
    with _timed(parts, "weights"):
        model = load_model(
            config.model,
            dtype=dtype,
            device=device.torch_device,
            ops=ops,
            seed=config.executor.seed,
            progress=on_loading,
        )
    with _timed(parts, "memory"):
        runner = assemble(config, model, device, dtype)
    with _timed(parts, "warm-up"):
        _warm_up(runner)
    return runner


def assemble(config: EngineConfig, model: Model, device: Device, dtype: torch.dtype) -> Runner:
    """Memory around a model: KV cache, input buffers, sampler state."""
    m, cache, scheduler = config.model, config.cache, config.scheduler
    kv_cache = device.empty(
        (cache.num_blocks, m.num_layers, 2, cache.block_size, m.num_kv_heads, m.head_dim), dtype
    )
    buffers = InputBuffers(
        max_num_seqs=scheduler.max_num_seqs, max_model_len=scheduler.max_model_len,
        block_size=cache.block_size, device=device.torch_device,
    )  # fmt: skip
    sampler = Sampler(
        max_num_seqs=scheduler.max_num_seqs,
        vocab_size=m.vocab_size,
        tokens=buffers.tokens,
        device=device.torch_device,
    )
    return Runner(model, kv_cache, buffers, sampler)


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
