import pytest
import torch

from tests.executor.transports.giving import contents, needs_nixl
from xllm.core.errors import ConfigError
from xllm.executor.transports import nixl, nixl_agents, table
from xllm.executor.transports.base import Blocks, Settings
from xllm.executor.transports.table import chosen, nixl_module, open_blocks, open_transport, spoken
from xllm.executor.transports.tcp import TcpTransport

MEMORY = contents(4, 100, 1)


def test_auto_is_tcp_on_a_cpu():
    transport = open_transport("auto", MEMORY)
    assert isinstance(transport, TcpTransport)
    transport.close()


@pytest.mark.parametrize(
    ("on_card", "mapped", "installed", "expected"),
    [
        (True, False, True, "nixl"),
        (True, False, False, "tcp"),
        (True, True, True, "tcp"),
        (False, False, True, "tcp"),
    ],
)
def test_auto_is_nixl_where_it_is_of_use(monkeypatch, on_card, mapped, installed, expected):
    monkeypatch.setattr(table, "nixl_module", lambda: "nixl_cu13" if installed else None)
    assert chosen(on_card=on_card, mapped=mapped) == expected
    assert spoken("auto", on_card=on_card, mapped=mapped) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tcp", "tcp"), ("nixl", "nixl"), ("mooncake", "mooncake"), ("faulty", "tcp"), ("faulty:nixl?drop=0.1&seed=3", "nixl"), ("faulty:?break=1", "tcp")],
)  # fmt: skip
def test_who_has_faults_speaks_what_others_do(name, expected):
    assert spoken(name, on_card=False, mapped=False) == expected


@pytest.mark.parametrize(
    ("cuda", "there", "expected"),
    [
        (None, {"nixl_cu12"}, "nixl_cu12"),
        (None, {"nixl_cu12", "nixl_cu13"}, "nixl_cu13"),
        ("13.0", {"nixl_cu12"}, None),
        ("12.8", {"nixl_cu12", "nixl_cu13"}, "nixl_cu12"),
        ("13.2", set(), None),
    ],
)
def test_the_package_goes_with_the_cuda_of_pytorch(monkeypatch, cuda, there, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert nixl_module(lambda name: name if name in there else None) == expected


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("carrier-pigeon", "there is no such transport; there are auto, tcp, nixl, mooncake"),
        ("tcp:fast", "tcp takes no settings"),
        ("faulty:pigeon", "there is no such transport"),
    ],
)
def test_unknown_ones_are_refused(name, told):
    with pytest.raises(ConfigError, match=told):
        open_transport(name, MEMORY)


def test_nixl_that_is_not_installed_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setattr(nixl_agents, "nixl_module", lambda: None)
    with pytest.raises(ConfigError, match=r"NIXL is not installed; pip install 'pyxllm\[pd\]' brings it"):
        open_transport("nixl", MEMORY)


def test_nixl_does_not_take_a_cards_memory_that_is_mapped_piece_by_piece():
    blocks = Blocks(MEMORY)
    blocks.on_card = True
    with pytest.raises(ConfigError, match="needs memory of one piece"):
        open_blocks("nixl", blocks, Settings(mapped=True))


@needs_nixl
def test_nixl_that_cannot_use_the_memory_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "no-such-thing")
    with pytest.raises(ConfigError, match="cannot be given to NIXL"):
        nixl.NixlTransport(Blocks(MEMORY), Settings())


def test_blocks_lie_one_behind_the_other():
    with pytest.raises(ValueError, match="one behind the other"):
        Blocks(torch.zeros(4, 10, dtype=torch.uint8)[:, :5])
    with pytest.raises(ValueError, match="without blocks"):
        Blocks(torch.zeros(0, 10))
