"""Prompts that share nothing, where there is room for all: whoever knows prefixes chooses as who does not."""

import heapq
import random
from typing import Any

from msgspec.structs import replace

from tests.cluster.real import instance
from tests.cluster.test_dispatch import Watch, news, submit
from xllm.cluster.dispatch import Dispatcher, Sending
from xllm.cluster.view import Load
from xllm.core.output import Finish

RATE = 4.0  # requests a second, for instances that take 25 ms and more for one
REPORT_S = 0.25


def chosen(policy: str, requests: int = 200) -> list[str]:
    watch = Watch()
    watch.now = 0.0
    dispatcher = Dispatcher(policy, clock=watch)
    running = {}
    for id in "abcd":
        at = dispatcher.joined(instance(id, max_num_seqs=8, max_model_len=2048))
        dispatcher.serves(at, True)
        running[at] = 0
    rng, arrival = random.Random(3), 0.0
    todo: list[tuple[float, int, Any]] = []  # when, in which order, what
    for number in range(requests):
        arrival += rng.expovariate(RATE)
        todo.append((arrival, number, rng.randint(100, 600)))
    todo += [(n * REPORT_S, requests + n, None) for n in range(int(arrival / REPORT_S))]
    heapq.heapify(todo)
    found = []
    while todo:
        watch.now, number, what = heapq.heappop(todo)
        if what is None:
            for at, count in running.items():
                dispatcher.told(at, Load(running=count), watch.now)
        elif isinstance(what, int):
            ids = [random.Random(number).randrange(1000) for _ in range(what)]
            _, sending = dispatcher.submit(replace(submit(f"{number}/0"), prompt_token_ids=ids), watch.now)
            found.append(sending.to.id)
            running[sending.to] += 1
            first = watch.now + what * 6e-5
            heapq.heappush(todo, (first, number, (sending, None)))
            heapq.heappush(todo, (first + 0.025, number, (sending, Finish.LENGTH)))
        else:
            sending, finish = what
            assert isinstance(sending, Sending)
            dispatcher.heard(sending.to, [news(sending, 1, finish=finish)], watch.now)
            running[sending.to] -= finish is not None
    return found


def test_it_chooses_as_least_loaded_does():
    assert chosen("prefix_aware") == chosen("least_loaded")
