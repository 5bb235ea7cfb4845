"""How hypothesis drives a state machine: as often and as long as is said, and however slow its moves are."""

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def explore(machine: type[RuleBasedStateMachine], examples: int, moves: int = 40) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=moves,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
