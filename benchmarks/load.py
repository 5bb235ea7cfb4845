"""How much of the machine others used while something was measured. A sample with much of it is worth little."""

import json
import time
from typing import Any

import psutil

MARK = "result: "


class Load:
    """`foreign`: processor seconds per second that were not this process's own, 0 on an idle machine."""

    def __enter__(self) -> "Load":
        self._start = self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        wall, busy, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        self.seconds = wall
        self.foreign = max(0.0, busy - own) / wall

    @staticmethod
    def _now() -> tuple[float, float, float]:
        everyone = psutil.cpu_times()
        mine = psutil.Process().cpu_times()
        busy = everyone.user + everyone.nice + everyone.system + getattr(everyone, "steal", 0.0)
        return time.perf_counter(), busy, mine.user + mine.system


def emit(result: dict[str, Any], load: Load) -> None:
    """For the process that started this one."""
    print(MARK + json.dumps({**result, "foreign_load": load.foreign, "seconds": load.seconds}), flush=True)
