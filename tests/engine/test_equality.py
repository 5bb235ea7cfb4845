"""Greedy tokens do not depend on how they were computed.

Every combination of chunk size, prefix cache, depth, company, preemption, process and backend gives, token for token,
what `transformers` gives for the same float32 weights. The default run covers every pair of values, `-m slow` the
product on the CPU, `-m gpu` every pair on a card with graphs and without, `-m "gpu and slow"` the product there.
"""

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest

from tests import checkpoints
from xllm.core.sampling import SamplingParams
from xllm.engine.llm import LLM

BLOCK = 8
OUTPUT = 24
LONGEST = 112  # tokens of a sequence
FACTORS: dict[str, tuple[Any, ...]] = {
    "chunk": (1, 7, 64, "whole"),
    "cache": (True, False),
    "depth": (1, 2, 3),
    "company": ("alone", "batch"),
    "preemption": (False, True),
    "process": ("inline", "separate"),
    "pool": ("paged", "elastic", "contiguous"),
}
GRANULE = {"cpu": 4096, "reference": 4096, "cuda": 2 << 20}  # bytes that memory is mapped in
# device, and whether decode steps are graphs there; "reference" behaves as a card does, in plain PyTorch
BACKENDS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "graphs": {"device": "reference"},
    "eager": {"device": "reference", "enforce_eager": True},
    "cuda-graphs": {"device": "cuda"},
    "cuda-eager": {"device": "cuda", "enforce_eager": True},
}


@dataclass(frozen=True)
class Combination:
    chunk: int | str
    cache: bool
    depth: int
    company: str
    preemption: bool
    process: str
    pool: str
    backend: str = "cpu"

    def __str__(self) -> str:
        cache = "cache" if self.cache else "nocache"
        pressure = "pressed" if self.preemption else "roomy"
        return f"{self.chunk}-{cache}-depth{self.depth}-{self.company}-{pressure}-{self.process}-{self.pool}-{self.backend}"


def every_combination(*backends: str) -> list[Combination]:
    return [
        c for values in itertools.product(*FACTORS.values(), backends) if possible(c := Combination(*values))
    ]


def possible(c: Combination) -> bool:
    """An elastic pool on a card comes in pieces that hold more than a pool under pressure does here."""
    return not (c.backend.startswith("cuda") and c.pool == "elastic" and c.preemption)


def every_pair(*backends: str) -> list[Combination]:
    """A small set in which every two values of two factors meet, chosen greedily. Inline ones are preferred: a process
    takes seconds to start."""
    factors = {**FACTORS, "backend": backends}
    todo = set()
    for (a, a_values), (b, b_values) in itertools.combinations(factors.items(), 2):
        todo |= {((a, x), (b, y)) for x in a_values for y in b_values}
    chosen = []
    candidates = sorted(every_combination(*backends), key=lambda c: c.process)
    todo &= set().union(*map(pairs_of, candidates))
    while todo:
        best = max(candidates, key=lambda c: len(todo & pairs_of(c)))
        chosen.append(best)
        todo -= pairs_of(best)
    return chosen


def pairs_of(c: Combination) -> set:
    return set(itertools.combinations([(name, getattr(c, name)) for name in (*FACTORS, "backend")], 2))


PAIRS = every_pair("cpu", "graphs", "eager")
REST = [
    c for c in every_combination("cpu") if c not in PAIRS and (c.pool == "paged" or c.process == "inline")
]
CARD_PAIRS = every_pair("cuda-graphs", "cuda-eager")
CARD_REST = [
    c
    for c in every_combination("cuda-graphs", "cuda-eager")
    if c not in CARD_PAIRS and (c.pool == "paged" or c.process == "inline")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def prompts():
    """16 prompts of 3 to 70 tokens; every second one begins with a prefix others have too."""
    rng = random.Random(3)
    shared = [rng.randrange(3, checkpoints.VOCAB) for _ in range(4 * BLOCK + 3)]
    own = [[rng.randrange(3, checkpoints.VOCAB) for _ in range(3 + i * 2)] for i in range(16)]
    return [shared[: 8 * (i % 5) + 3] + tail if i % 2 else tail for i, tail in enumerate(own)]


@pytest.fixture(scope="module")
def truth(model, prompts):
    return checkpoints.greedy(model, prompts, OUTPUT)


def open_engine(model, c: Combination) -> LLM:
    roomy, pressed = 4096, LONGEST if c.company == "alone" else 2 * LONGEST
    tokens = pressed if c.preemption else roomy
    each = BLOCK * 2 * 2 * 2 * 16 * 4
    if c.pool == "contiguous":
        each = max(each, GRANULE[BACKENDS[c.backend]["device"]])
    return LLM(
        str(model), separate_process=c.process == "separate", dtype="float32", max_model_len=LONGEST, block_size=BLOCK, max_num_seqs=16,
        kv_cache_memory_bytes=tokens // BLOCK * each, kv_pool=c.pool, enable_prefix_caching=c.cache, async_scheduling=c.depth,
        enable_chunked_prefill=c.chunk != "whole", long_prefill_token_threshold=0 if c.chunk == "whole" else int(c.chunk),
        scheduling_policy="priority", threads=1, **BACKENDS[c.backend],
    )  # fmt: skip


def check(model, prompts, truth, c: Combination) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    preemptions = 0
    with open_engine(model, c) as llm:
        if c.company == "batch":
            requests = [{"prompt_token_ids": ids} for ids in prompts]
            outputs = llm.generate(requests, params, use_tqdm=False)
            preemptions = sum(out.metrics.num_preemptions for out in outputs)
            got = [out.outputs[0].token_ids for out in outputs]
        else:
            got = []
            for ids in prompts[-4:]:
                observed, pushed = generate_alone(llm, ids, params, rival=c.preemption)
                got.append(observed)
                preemptions += pushed
            truth = truth[-4:]
        if c.process == "inline":
            executor = llm.stats().executor
            assert (executor.graph_steps > 0) == c.backend.endswith("graphs")
            assert executor.graph_failures == 0
    assert got == truth
    if c.pool != "elastic":  # which waits for memory first
        assert (preemptions > 0) == c.preemption


def generate_alone(llm: LLM, ids: list[int], params: SamplingParams, *, rival: bool) -> tuple[list[int], int]:
    """One request with the engine to itself, or (to press it) beside a more important one that needs most of the pool."""
    requests, sampling, priority = [{"prompt_token_ids": ids}], [params], [1]
    if rival:
        requests.append({"prompt_token_ids": list(range(5, 65))})
        sampling.append(SamplingParams(temperature=0.0, max_tokens=LONGEST - 60, ignore_eos=True))
        priority.append(0)
    observed = llm.generate(requests, sampling, use_tqdm=False, priority=priority)[0]
    return observed.outputs[0].token_ids, observed.metrics.num_preemptions


@pytest.mark.parametrize("combination", PAIRS, ids=str)
def test_every_pair_of_settings_gives_the_same_tokens(model, prompts, truth, combination):
    check(model, prompts, truth, combination)


@pytest.mark.slow
@pytest.mark.parametrize("combination", REST, ids=str)
def test_the_whole_product_of_settings_gives_the_same_tokens(model, prompts, truth, combination):
    check(model, prompts, truth, combination)


@pytest.mark.gpu
@pytest.mark.parametrize("combination", CARD_PAIRS, ids=str)
def test_every_pair_of_settings_gives_the_same_tokens_on_a_card(model, prompts, truth, combination):
    check(model, prompts, truth, combination)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("combination", CARD_REST, ids=str)
def test_the_whole_product_of_settings_gives_the_same_tokens_on_a_card(model, prompts, truth, combination):
    check(model, prompts, truth, combination)


def test_the_pairs_are_all_there():
    backends = ("cpu", "graphs", "eager")
    sizes = [*map(len, FACTORS.values()), len(backends)]
    wanted = sum(a * b for a, b in itertools.combinations(sizes, 2))
    assert len(set().union(*(pairs_of(c) for c in PAIRS))) == wanted
