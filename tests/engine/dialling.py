"""Talking to an instance through a `Dial`: asking, and waiting for what comes."""

import time

from xllm.core.output import SequenceOutput
from xllm.core.sampling import SamplingParams
from xllm.wire.dial import Dial
from xllm.wire.messages import Message, Outputs, Submit

TIMEOUT_S = 15.0


def ask(id, prompt, max_tokens=8, *, seed=None, given=(), **params):
    params.setdefault("temperature", 0.0)
    return Submit(
        request_id=id,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=seed,
        output_token_ids=given,
    )


def dialled(address, **options):
    dial = Dial(address, **options)
    assert dial.wait_ready(TIMEOUT_S), dial.reason
    return dial


def listen(dial, until) -> tuple[dict[str, list[int]], dict[str, SequenceOutput], list[Message]]:
    """Tokens and ends by request, until `until(tokens, ends)` holds; the other messages that came."""
    tokens: dict[str, list[int]] = {}
    ends: dict[str, SequenceOutput] = {}
    others: list[Message] = []
    deadline = time.monotonic() + TIMEOUT_S
    while not until(tokens, ends, others):
        assert time.monotonic() < deadline, "not in time"
        message = dial.receive(0.1)
        if isinstance(message, Outputs):
            for output in message.outputs:
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish is not None:
                    ends[output.request_id] = output
        elif message is not None:
            others.append(message)
    return tokens, ends, others


def ended(*ids):
    return lambda tokens, ends, others: set(ids) <= set(ends)


def have(id, count):
    return lambda tokens, ends, others: len(tokens.get(id, ())) >= count


def until(condition, what):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)
