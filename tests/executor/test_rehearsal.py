"""A rehearsal goes through the steps of a model it has no weights of; here its operators run for real, over zeros."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tests import checkpoints
from tests.executor.test_measure import decided
from xllm.device.table import open_device
from xllm.executor.rehearsal import CHUNKS, DECODES, rehearsed
from xllm.ops.table import load_ops


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


class Stage:
    """Operators that count who was called with how many rows, and a context that remembers its threads."""

    def __init__(self):
        self.called: Counter[tuple[str, int]] = Counter()
        self.threads: list[int] = []
        ops = load_ops("reference", torch.float32)
        counted = {
            name: self._counting(name, getattr(ops, name))
            for name in ("linear", "rope_and_cache", "attention", "silu_and_mul", "decode_inputs", "sample")
        }
        self.ops = replace(ops, compiling=self.compiling, **counted)

    def _counting(self, name, operator):
        def call(first, *rest):
            self.called[name, len(first)] += 1
            return operator(first, *rest)

        return call

    @contextmanager
    def compiling(self, threads):
        self.threads.append(threads)
        yield


def test_every_operator_meets_every_size(directory, caplog):
    stage = Stage()
    config = decided(
        directory, max_num_seqs=8, max_num_batched_tokens=64, threads=3, kv_cache_memory_bytes=1 << 20
    )
    with rehearsed(config, open_device("reference"), stage.ops):
        pass
    assert not caplog.records
    assert stage.threads == [3]
    met = {size for name, size in stage.called if name == "attention"}
    assert met == {size for size in DECODES if size <= 8} | {
        min(tokens, config.scheduler.max_model_len) + 1 for tokens in CHUNKS
    }
    for size in DECODES[:2]:
        assert {name for name, rows in stage.called if rows == size} >= {"linear", "decode_inputs"}
    assert stage.called["sample", 1] == 2


def test_a_failed_rehearsal_is_told_and_nothing_more(directory, caplog):
    def broken(*_):
        raise RuntimeError("no compiler")

    ops = replace(Stage().ops, attention=broken)
    with rehearsed(decided(directory, kv_cache_memory_bytes=1 << 20), open_device("reference"), ops):
        pass
    assert "could not be compiled ahead, the first steps will be slower: no compiler" in caplog.text


def test_devices_that_compile_nothing_rehearse_nothing(directory):
    ops = load_ops("reference", torch.float32)
    assert ops.compiling is None
    with rehearsed(decided(directory, kv_cache_memory_bytes=1 << 20), open_device("reference"), ops):
        pass
