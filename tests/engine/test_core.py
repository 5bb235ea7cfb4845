import threading

import pytest

from tests.engine.scripted import (
    EOS,
    ScriptedRunner,
    drain,
    ends_of,
    expected,
    make_core,
    next_token,
    run_until_idle,
    submit,
)
from xllm.core.errors import DeviceLost
from xllm.core.output import Finish
from xllm.wire.messages import Abort, Reply, ResetPrefixCache, Shutdown, SubmitMany


def tokens_of(outputs, id):
    return [t for out in outputs if out.request_id == id for t in out.token_ids]


@pytest.fixture(params=[1, 2, 3], ids=lambda d: f"depth{d}")
def depth(request):
    return request.param


def test_many_requests_end_once_each_with_their_own_tokens(depth):
    core, front = make_core(depth=depth)
    prompts = {f"r{i}": [i + 1] * (3 * i + 1) for i in range(12)}
    for id, prompt in prompts.items():
        front.send(submit(id, prompt, max_tokens=10 + len(prompt) % 5))
    outputs = run_until_idle(core, front)
    for id, prompt in prompts.items():
        assert tokens_of(outputs, id) == expected(prompt, 10 + len(prompt) % 5)
    assert ends_of(outputs) == {id: [Finish.LENGTH] for id in prompts}
    core.scheduler.audit()
    core.executor.close()


def test_a_request_joins_while_others_run(depth):
    core, front = make_core(depth=depth)
    front.send(submit("first", [1, 2, 3], max_tokens=40))
    for _ in range(5):
        core.turn(wait_s=0.0)
    front.send(submit("second", [4, 5], max_tokens=5))
    outputs = run_until_idle(core, front)
    order = [out.request_id for out in outputs if out.finish]
    assert order == ["second", "first"]
    core.executor.close()


def test_what_ran_past_the_end_is_dropped(depth):
    prompt = [5, 6, 7]
    stop = expected(prompt, 4)[3]
    core, front = make_core(depth=depth)
    front.send(submit("r", prompt, max_tokens=50, stop_token_ids=[stop]))
    outputs = run_until_idle(core, front)
    assert tokens_of(outputs, "r") == expected(prompt, 4)
    assert outputs[-1].finish is Finish.STOP
    assert outputs[-1].stop_reason == stop
    core.scheduler.audit()
    core.executor.close()


def test_the_models_own_end_has_no_stop_reason():
    token, position = next(
        (t, p)
        for t in range(1, 997)
        for p in range(1, 60)
        if next_token(t, p) == EOS and all(x != EOS for x in expected([t], p - 1))
    )
    prompt = [1] * (position - 1) + [token]
    core, front = make_core()
    front.send(submit("r", prompt, max_tokens=50, ignore_eos=False))
    (terminal,) = [out for out in run_until_idle(core, front) if out.finish]
    assert terminal.finish is Finish.STOP
    assert terminal.stop_reason is None
    core.executor.close()


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 8])
def test_an_abort_ends_a_request_in_every_state(depth, turns):
    core, front = make_core(depth=depth)
    front.send(submit("r", [1] * 70, max_tokens=30))
    front.send(submit("other", [2] * 20, max_tokens=6))
    for _ in range(turns):
        core.turn(wait_s=0.0)
    front.send(Abort(request_ids=["r", "nobody"]))
    front.send(Abort(request_ids=["r"]))
    outputs = run_until_idle(core, front)
    assert ends_of(outputs) == {"r": [Finish.ABORT], "other": [Finish.LENGTH]}
    assert tokens_of(outputs, "other") == expected([2] * 20, 6)
    core.scheduler.audit()
    assert core.last_stats is not None
    assert core.last_stats.running == core.last_stats.waiting == 0
    assert core.last_stats.kv_usage == 0.0
    core.executor.close()


def test_a_step_that_raises_ends_its_requests_and_the_engine_lives(depth):
    def explode(plan):
        if plan.step == 3:
            raise RuntimeError("bit rot")

    core, front = make_core(ScriptedRunner(explode), depth=depth)
    front.send(submit("a", [1] * 9, max_tokens=20))
    front.send(submit("b", [2] * 9, max_tokens=20))
    outputs = run_until_idle(core, front)
    assert ends_of(outputs) == {"a": [Finish.ERROR], "b": [Finish.ERROR]}
    assert all("RuntimeError" in out.error and "bit rot" not in out.error for out in outputs if out.error)
    core.scheduler.audit()
    front.send(submit("c", [1] * 9, max_tokens=20))
    assert tokens_of(run_until_idle(core, front), "c") == expected([1] * 9, 20)
    core.executor.close()


def test_a_lost_device_ends_the_engine(depth):
    def fail(plan):
        raise DeviceLost("the device failed: unspecified launch failure")

    core, front = make_core(ScriptedRunner(fail), depth=depth)
    front.send(submit("a", [1] * 9, max_tokens=20))
    with pytest.raises(DeviceLost):
        run_until_idle(core, front)
    core.executor.close()


def test_requests_that_arrive_at_once_start_in_one_step():
    core, front = make_core()
    front.send(SubmitMany(requests=[submit(id, [1, 2], max_tokens=5) for id in ("a", "b", "b")]))
    core.turn(wait_s=0.0)
    assert core.last_stats is not None
    assert (core.last_stats.running, core.last_stats.waiting, core.last_stats.step_tokens) == (2, 0, 4)
    outputs = run_until_idle(core, front)
    assert ends_of(outputs) == {"a": [Finish.LENGTH], "b": [Finish.ERROR, Finish.LENGTH]}
    core.executor.close()


def test_a_request_the_scheduler_refuses_gets_its_one_terminal_output():
    core, front = make_core()
    front.send(submit("r", [1, 2], max_tokens=5))
    front.send(submit("r", [1, 2], max_tokens=5))
    outputs = run_until_idle(core, front)
    assert [out.finish for out in outputs if out.error] == [Finish.ERROR]
    core.executor.close()


def test_a_cache_reset_is_answered():
    core, front = make_core()
    front.send(ResetPrefixCache(call_id=7))
    core.turn(wait_s=0.0)
    assert drain(front)[1] == [Reply(call_id=7, value=True)]
    core.executor.close()


def test_shutdown_ends_the_loop():
    core, front = make_core()
    thread = threading.Thread(target=core.run)
    thread.start()
    front.send(Shutdown())
    thread.join(timeout=10)
    assert not thread.is_alive()
    core.executor.close()


def test_overlap_plans_the_next_step_while_one_runs():
    """With depth 2 step N + 1 is submitted before N is awaited; with depth 1 never."""
    started = []
    release = threading.Event()

    def wait(plan):
        started.append(plan.step)
        assert release.wait(10)

    core, front = make_core(ScriptedRunner(wait), depth=2)
    front.send(submit("r", [1], max_tokens=10))
    core.turn(wait_s=0.0)  # submits step 1 and does not wait for it
    assert len(core.inflight) == 1
    release.set()
    run_until_idle(core, front)
    core.executor.close()


def test_synchronous_steps_run_in_the_callers_thread():
    runner = ScriptedRunner()
    core, front = make_core(runner, depth=1)
    front.send(submit("r", [1], max_tokens=3))
    run_until_idle(core, front)
    assert runner.threads == {threading.get_ident()}
    core.executor.close()
