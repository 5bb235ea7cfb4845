import json

from xllm.bench import collect_env


def test_facts_are_there(capsys):
    assert collect_env.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cpu"]["usable_cores"] >= 1
    assert facts["torch"]["version"].startswith(
        facts["packages"]["torch"]
    )  # builds add a suffix such as +cu130
    assert facts["memory_gib"] > 0


def test_as_text(capsys):
    assert collect_env.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("python: 3.") for line in lines)
    assert any(line.startswith("  instructions: ") for line in lines)


def test_no_secrets(monkeypatch, capsys):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "XLLM_API_KEY"):
        monkeypatch.setenv(name, "top-secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    collect_env.main([])
    printed = capsys.readouterr().out
    assert "top-secret" not in printed
    assert "OMP_NUM_THREADS: 3" in printed


def test_a_machine_that_tells_nothing(monkeypatch):
    monkeypatch.setattr(collect_env, "_read", lambda path: "")
    monkeypatch.setattr("shutil.which", lambda name: None)
    facts = collect_env.collect()
    assert facts["compiler"] is None
    assert facts["gpus"] == []
    assert facts["distribution"] is None
    assert facts["cpu"]["model"]


def test_what_a_gpu_says(monkeypatch):
    monkeypatch.setattr(
        collect_env, "_run", lambda *command: "NVIDIA X, 80 GiB, 600.1\nNVIDIA X, 80 GiB, 600.1"
    )
    assert len(collect_env.collect()["gpus"]) == 2


def test_a_command_that_fails_says_nothing():
    assert collect_env._run("false") is None
