import asyncio
import contextlib
import random
import signal

import psutil
import pytest

from tests import checkpoints
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError, InvalidRequest, Overloaded, Unavailable
from xllm.core.sampling import SamplingParams
from xllm.engine.async_llm import AsyncLLM

TEXT = "one two three four the cat and the hat"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@contextlib.asynccontextmanager
async def engine(model, *, in_process=True, **options):
    options = {"dtype": "float32", "block_size": 8, "threads": 1, **options}
    llm = await AsyncLLM.start(EngineOptions(model=str(model), **options), in_process=in_process)
    try:
        yield llm
    finally:
        await llm.shutdown()


async def collect(stream):
    return [output async for output in stream]


async def until(condition, timeout_s=20.0):
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - the engine's thread knows nothing of our events
            await asyncio.sleep(0.02)


async def idle(llm):
    stats = await llm.stats()
    return stats is not None and stats.running == stats.waiting == 0 and stats.kv_usage == 0.0


def greedy(**params):
    return SamplingParams(temperature=0.0, ignore_eos=True, **params)


@pytest.mark.parametrize("in_process", [True, False])
async def test_deltas_add_up_and_only_the_last_is_final(model, in_process):
    async with engine(model, in_process=in_process) as llm:
        outputs = await collect(llm.generate(TEXT, greedy(max_tokens=12)))
        assert [out.finished for out in outputs] == [False] * (len(outputs) - 1) + [True]
        ids = [t for out in outputs for c in out.outputs for t in c.token_ids]
        assert len(ids) == 12
        assert "".join(c.text for out in outputs for c in out.outputs) == llm.tokenizer.decode(ids)
        assert outputs[-1].outputs[-1].finish_reason == "length"
        assert llm.count() == 0


async def test_start_tells_what_was_decided(model):
    events: list[object] = []
    llm = await AsyncLLM.start(
        EngineOptions(model=str(model), threads=1), in_process=True, on_event=events.append
    )
    assert any("KV cache" in event for event in events if isinstance(event, str))
    assert set(llm.startup_s) >= {"weights", "memory", "warm-up"}
    await llm.shutdown()


async def test_what_is_wrong_is_refused_before_anything_runs(model):
    async with engine(model, max_model_len=32) as llm:
        for prompt, params in [
            ("", greedy()),
            ([], greedy()),
            ([9999], greedy()),
            ([1] * 32, greedy()),
            ([1] * 20, greedy(max_tokens=13)),
        ]:
            with pytest.raises(InvalidRequest):
                await collect(llm.generate(prompt, params))
        with pytest.raises(InvalidRequest, match="max-logprobs"):
            await collect(llm.generate([1], greedy(logprobs=21)))
        assert llm.count() == 0


async def test_beyond_the_queue_clients_are_told_to_come_back(model):
    async with engine(model, max_num_seqs=1, max_num_queued_reqs=1) as llm:
        running = [
            asyncio.create_task(collect(llm.generate([i + 1], greedy(max_tokens=30)))) for i in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await collect(llm.generate([5], greedy()))
        assert refused.value.retry_after_s >= 1
        await asyncio.gather(*running)
        await collect(llm.generate([5], greedy()))


async def test_a_draining_engine_takes_nothing_new_and_finishes_what_runs(model):
    async with engine(model) as llm:
        running = asyncio.create_task(collect(llm.generate([3, 4], greedy(max_tokens=40))))
        await asyncio.sleep(0)
        llm.stop_accepting()
        with pytest.raises(Unavailable):
            await collect(llm.generate([5], greedy()))
        assert await llm.drain(20.0)
        assert (await running)[-1].finished


async def test_abort_ends_a_stream_with_that_reason(model):
    async with engine(model) as llm:
        stream = llm.generate([3, 4], greedy(max_tokens=200), request_id="mine")
        first = await anext(stream)
        assert not first.finished
        await llm.abort("mine")
        rest = await collect(stream)
        assert rest[-1].finished
        assert rest[-1].outputs[-1].finish_reason == "abort"
        await until(lambda: idle(llm))


@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.slow)])
async def test_cancel_in_every_state_leaks_nothing(model, count):
    """RELIABILITY 2: tokenising, queued, mid-prefill, decoding, and at the very end."""
    rng = random.Random(11)
    async with engine(
        model,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        kv_cache_memory_bytes=600 * 512,
        max_num_queued_reqs=2000,
    ) as llm:
        core = llm._client._core

        async def one(i):
            length = rng.choice([2, 10, 60, 150])
            prompt = TEXT * 200 if i % 17 == 0 else [rng.randrange(3, 320) for _ in range(length)]
            task = asyncio.create_task(collect(llm.generate(prompt, greedy(max_tokens=rng.randrange(1, 40)))))
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.002, 0.02, 0.2]))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, InvalidRequest):
                await task

        for begin in range(0, count, 50):
            await asyncio.gather(*(one(i) for i in range(begin, min(begin + 50, count))))
        await until(lambda: idle(llm))
        await until(async_(lambda: not core.busy))
        core.scheduler.audit()
        assert llm.count() == 0
        assert llm._outputs.child_ids() == []
        assert (await collect(llm.generate(TEXT, greedy(max_tokens=3))))[-1].finished


def async_(condition):
    async def ask():
        return condition()

    return ask


async def test_a_killed_engine_ends_every_stream_with_an_error(model):
    async with engine(model, in_process=False) as llm:
        streams = [
            asyncio.create_task(collect(llm.generate([i + 1, 2], greedy(max_tokens=250)))) for i in range(4)
        ]
        await until(async_(lambda: llm._stats is not None and llm._stats.running == 4))
        llm._client._process.kill()
        for outputs in await asyncio.wait_for(asyncio.gather(*streams), 10):
            assert outputs[-1].finished
            assert outputs[-1].outputs[-1].finish_reason == "error"
        assert not llm.health().ok
        assert "SIGKILL" in llm.health().reason
        with pytest.raises(Unavailable):
            await collect(llm.generate([5], greedy()))


async def test_a_reset_prefix_cache_is_really_empty(model):
    async with engine(model) as llm:
        prompt = list(range(3, 60))
        for expected_hit in (0, 56, 0):
            if expected_hit == 0:
                assert await llm.reset_prefix_cache()
            last = (await collect(llm.generate(prompt, greedy(max_tokens=2))))[-1]
            assert last.num_cached_tokens == expected_hit


async def test_a_request_id_in_use_is_refused_and_its_owner_goes_on(model):
    """The second once took over the first one's stream, and ended it."""
    async with engine(model) as llm:
        first = llm.generate([3, 4], greedy(max_tokens=60), request_id="same")
        await anext(first)
        with pytest.raises(InvalidRequest, match="in use"):
            await collect(llm.generate([5], greedy(), request_id="same"))
        assert (await collect(first))[-1].outputs[-1].finish_reason == "length"
        assert llm.count() == 0
        assert (await collect(llm.generate([5], greedy(max_tokens=2), request_id="same")))[-1].finished


async def test_many_cache_resets_at_once_are_all_answered(model):
    """Two once got the same number, and one of them waited for ever."""
    async with engine(model) as llm:

        async def again():
            for _ in range(20):
                assert await llm.reset_prefix_cache()

        await asyncio.wait_for(asyncio.gather(*(again() for _ in range(5))), 20)


async def test_a_reset_of_a_lost_engine_does_not_wait(model):
    async with engine(model, in_process=False) as llm:
        llm._client._process.send_signal(signal.SIGSTOP)
        asked = asyncio.create_task(llm.reset_prefix_cache())
        await asyncio.sleep(0)
        llm._client._process.kill()
        with pytest.raises(Unavailable, match="gone"):
            await asyncio.wait_for(asked, 10)


async def test_a_tokenizer_that_cannot_be_read_leaves_no_engine_behind(model, tmp_path):
    options = EngineOptions(model=str(model), tokenizer=str(tmp_path), threads=1)
    others = set(psutil.Process().children())  # of other tests in this process
    with pytest.raises(ConfigError):
        await AsyncLLM.start(options)
    left = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert not set(left) - others
