"""The cache of a card is what a trial of the largest step leaves; the card is the reference device with a meter."""

from dataclasses import replace

import pytest
import torch

from tests import checkpoints
from xllm.config.facts import CPU_PREFERENCES
from xllm.config.options import EngineOptions
from xllm.config.resolve import resolve
from xllm.core.errors import ConfigError
from xllm.device.facts import reference_facts
from xllm.device.reference import ReferenceDevice
from xllm.engine.build import model_facts
from xllm.executor.build import assemble
from xllm.executor.measure import largest_step, with_measured_cache
from xllm.models.checkpoint import read_model_config
from xllm.models.loader import load_model
from xllm.ops.table import load_ops

MIB = 1 << 20


class Meter(ReferenceDevice):
    """Says what a card would after the trial, and counts what happened."""

    def __init__(self, free: int, total: int):
        super().__init__()
        self.says = (free, total)
        self.released = 0

    def memory(self):
        return self.says

    def peak(self):
        return 3 * MIB

    def release(self, keep=0):
        self.released += 1
        self.kept = keep


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


def decided(directory, **options):
    model = read_model_config(directory, None, "auto")
    suits = replace(CPU_PREFERENCES, graphs=True, measured=True, max_num_seqs=6)
    facts = replace(reference_facts(), preferences=suits)
    return resolve(EngineOptions(dtype="float32", **options), model, model_facts(model), facts)


def measured(config, device):
    ops = load_ops("reference", torch.float32)
    model = load_model(config.model, dtype=torch.float32, device="cpu", ops=ops)
    trials = []

    def build(trial):
        trials.append(trial)
        return assemble(trial, model, device, ops)

    sized = with_measured_cache(config, device, build)
    assert model.on_layer is None, "the trial holds on to nothing"
    return sized, trials


def test_the_cache_gets_what_is_left_below_the_limit(directory):
    config = decided(directory, max_num_seqs=6, max_num_batched_tokens=96, gpu_memory_utilization=0.75)
    device = Meter(free=11 * MIB, total=40 * MIB)
    sized, (trial,) = measured(config, device)
    budget = 11 * MIB + (trial.cache.num_blocks + 1) * config.cache.block_bytes - 10 * MIB
    useful = 6 * -(-config.scheduler.max_model_len // config.cache.block_size)
    assert sized.cache.num_blocks == min(useful, budget // config.cache.block_bytes)
    assert (device.released, device.kept) == (1, 0)
    assert "as measured" in sized.reasons[-1]


def test_what_a_step_needs_stays_where_others_may_take_the_rest(directory):
    config = decided(directory, max_num_seqs=6, max_num_batched_tokens=96, kv_pool="elastic")
    device = Meter(free=11 * MIB, total=40 * MIB)
    measured(config, device)
    assert (device.released, device.kept) == (1, 3 * MIB)


def test_a_card_that_is_full_is_told_so(directory):
    with pytest.raises(
        ConfigError, match=r"leaves nothing for a KV cache below --gpu-memory-utilization 0\.5"
    ):
        measured(decided(directory, gpu_memory_utilization=0.5), Meter(free=10 * MIB, total=40 * MIB))


def test_a_prompt_of_the_models_whole_length_fits_the_trial(directory):
    """The trial gave each sequence one block more than a block table has columns."""
    config = decided(directory, max_num_seqs=1, max_model_len=64, max_num_batched_tokens=64)
    sized, (trial,) = measured(config, Meter(free=30 * MIB, total=40 * MIB))
    assert trial.cache.num_blocks == 64 // config.cache.block_size
    assert sized.cache.num_blocks > 0


@pytest.mark.parametrize(("seqs", "budget"), [(6, 96), (1, 96), (8, 8), (5, 96), (3, 512)])
def test_the_largest_step_uses_the_budget_and_every_slot(directory, seqs, budget):
    config = decided(directory, max_num_seqs=seqs, max_num_batched_tokens=budget)
    tokens = -(-budget // seqs)
    plan = largest_step(config, tokens, 9)
    assert budget - tokens < plan.num_tokens <= budget
    assert len(plan.new) == len(plan.slots) <= seqs
    assert all(plan.samples)
