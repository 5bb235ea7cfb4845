"""All instances are restarted one after the other at load: nobody who asks notices."""

import pytest

from tests.faults.load import Load, answered, modelled_questions
from tests.faults.rig import cluster

IDS = ("a", "b", "c")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["modelled", "demo"]
)
def test_rolling_restart(real):
    with cluster() as made:
        made.real(*IDS) if real else made.modelled(*IDS)
        router = made.router()
        router.until_serving(*IDS, timeout_s=60)
        questions = answered(router, modelled_questions()) if real else modelled_questions()
        with Load(router.url, questions, most=150) as load:
            for id in IDS:
                victim, epoch = made.instances[id], router.instances()[id]["epoch"]
                victim.terminate()
                assert victim.process.wait(40) == 0
                made.restart(id)
                router.until_restarted(id, epoch)
                router.until_serving(*IDS, timeout_s=40)
            load.until_answered(16)
        load.check(8)
