"""The sampler on a device that runs on its own: uploads, downloads, graphs, and nothing that waits for it."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.executor.test_sampler import LENGTH, MIX, VOCAB
from xllm.core.plan import NewSequence
from xllm.core.sampling import SamplingParams
from xllm.device.reference import ReferenceDevice
from xllm.device.table import Device, open_device
from xllm.executor.sampling import Sampler
from xllm.ops.table import load_ops

PLAIN: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"top_p": 0.8, "min_p": 0.02},
    {"min_tokens": 0},
]
SPECIAL: list[dict[str, Any]] = [
    {"logprobs": 0},
    {"logit_bias": {3: 1.0}},
    {"allowed_token_ids": [1, 2]},
    {"bad_words_token_ids": [[4]]},
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.1},
    {"frequency_penalty": 0.1},
]


class Rig:
    """A sampler on the reference device, with its token buffer."""

    def __init__(self, device: Device | None = None, max_num_seqs: int = 16):
        self.device = device or open_device("reference")
        self.tokens = torch.zeros(max_num_seqs, LENGTH, dtype=torch.int64)
        self.sampler = Sampler(
            max_num_seqs=max_num_seqs, vocab_size=VOCAB, tokens=self.tokens, device=self.device,
            ops=load_ops("reference" if self.device.asynchronous else "cpu", torch.float32),
        )  # fmt: skip

    def admit(
        self, slot: int, ids: Sequence[int] = (1, 2), stop_ids: Sequence[int] = (9,), **params: Any
    ) -> None:
        self.tokens[slot, : len(ids)] = torch.tensor(ids)
        self.sampler.admit(sequence(slot, ids, stop_ids, params))


def sequence(slot: int, ids: Sequence[int], stop_ids: Sequence[int], params: dict[str, Any]) -> NewSequence:
    return NewSequence(
        slot=slot, request_id=str(slot), token_ids=list(ids), prompt_len=len(ids), seed=slot * 31,
        params=SamplingParams(max_tokens=None, **params), stop_ids=list(stop_ids), blocks=(),
    )  # fmt: skip


def logits_of(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_a_device_that_chooses_for_all_rows_gives_the_tokens_of_the_cpu() -> None:
    """Weights are rounded on the one and not on the other, which only shows at one border in 100,000."""
    order = random.Random(1)
    cpu, device = Rig(open_device("cpu")), Rig()
    for slot, params in enumerate(MIX):
        cpu.admit(slot, [slot, 3, 1], **params)
        device.admit(slot, [slot, 3, 1], **params)
    for position in range(3, 23):
        slots = order.sample(range(len(MIX)), len(MIX) - 2)
        logits = logits_of(len(slots), position)
        expected = cpu.sampler.sample(logits, slots, [position] * len(slots))
        fetched = device.sampler.sample(logits, slots, [position] * len(slots)).fetch(device.device)
        device.device.mark().wait()
        assert fetched.tokens() == expected.token_ids.tolist()
        assert fetched.logprobs() == expected.host_logprobs()
        assert fetched.errors() == {}
        for rig in (cpu, device):
            rig.tokens[slots, position] = expected.token_ids


def test_results_are_there_when_a_mark_was_waited_for() -> None:
    rig = Rig()
    rig.admit(0, temperature=0.0, logprobs=1)
    rig.admit(1, temperature=0.0)
    logits = torch.zeros(2, VOCAB)
    logits[0, 7], logits[1, 3] = 1.0, torch.nan
    fetched = rig.sampler.sample(logits, [0, 1], [2, 2]).fetch(rig.device)
    assert fetched.tokens() != [7, 0]
    rig.device.mark().wait()
    assert fetched.tokens() == [7, 0]
    assert set(fetched.errors()) == {1}
    assert fetched.logprobs()[0].token_ids == [7, 7]


def test_a_graph_sees_sequences_that_were_admitted_later() -> None:
    rig = Rig()
    logits, slots, positions = torch.zeros(2, VOCAB), torch.tensor([0, 3]), torch.tensor([2, 2])
    rig.admit(0, temperature=0.0)
    rig.admit(3, temperature=0.0)
    rig.sampler.upload()
    graph = rig.device.capture(lambda: rig.sampler.sample_plain(logits, slots, positions, rig.tokens))
    logits.copy_(logits_of(2, 5))
    rig.admit(3, temperature=1.0, top_k=40)
    expected = rig.sampler.sample(logits, [0, 3], [2, 2]).token_ids
    rig.sampler.upload()
    graph.replay()
    assert torch.equal(graph.outputs[0], expected)
    assert int(expected[1]) != int(logits[1].argmax())
    assert torch.equal(rig.tokens[slots, 2], expected)


def test_prompt_logprobs_wait_for_the_device() -> None:
    logits, targets = logits_of(4, 1), torch.tensor([5, 0, 999, 5])
    entries = [
        Rig(open_device(name)).sampler.prompt_logprobs(logits, targets, 2) for name in ("cpu", "reference")
    ]
    assert entries[0] == entries[1]


# ---- which rows are plain


@pytest.mark.parametrize("params", PLAIN)
def test_rows_of_numbers_alone_are_plain(params: dict[str, Any]) -> None:
    rig = Rig()
    rig.admit(2, **params)
    assert rig.sampler.is_plain([2], [2])
    cpu = Rig(open_device("cpu"))
    cpu.admit(2, **params)
    assert not cpu.sampler.is_plain([2], [2])  # it has another way


@pytest.mark.parametrize("params", SPECIAL)
def test_one_row_that_needs_more_is_enough(params: dict[str, Any]) -> None:
    rig = Rig()
    for slot in range(4):
        rig.admit(slot, **(params if slot == 2 else {}))
    assert not rig.sampler.is_plain([0, 1, 2, 3], [2] * 4)
    assert rig.sampler.is_plain([0, 1, 3], [2] * 3)
    rig.admit(2)
    assert rig.sampler.is_plain([0, 1, 2, 3], [2] * 4)


def test_a_row_becomes_plain_when_it_may_end() -> None:
    rig = Rig()
    rig.admit(0, min_tokens=3)
    rig.admit(1, min_tokens=50, stop_ids=())  # it has nothing to bar
    found = [rig.sampler.is_plain([0, 1], [position, 2]) for position in range(2, 8)]
    assert found == [False, False, False, True, True, True]
    rig.admit(0, min_tokens=1)
    assert not rig.sampler.is_plain([0, 1], [2, 2])


def test_what_does_not_exist_makes_no_row_special() -> None:
    rig = Rig()
    rig.admit(0, logit_bias={VOCAB: 1.0}, bad_words_token_ids=[[VOCAB + 1]], stop_ids=(VOCAB,), min_tokens=9)
    assert rig.sampler.is_plain([0], [2])


# ---- nothing waits


class NoWaiting(TorchDispatchMode):
    """Fails where PyTorch would wait for a card: numbers read by the host, sizes that depend on data, tensors made of
    the host's numbers other than by the device's uploads."""

    uploading = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert name not in (
            "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
            "aten::unique_dim", "aten::repeat_interleave.Tensor", "aten::is_nonzero",
        ), name  # fmt: skip
        assert self.uploading or name != "aten::lift_fresh", "not an upload"
        if name.startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), name
        return func(*args, **(kwargs or {}))


class Uploads(ReferenceDevice):
    def upload(self, array: np.ndarray) -> torch.Tensor:
        NoWaiting.uploading = True
        tensor = super().upload(array)
        NoWaiting.uploading = False
        return tensor

    def upload_into(self, target: torch.Tensor, array: np.ndarray) -> None:
        target.copy_(self.upload(array))


def test_no_request_waits_for_the_device() -> None:
    """Of the sampler itself: the operator is a stand-in, as the reference reads numbers on the host."""
    rig = Rig(Uploads())

    def choose(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.argmax(-1), logits.amax(-1).isfinite()

    rig.sampler._choose_all = choose
    logits = logits_of(len(MIX), 1).bfloat16()
    kept = logits.clone()
    with NoWaiting():
        for slot, params in enumerate(MIX):
            rig.sampler.admit(sequence(slot, (1, 2, 3), (9,), params))
        for position in (3, 4):
            slots = list(range(len(MIX)))
            rig.sampler.sample(logits, slots, [position] * len(slots)).fetch(rig.device)
            rig.sampler.fetch_prompt_logprobs(logits[:3], torch.zeros(3, dtype=torch.int64), 2)
    assert torch.equal(logits, kept)
