"""Compiling what the first steps need, beside the loading of weights, on devices that compile at run time.

One layer of the model is gone through for steps of the sizes that take different kernels. Nothing of ours runs: kernels
are compiled alone, and what is between them computes garbage over memory that is thrown away. What is left out, or does
not compile, is compiled when it is first used; what was compiled on this machine before takes no time.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from xllm.config.decided import EngineConfig
from xllm.device.table import Device
from xllm.models.forward import Forward, Model
from xllm.models.spec import Parameter
from xllm.models.table import find_family
from xllm.ops.attention import SPLIT_TOKENS, AttentionInputs
from xllm.ops.sampling import SlotNumbers
from xllm.ops.table import Ops

log = logging.getLogger(__name__)
DECODES = (1, 8, 16, 32, 64, 128)  # sequences: up to these other kernels are taken; more are as any
CHUNKS = (2048, 128)  # tokens of a prompt, many and few for a card


@contextmanager
def rehearsed(config: EngineConfig, device: Device, ops: Ops) -> Iterator[None]:
    """Compiles while the body runs; at its end all is compiled. Nothing where the device compiles nothing, or the weights
    are quantised."""
    if ops.compiling is None or ops.quantised is not None:
        yield
        return
    thread = threading.Thread(target=_rehearse, args=(config, device, ops), name="xllm-rehearsal")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _rehearse(config: EngineConfig, device: Device, ops: Ops) -> None:
    assert ops.compiling is not None
    try:
        with (
            torch.inference_mode(),
            torch.device(device.torch_device),
            ops.compiling(config.executor.threads),
        ):
            Rehearsal(config, ops).run()
    except Exception as e:
        log.warning("kernels could not be compiled ahead, the first steps will be slower: %s", e)


class Rehearsal:
    """Made and run on PyTorch's default device."""

    def __init__(self, config: EngineConfig, ops: Ops):
        self.config = config
        self.ops = ops
        self.dtype: torch.dtype = getattr(torch, config.executor.dtype)
        m, cache = config.model, config.cache
        shape = (1, m.num_layers, 2, cache.block_size, m.num_kv_heads, m.head_dim)
        self.kv_cache = torch.zeros(shape, dtype=getattr(torch, cache.kv_dtype))
        self.width = -(-config.scheduler.max_model_len // cache.block_size)

    def run(self) -> None:
        """What takes longest to compile comes first."""
        self._sample()
        model = self._model()
        longest = self.config.scheduler.max_model_len
        for tokens in dict.fromkeys(min(tokens, longest) for tokens in CHUNKS):
            self._step(model, self._chunk(tokens))
        for count in DECODES:
            if count <= self.config.scheduler.max_num_seqs:
                self._decode(model, count)

    def _model(self) -> Model:
        """The first layers, one of each kind of window, over weights that share their memory."""
        family = find_family(self.config.model.architecture)
        kinds = len(set(family.spec(self.config.model).windows))
        small = replace(self.config.model, num_layers=kinds)
        parameters = family.parameters(small)
        return family.build(small, _shared(parameters, self.dtype, self.ops), self.ops)

    def _decode(self, model: Model, count: int) -> None:
        slots = torch.zeros(count, dtype=torch.int64)
        length = self.config.scheduler.max_model_len
        tokens = torch.zeros((1, length + 1), dtype=torch.int64)
        table = torch.zeros((1, self.width), dtype=torch.int32)
        self.ops.decode_inputs(slots, slots, tokens, table, self.config.cache.block_size)
        ones = torch.ones(count, dtype=torch.int32)
        inputs = AttentionInputs(
            query_starts=torch.arange(count + 1, dtype=torch.int32), context_lens=ones,
            block_table=torch.zeros((count, self.width), dtype=torch.int32), kv_slots=slots,
            max_query_len=1, max_context_len=length, num_decodes=count,
        )  # fmt: skip
        self._step(model, Forward(slots, slots, inputs, self.kv_cache, None))

    def _sample(self) -> None:
        """Of logits as they come, and of edited ones, which are float32."""
        if self.ops.sample is None:
            return
        slots = torch.zeros(1, dtype=torch.int64)
        tokens = torch.zeros((1, self.config.scheduler.max_model_len + 1), dtype=torch.int64)
        for dtype in (self.ops.activation_dtype, torch.float32):
            logits = torch.zeros((1, self.config.model.vocab_size), dtype=dtype)
            self.ops.sample(logits, slots, slots, _numbers(), tokens)

    def _step(self, model: Model, fwd: Forward) -> torch.Tensor:
        return model.logits(model.forward(fwd))

    def _chunk(self, tokens: int) -> Forward:
        """A prompt of one sequence beside one decode. A short one as behind a long context, and as in its graph: with the
        keys of its tiles in parts."""
        ids = torch.zeros(tokens + 1, dtype=torch.int64)
        inputs = AttentionInputs(
            query_starts=torch.tensor([0, 1, tokens + 1], dtype=torch.int32),
            context_lens=torch.tensor([1, tokens], dtype=torch.int32),
            block_table=torch.zeros((2, self.width), dtype=torch.int32), kv_slots=ids,
            max_query_len=tokens, max_context_len=tokens, num_decodes=1,
            tiles=torch.tensor([[1, 0]], dtype=torch.int32),
            parts=torch.tensor([[0, 1]], dtype=torch.int32) if tokens <= SPLIT_TOKENS else None,
        )  # fmt: skip
        return Forward(ids, ids, inputs, self.kv_cache, torch.tensor([0, tokens]))


def _shared(parameters: tuple[Parameter, ...], dtype: torch.dtype, ops: Ops) -> Mapping[str, Any]:
    """Every parameter in its shape and dtype, all in one piece of memory: nobody will read it."""
    memory = torch.zeros(max(p.numel for p in parameters), dtype=dtype)
    vectors = memory.to(ops.activation_dtype)
    return {p.name: (memory if p.kind == "weight" else vectors)[: p.numel].view(p.shape) for p in parameters}


def _numbers() -> SlotNumbers:
    return SlotNumbers(
        starts=torch.zeros(1, dtype=torch.int64),
        inv_temperature=torch.zeros(1, dtype=torch.float32),
        min_p=torch.zeros(1, dtype=torch.float32),
        top_p=torch.ones(1, dtype=torch.float64),
        top_k=torch.zeros(1, dtype=torch.int64),
    )
