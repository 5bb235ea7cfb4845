"""bfloat16 on a card, whole models through the engine: log-probabilities beside exact ones, for every way of attention."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from tests.engine.test_equality import BACKENDS
from xllm import LLM, SamplingParams

VOCAB = 512
# head sizes and blocks that all kernels of a card take
CONFIG: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 128, "vocab_size": VOCAB, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = (3, 64, 129, 700, 1, 40, 260)
OUTPUT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("bfloat16")
    made = AutoModelForCausalLM.from_config(Qwen3Config(**CONFIG)).to(torch.bfloat16)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    made.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def exact(model: str) -> Any:
    """The same weights, computed in float32."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def logprobs(theirs: Any, token_ids: list[int]) -> torch.Tensor:
    """[T - 1]: of each token but the first."""
    with torch.inference_mode():
        logits = theirs(torch.tensor([token_ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


@pytest.fixture(params=["hopper", "triton"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel prompts take."""
    if request.param == "triton":
        monkeypatch.setattr("xllm.ops.cuda.hopper_attention.fits", lambda *_: False)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper cards")
    kernel: str = request.param
    return kernel


@pytest.mark.parametrize("backend", ["graphs", "eager"])
def test_plain_pytorch(model: str, exact: Any, backend: str) -> None:
    check(model, exact, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda-graphs", "cuda-eager"])
@pytest.mark.usefixtures("attention")
def test_kernels(model: str, exact: Any, backend: str) -> None:
    check(model, exact, backend)


def check(model: str, exact: Any, backend: str) -> None:
    """Prompts one after the other, so that some are computed whole, some in chunks, some beside decodes; then each again,
    from the cache."""
    rounded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=OUTPUT, ignore_eos=True, logprobs=0)
    scored = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    with LLM(
        model, skip_tokenizer_init=True, dtype="bfloat16", threads=1, block_size=64, max_num_batched_tokens=512,
        max_model_len=1024, max_num_seqs=8, kv_cache_memory_bytes=64 << 20, **BACKENDS[backend],
    ) as llm:  # fmt: skip
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        for _ in range(2):
            ours, wanted, peers = [], [], []
            for out in llm.generate(given, params, use_tqdm=False):
                completion = out.outputs[0]
                tokens = [*out.prompt_token_ids, *completion.token_ids]
                assert completion.logprobs is not None
                ours += [
                    step[token].logprob
                    for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
                ]
                wanted.append(logprobs(exact, tokens)[-OUTPUT:])
                peers.append(logprobs(rounded, tokens)[-OUTPUT:])
            close(torch.tensor(ours), torch.cat(wanted), torch.cat(peers))
        ours, wanted, peers = [], [], []
        for out in llm.generate(given[:4], scored, use_tqdm=False):
            assert out.prompt_logprobs is not None
            for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True):
                assert entry is not None
                ours.append(entry[token].logprob)
            wanted.append(logprobs(exact, list(out.prompt_token_ids)))
            peers.append(logprobs(rounded, list(out.prompt_token_ids)))
        close(torch.tensor(ours), torch.cat(wanted), torch.cat(peers))


def close(ours: torch.Tensor, exact: torch.Tensor, peers: torch.Tensor) -> None:
    """As close as bfloat16 allows, which is what `transformers` makes of it; in the mean and at worst."""
    error, allowed = (ours - exact).abs(), (peers - exact).abs()
    assert float(error.square().mean()) <= 1.5 * float(allowed.square().mean())
    assert float(error.max()) <= 2 * float(allowed.max())
