"""Ten times as many ask as there is room for: some are turned away and told when to come again, the others get their answers."""

import time

import pytest

from tests.faults.load import Load, modelled_questions
from tests.faults.rig import cluster

SEQUENCES = QUEUED = 4  # of each of two instances
CLIENTS = 10 * 2 * (SEQUENCES + QUEUED)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [5, pytest.param(120, marks=pytest.mark.slow)])
def test_ten_times_capacity(seconds):
    with cluster() as made:
        flags = ("--max-num-seqs", str(SEQUENCES), "--max-num-queued", str(QUEUED))
        made.modelled("a", "b", flags=flags)
        router = made.router()
        router.until_serving("a", "b")
        questions = modelled_questions()
        with Load(router.url, questions, CLIENTS, most=60, hold_s=0.5) as load:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                load.until_answered(10)
        assert not load.seen.wrong, load.seen.wrong[:5]
        assert load.seen.refused.keys() <= {429, 503} and load.seen.refused[429] > CLIENTS
        assert load.seen.answered.total() >= 10
        begin = time.monotonic()
        with Load(router.url, questions, 4, most=60) as after:
            after.until_answered(8, 10)
        assert time.monotonic() - begin < 10
        after.check()
        assert all(one["requests"] == 0 for one in router.instances().values())


def test_nobody_is_there_and_then_somebody_is():
    with cluster() as made:
        made.modelled("a")
        router = made.router()
        router.until_serving("a")
        made.instances["a"].terminate()
        made.instances["a"].end()
        router.until_serving()
        for path in ("/v1/completions", "/ready"):
            answer = router.complete(prompt=[20], max_tokens=3) if "v1" in path else router.http.get(path)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1, answer.text
        assert router.http.get("/health").status_code == 200
        made.restart("a")
        router.until_serving("a")
        assert router.complete(prompt=[20], max_tokens=3).status_code == 200
