"""Whatever can happen to instances and routers happens, one thing after the other, at load and for minutes."""

import random
import time

import pytest

from tests.faults.load import Load, answered, modelled_questions
from tests.faults.rig import Cluster, cluster, go_on, kill, stop_the_world, until

IDS = ("a", "b", "c", "d")


def killed(made: Cluster, id: str) -> None:
    kill(made.instances[id])
    made.restart(id)


def shut_down(made: Cluster, id: str) -> None:
    made.instances[id].terminate()
    made.instances[id].process.wait(40)
    made.restart(id)


def stopped(made: Cluster, id: str) -> None:
    stop_the_world(made.instances[id])
    time.sleep(4)
    go_on(made.instances[id])


def etcd_stopped(made: Cluster, id: str) -> None:
    made.etcd.kill()
    kill(made.instances[id])
    time.sleep(4)
    made.etcd.start()
    made.restart(id)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("real", [False, True], ids=["modelled", "demo"])
def test_minutes_of_faults(real):
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    with cluster() as made:
        made.real(*IDS) if real else made.modelled(*IDS)
        router = made.router()
        router.until_serving(*IDS, timeout_s=60)
        questions = modelled_questions()
        if real:
            questions = answered(router, questions)
        with Load(router.url, questions, 32) as load:
            end = time.monotonic() + 180
            while time.monotonic() < end:
                what, victim = chance.choice((killed, shut_down, stopped, etcd_stopped)), chance.choice(IDS)
                print(f"seed {seed}: {victim} {what.__name__}")
                what(made, victim)
                router.until_serving(*IDS, timeout_s=90)
                load.until_answered(32, 60)
        print(load.seen)
        load.check(200)
        until(lambda: all(one["requests"] == 0 for one in router.instances().values()), "nothing is left")
