"""Memory given back and taken again: the same answers afterwards, and a sentence for whoever comes meanwhile."""

from typing import Any

import pytest

from tests import checkpoints
from tests.engine.scripted import ScriptedRunner, drain, ends_of, make_core, run_until_idle, submit
from xllm import LLM, SamplingParams
from xllm.core.errors import ConfigError, InvalidRequest, Unavailable
from xllm.core.output import Finish
from xllm.engine.client import InlineClient
from xllm.wire.messages import Reply, Sleep, WakeUp

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.save_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("device", ["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_answers_after_a_sleep(model, device):
    with LLM(str(model), device=device, dtype="float32", block_size=8, threads=1, max_num_seqs=4) as llm:
        prompts = [[5, 6, 7], list(range(5, 40))]
        before = [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]
        llm.sleep()
        llm.sleep()  # twice is once
        (out,) = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
        assert (out.outputs[0].finish_reason, out.error) == ("error", "the engine sleeps")
        llm.wake_up()
        llm.wake_up()
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [out.outputs[0].token_ids for out in outputs] == before
        assert [out.num_cached_tokens for out in outputs] == [0, 0], "what was cached is gone"


def test_a_cpu_has_nowhere_to_put_its_weights(model):
    with LLM(str(model), device="cpu", dtype="float32", threads=1) as llm, pytest.raises(InvalidRequest):
        llm.sleep()
    with pytest.raises(ConfigError, match="enable-sleep-mode"):
        LLM(str(model), device="cpu", enable_sleep_mode=True)


def test_no_sleep_while_anything_runs():
    core, front = make_core()
    front.send(submit("r", [1, 2], max_tokens=5))
    core.turn(wait_s=0.0)
    front.send(Sleep(call_id=1))
    outputs = run_until_idle(core, front)
    assert ends_of(outputs) == {"r": [Finish.LENGTH]}
    assert not core.asleep
    core.executor.close()


def test_a_failed_waking_is_told_and_it_sleeps_on():
    class Greedy(ScriptedRunner):
        def wake_up(self):
            raise RuntimeError("out of memory")

    core, front = make_core(Greedy())
    front.send(Sleep(call_id=1))
    front.send(WakeUp(call_id=2))
    core.turn(wait_s=0.0)
    assert core.asleep
    replies = [message for message in drain(front)[1] if isinstance(message, Reply)]
    assert [(reply.call_id, reply.refused) for reply in replies] == [
        (1, None),
        (2, "the engine cannot wake up: out of memory"),
    ]
    core.executor.close()


def test_a_refusal_reaches_the_caller(model, monkeypatch):
    with LLM(str(model), device="reference", dtype="float32", block_size=8, threads=1, max_num_seqs=2) as llm:
        llm.sleep()
        assert isinstance(llm._client, InlineClient)
        runner: Any = llm._client._core.executor._runner
        monkeypatch.setattr(runner._sleeper, "wake", lambda: 1 / 0)
        with pytest.raises(Unavailable, match="cannot wake up: division by zero"):
            llm.wake_up()
