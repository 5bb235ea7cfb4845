"""Health means progress: an engine that has work and advances nothing is sick, however open its port."""

from dataclasses import dataclass

SILENT_AFTER_S = 5.0  # no sign of life from the engine process
STALLED_AFTER_S = 6.0  # work in flight and not one layer computed
GIVE_UP_AFTER_S = 11.0  # then requests in flight end with an error


@dataclass(frozen=True, slots=True)
class Health:
    ok: bool
    reason: str


class HealthMonitor:
    """Fed by `observe` a few times a second; times are seconds of the caller's monotonic clock."""

    def __init__(self, now: float):
        self._progress = -1
        self._moved_at = now
        self.sick_for_s = 0.0

    def observe(self, now: float, *, progress: int, busy: bool, silent_s: float, dead: str | None) -> Health:
        if progress != self._progress or not busy:
            self._progress, self._moved_at = progress, now
        stalled_s = now - self._moved_at
        self.sick_for_s = max(stalled_s if busy else 0.0, silent_s)
        if dead:
            return Health(False, dead)
        if silent_s > SILENT_AFTER_S:
            return Health(False, f"no sign of life from the engine for {silent_s:.0f} s")
        if busy and stalled_s > STALLED_AFTER_S:
            return Health(False, f"the engine has work but made no progress for {stalled_s:.0f} s")
        return Health(True, "ok")

    @property
    def hopeless(self) -> bool:
        """Nobody waiting on this engine should wait any longer."""
        return self.sick_for_s > GIVE_UP_AFTER_S
