import msgspec

from xllm.core.stats import SchedulerStats


def test_a_snapshot_survives_the_wire():
    stats = SchedulerStats(1, 2, 1, 0.5, 100, 40, 3, 4, 500, 60, 17)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stats), type=SchedulerStats) == stats
