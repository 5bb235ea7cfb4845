"""RELIABILITY 8: nothing in the package unpickles. A checkpoint, a peer or a client must never run code here."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "xllm"
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"recv_pyobj", "send_pyobj"}


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module or "")
        elif isinstance(node, ast.Attribute) and node.attr in CALLS:
            found.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if safe.get("weights_only") != "True" and safe.get("allow_pickle") != "False":
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "multiprocessing.Process",
            "multiprocessing.Queue",
        ):
            found.append(ast.unparse(node))  # these pickle what they carry
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_pickle(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "s.recv_pyobj()",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "import pickle.x",
    ],
)
def test_the_check_finds_what_it_looks_for(line):
    assert offences(line)
