"""Engines whose cache somebody follows over real sockets, with the subscriber of docs/kv-events.md."""

import contextlib
import json
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from tests import checkpoints
from tests.engine.scripted import ScriptedRunner, ends_of, make_core, run_until_idle, submit
from xllm import LLM, SamplingParams
from xllm.config.kv_events import read_kv_events
from xllm.config.options import EngineOptions
from xllm.core.errors import ConfigError, EngineFault
from xllm.core.output import Finish
from xllm.engine.build import decide
from xllm.engine.client import ProcessClient
from xllm.engine.kv_events import EventStream
from xllm.kv import hashing
from xllm.wire.kv_events import block_hash
from xllm.wire.messages import Abort, ResetPrefixCache

PAGE = (Path(__file__).parents[2] / "docs" / "kv-events.md").read_text(encoding="utf-8")
DOCUMENTED: dict[str, Any] = {}
for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
    exec(block, DOCUMENTED)
Cache: Any = DOCUMENTED["Cache"]
cached_tokens: Any = DOCUMENTED["cached_tokens"]

WAIT_MS = 20_000
BLOCK = 8


def asked(directory, **changes):
    return json.dumps(
        {
            "enable_kv_cache_events": True,
            "endpoint": f"ipc://{directory}/live",
            "replay_endpoint": f"ipc://{directory}/replay",
            "topic": "kv",
            **changes,
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def follower(tmp_path):
    """Makes subscribers of the engine whose endpoints are in `tmp_path`."""
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(zmq.Context())

        def follow():
            sockets = [stack.enter_context(context.socket(kind)) for kind in (zmq.SUB, zmq.DEALER)]
            for made, name in zip(sockets, ("live", "replay"), strict=True):
                made.linger = 0
                made.rcvtimeo = WAIT_MS
                made.connect(f"ipc://{tmp_path}/{name}")
            sockets[0].subscribe("kv")
            return Cache(*sockets)

        yield follow


@pytest.fixture
def stream(tmp_path):
    config = read_kv_events(asked(tmp_path))
    assert config is not None
    with contextlib.closing(EventStream(config, BLOCK)) as stream:
        yield stream


def held_by(core):
    index = core.scheduler.pool.index
    names = (index.name_of(block) for block in range(core.scheduler.pool.num_blocks))
    return {block_hash(name) for name in names if name is not None}


def catch_up_until(cache, condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, (len(cache.held), cache.next)
        cache.catch_up()


def test_a_subscriber_holds_what_the_pool_holds(stream, follower):
    core, front = make_core(events=stream, blocks=16)
    cache = follower()
    source = random.Random(0)
    for turn in range(30):
        for i in range(4):
            prompt = [source.randrange(3)] * source.randrange(1, 60)
            front.send(submit(f"{turn}.{i}", prompt, max_tokens=source.randrange(1, 30)))
        for _ in range(source.randrange(1, 30)):
            core.turn(wait_s=0.0)
        front.send(Abort(request_ids=[f"{turn}.{source.randrange(4)}"]))
        if turn % 10 == 9:
            front.send(ResetPrefixCache(call_id=turn))
    run_until_idle(core, front)
    stats = core.scheduler.stats()
    assert stats.evictions > 0
    assert stats.preemptions > 0
    catch_up_until(cache, lambda: cache.next == stream.stats.changes)
    assert cache.held == held_by(core) != set()
    assert core.last_stats is not None
    core.turn(wait_s=0.0)
    assert core.last_stats.kv_events.batches == cache.next
    assert core.last_stats.kv_events.dropped == 0
    core.executor.close()


def test_live_events_come_in_order_under_load_and_gaps_are_filled(stream, follower):
    core, front = make_core(events=stream, blocks=64)
    cache = follower()
    done = threading.Event()
    order: list[int] = []

    def follow():
        cache.live.rcvtimeo = 50
        while not (done.is_set() and cache.next == stream.stats.changes):
            with contextlib.suppress(zmq.Again):
                cache.follow()
            if done.is_set():
                cache.catch_up()
            order.append(cache.next)

    thread = threading.Thread(target=follow)
    thread.start()
    for i in range(200):
        front.send(submit(f"r{i}", [i % 7] * (i % 90 + 1), max_tokens=i % 11 + 1))
        core.turn(wait_s=0.0)
    run_until_idle(core, front)
    done.set()
    thread.join(WAIT_MS / 1000)
    assert not thread.is_alive()
    assert order == sorted(order)
    assert len(set(order)) > 10
    assert cache.held == held_by(core)
    core.executor.close()


def test_the_first_event_of_all_says_that_the_cache_is_empty(stream, follower):
    core, _ = make_core(events=stream)
    core.turn(wait_s=0.0)
    cache = follower()
    cache.held.add(1)
    cache.next = cache.epoch = 0
    catch_up_until(cache, lambda: cache.next == 1)
    assert cache.held == set()
    core.executor.close()


def test_a_failed_step_clears_the_copy(stream, follower):
    def explode(plan):
        if plan.step == 5:
            raise RuntimeError("bit rot")

    core, front = make_core(ScriptedRunner(explode), events=stream)
    front.send(submit("r", [1] * 40, max_tokens=40))
    outputs = run_until_idle(core, front)
    assert ends_of(outputs) == {"r": [Finish.ERROR]}
    cache = follower()
    catch_up_until(cache, lambda: cache.next == stream.stats.changes)
    assert cache.held == set() == held_by(core)
    core.executor.close()


def test_a_restart_is_noticed_even_where_the_numbers_fit(tmp_path, follower):
    config = read_kv_events(asked(tmp_path))
    assert config is not None
    first = EventStream(config, BLOCK)
    core, front = make_core(events=first)
    front.send(submit("r", [1] * 40, max_tokens=20))
    run_until_idle(core, front)
    cache = follower()
    catch_up_until(cache, lambda: cache.next == first.stats.changes)
    old = set(cache.held)
    core.close()
    with contextlib.closing(EventStream(config, BLOCK)) as second:
        core, front = make_core(events=second)
        front.send(submit("r", [2] * 40, max_tokens=20))
        run_until_idle(core, front)
        before = cache.next
        assert second.stats.changes == before  # the next number is the one that was expected all along
        front.send(submit("s", [3] * 40, max_tokens=1))
        run_until_idle(core, front)

        def renewed():
            front.send(submit(f"t{time.monotonic_ns()}", [100 + time.monotonic_ns() % 97] * 40, max_tokens=1))
            run_until_idle(core, front)
            if cache.live.poll(10):
                cache.follow()
            return cache.epoch == second.epoch

        deadline = time.monotonic() + 20
        while not renewed():
            assert time.monotonic() < deadline
        catch_up_until(cache, lambda: cache.next == second.stats.changes)
        assert cache.held == held_by(core)
        assert not cache.held & old
        core.executor.close()


def test_salts_are_told_with_the_first_block_alone(stream, follower):
    core, front = make_core(events=stream)
    message = msgspec.structs.replace(submit("r", [1] * 20, max_tokens=1), cache_salt="tenant \ud800")
    front.send(message)
    run_until_idle(core, front)
    cache = follower()
    heard = []
    cache.apply = lambda number, events: heard.extend(events)
    cache.next = 0
    catch_up_until(cache, lambda: len(heard) >= 2)
    stored = heard[1]
    assert stored["extra_keys"] == [["tenant ?"], None]
    assert stored["parent_block_hash"] is None
    assert cached_tokens(set(stored["block_hashes"]), [1] * 20, BLOCK, "tenant \ud800") == 16
    assert cached_tokens(set(stored["block_hashes"]), [1] * 20, BLOCK) == 0
    core.executor.close()


# whole engines


def options(model, tmp_path, **changes):
    return {"model": str(model), "threads": 1, "kv_events_config": asked(tmp_path), **changes}


@pytest.mark.parametrize("separate", [False, True])
def test_a_copy_predicts_the_cached_tokens_of_the_next_request(model, tmp_path, follower, separate):
    source = random.Random(1)
    with LLM(**options(model, tmp_path), separate_process=separate) as llm:
        size = llm.config.cache.block_size
        cache = follower()
        prompts: list[list[int]] = []
        for _ in range(12):
            begin = source.choice(prompts)[: source.randrange(100)] if prompts else []
            prompts.append(begin + [source.randrange(50) for _ in range(source.randrange(1, 60))])
            predicted = cached_tokens(cache.held, prompts[-1], size)
            (output,) = llm.generate(
                {"prompt_token_ids": prompts[-1]},
                SamplingParams(max_tokens=20, ignore_eos=True),
                use_tqdm=False,
            )
            assert output.num_cached_tokens == predicted
            whole = hashing.chain(hashing.root(), prompts[-1], size)
            catch_up_until(cache, lambda whole=whole: {block_hash(name) for name in whole} <= cache.held)
        assert max(len(prompt) for prompt in prompts) > 2 * size
        llm.reset_prefix_cache()
        catch_up_until(cache, lambda: not cache.held)


def test_nobody_is_told_without_the_flag(model):
    with LLM(str(model), threads=1) as llm:
        llm.generate("the cat", SamplingParams(max_tokens=40), use_tqdm=False)
        core: Any = llm._client._core  # type: ignore[attr-defined]
        assert core._events is None
        assert core.scheduler.pool.events is None
        assert "xllm-kv-events" not in {thread.name for thread in threading.enumerate()}


def test_a_subscriber_that_never_reads_holds_nobody_up(model, tmp_path, follower):
    small = asked(tmp_path, hwm=1, buffer_steps=5, max_queue_size=50)
    with LLM(**options(model, tmp_path, kv_events_config=small)) as llm:
        cache = follower()
        cache.live.rcvhwm = 1
        for i in range(5):
            outputs = llm.generate(
                [{"prompt_token_ids": [i, j] * 20} for j in range(8)],
                SamplingParams(max_tokens=20, ignore_eos=True),
                use_tqdm=False,
            )
            assert all(output.outputs[0].finish_reason == "length" for output in outputs)
        late = follower()
        catch_up_until(late, lambda: late.next > 5)
        assert late.held  # what the last batches told; those before are lost, and it knows


def test_an_endpoint_in_use_stops_the_start_with_a_sentence(model, tmp_path):
    config = decide(EngineOptions(**options(model, tmp_path)))
    assert config.kv_events is not None
    with contextlib.closing(EventStream(config.kv_events, BLOCK)):
        with pytest.raises(ConfigError, match="in use by another process"):
            LLM(**options(model, tmp_path))
        with pytest.raises(EngineFault, match="in use by another process"):
            ProcessClient(config)


def test_a_start_that_fails_later_gives_the_endpoint_back(model, tmp_path):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(Exception, match="safetensors"):
        LLM(**options(tmp_path, tmp_path), skip_tokenizer_init=True)
    with LLM(**options(model, tmp_path)):
        pass


def test_a_killed_engine_and_its_successor(model, tmp_path, follower):
    config = decide(EngineOptions(**options(model, tmp_path)))
    first = ProcessClient(config)
    cache = follower()
    catch_up_until(cache, lambda: cache.next == 1)
    epoch = cache.epoch
    cache.held.add(1)
    psutil.Process(first.pid).kill()
    first.close()
    with contextlib.closing(ProcessClient(config)) as second:
        second.send(ResetPrefixCache(call_id=1))
        cache.next = 0
        catch_up_until(cache, lambda: cache.epoch > epoch)
        assert cache.held == set()


def test_a_program_that_forgets_to_close_ends_anyway(model, tmp_path):
    code = """
        import json, sys
        from xllm import LLM, SamplingParams
        llm = LLM(**json.loads(sys.argv[1]))
        llm.generate("the cat", SamplingParams(max_tokens=4), use_tqdm=False)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps(options(model, tmp_path))],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
