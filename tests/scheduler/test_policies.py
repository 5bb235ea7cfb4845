import pytest

from tests.scheduler.rig import config
from xllm.core.errors import ConfigError
from xllm.kv.pool import BlockPool
from xllm.scheduler import admission, batching, order, policies
from xllm.scheduler.scheduler import Scheduler

TABLES = {"batching": policies.BATCHING, "order": policies.ORDER, "admission": policies.ADMISSION}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_every_line_of_a_table_leads_to_a_function_of_that_name(kind, name):
    policy = policies.load(kind, TABLES[kind], name)
    assert policy.__name__ == name
    assert policy.__doc__
    assert policy.__module__ == {"batching": batching, "order": order, "admission": admission}[kind].__name__


@pytest.mark.parametrize("kind", sorted(TABLES))
def test_an_unknown_name_is_an_error_that_lists_the_known(kind):
    with pytest.raises(ConfigError, match=f"unknown {kind} policy 'round_robin'; known: ") as caught:
        Scheduler(config(**{kind: "round_robin"}), BlockPool(4, 4))
    assert caught.value.param == kind
    assert all(name in caught.value.message for name in TABLES[kind])


def test_the_options_offer_what_the_tables_know():
    from xllm.config.options import option_fields

    choices = {name: field["choices"] for name, field in option_fields()}
    assert set(choices["batching_policy"]) == set(policies.BATCHING)
    assert set(choices["scheduling_policy"]) == set(policies.ORDER)
    assert set(choices["admission"]) == set(policies.ADMISSION)
