"""A loop that answers what it is asked without an engine, and both ends as processes: `python -m tests.wire.echoing`."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable

from xllm.core.output import Finish, SequenceOutput
from xllm.core.sampling import SamplingParams
from xllm.wire.dial import Dial
from xllm.wire.doors import Listen
from xllm.wire.hub import Hub, Limits
from xllm.wire.ledger import NO_STATS
from xllm.wire.messages import Abort, Outputs, Reply, ResetPrefixCache, Submit

PARAMS = SamplingParams()
WAIT_S = 10.0


def until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ask(id: str, prompt: list[int]) -> Submit:
    return Submit(request_id=id, prompt_token_ids=prompt, params=PARAMS)


class Echo:
    """Answers a Submit with its own prompt, a token a message, the last one terminal; an empty prompt is never answered."""

    def __init__(self, hub: Hub):
        self.hub = hub
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping:
            match self.hub.receive(0.05):
                case Submit(request_id=id, prompt_token_ids=tokens):
                    self.running.add(id)
                    for left, token in zip(range(len(tokens) - 1, -1, -1), tokens, strict=True):
                        end = left == 0
                        self.send(id, token, Finish.LENGTH if end else None)
                        if end:
                            self.running.discard(id)
                case Abort(request_ids=ids):
                    self.aborted += ids
                    self.running.difference_update(ids)
                case ResetPrefixCache(call_id=call_id):
                    self.hub.send(Reply(call_id=call_id, value=True))

    def send(self, id: str, token: int, finish: Finish | None) -> None:
        output = SequenceOutput(request_id=id, token_ids=[token], finish=finish)
        self.hub.send(Outputs(outputs=[output], stats=NO_STATS))

    def close(self) -> None:
        self._stopping = True
        self._thread.join()
        self.hub.close()


def main() -> None:
    """`serve ADDRESS`, or `ask ADDRESS`: one request that is never answered. Both say when they are ready."""
    what, address = sys.argv[1:]
    if what == "serve":
        with contextlib.closing(Echo(Hub([Listen(address)], Limits(silence_s=1.5)))) as echo:
            print(echo.hub.addresses[0], flush=True)
            sys.stdin.read()
    else:
        with contextlib.closing(Dial(address, name="child")) as dial:
            assert dial.wait_ready(10.0)
            dial.send(ask("forever", []))
            print(dial.state, flush=True)
            while dial.receive(None) is not None:
                pass
            print(dial.reason, flush=True)


if __name__ == "__main__":
    main()
