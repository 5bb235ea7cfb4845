"""How much memory the KV cache may have on a card: what is left when the largest step has been seen to run.

A step's activations, workspaces, the graphs and what the driver keeps for itself cannot be computed from shapes; so the
largest step runs once over a cache of a few blocks, the largest graph is captured, and the rest of the memory is read off
the card.
"""

from collections.abc import Callable
from dataclasses import replace

from xllm.config.decided import EngineConfig
from xllm.config.memory import blocks_of, fit_cache, gib
from xllm.core.errors import ConfigError
from xllm.core.plan import NewSequence, StepPlan
from xllm.core.sampling import SamplingParams
from xllm.device.table import Device
from xllm.executor.runner import Runner

# what makes the sampler copy all logits and look at them again
DEMANDING = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, logit_bias={0: 1.0}, logprobs=1)


def with_measured_cache(
    config: EngineConfig, device: Device, assemble: Callable[[EngineConfig], Runner]
) -> EngineConfig:
    """The configuration with its cache sized. `assemble` builds everything around the model for a trial.

    Raises ConfigError where nothing is left for a cache.
    """
    scheduler = config.scheduler
    tokens = min(-(-scheduler.max_num_batched_tokens // scheduler.max_num_seqs), scheduler.max_model_len)
    trial_blocks = blocks_of(tokens, config.cache.block_size)
    device.peak()
    trial = assemble(replace(config, cache=replace(config.cache, num_blocks=trial_blocks)))
    trial.run(largest_step(config, tokens, trial_blocks))
    trial.capture_largest()
    free, total = device.memory()
    trial.close()
    del trial
    taken = device.peak()
    # where memory comes and goes others may soon have the rest, so that what a step needs had better stay ours
    device.release(keep=taken if config.cache.pool == "elastic" else 0)
    # what the trial held is taken again by what is assembled next, but for its few blocks of cache
    free += (trial_blocks + 1) * config.cache.block_bytes
    kept = int((1 - config.memory.utilization) * total)
    if free <= kept:
        raise ConfigError(
            f"{gib(total - free)} of the {gib(total)} on the card are taken by the weights, a step of "
            f"{config.scheduler.max_num_batched_tokens} tokens and other programs, which leaves nothing for a KV cache "
            f"below --gpu-memory-utilization {config.memory.utilization}"
        )
    why = (
        f"{config.memory.utilization:.2f} of {gib(total)} minus {gib(total - free)} that are taken with a step of "
        f"{config.scheduler.max_num_batched_tokens} tokens and its graphs, as measured"
    )
    return fit_cache(config, free - kept, why)


def largest_step(config: EngineConfig, tokens: int, blocks: int) -> StepPlan:
    """Every slot a prompt of `tokens`, together the budget of a step, and every slot sampled. All write the same
    blocks: what they hold does not matter here."""
    count = min(config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens // tokens)
    new = [
        NewSequence(
            slot=slot, request_id="measure", token_ids=[0] * tokens, prompt_len=tokens,
            params=DEMANDING, seed=slot, stop_ids=(), blocks=list(range(blocks)),
        )
        for slot in range(count)
    ]  # fmt: skip
    slots = list(range(count))
    return StepPlan(
        step=-3, new=new, slots=slots, starts=[0] * count, counts=[tokens] * count, samples=[True] * count, appended=[],
    )  # fmt: skip
