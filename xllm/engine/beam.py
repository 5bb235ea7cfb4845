"""Beam search on top of single-token requests: the prefix cache makes every round cost one decode step a beam.

Scores and the stopping rule are those of `transformers`' `generate(num_beams=...)` with `early_stopping=False`: a
finished beam counts its log-probability divided by (generated tokens, the end token included) ** length_penalty, and
the search of a prompt ends when no running beam can still beat the worst of `beam_width` finished ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xllm.core.errors import InvalidRequest
from xllm.core.output import Logprob, RequestOutput
from xllm.core.sampling import MAX_LOGPROBS, SamplingParams
from xllm.text.tokenizer import Tokenizer

StepBeams = Callable[[Sequence[list[int]], SamplingParams], list[RequestOutput]]


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Raises InvalidRequest for a width or length that makes no sense."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_LOGPROBS // 2:
            raise InvalidRequest(f"beam_width must lie between 1 and {MAX_LOGPROBS // 2}", param="beam_width")
        if self.max_tokens < 1:
            raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")


@dataclass(slots=True)
class Beam:
    """One hypothesis: `token_ids` are prompt and continuation, `score` is what beams are ranked by."""

    token_ids: list[int]
    cumulative_logprob: float = 0.0
    score: float = 0.0
    text: str = ""
    finish_reason: str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    sequences: list[Beam]  # best first


@dataclass(slots=True)
class _Search:
    """The search of one prompt."""

    prompt_len: int
    running: list[Beam]
    finished: list[Beam] = field(default_factory=list)
    done: bool = False


def beam_search(
    step: StepBeams,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    *,
    eos_ids: frozenset[int],
) -> list[BeamSearchOutput]:
    """`step` generates one token for each of many token sequences, with logprobs. All prompts advance together."""
    ends = frozenset() if params.ignore_eos else eos_ids
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, logprobs=2 * params.beam_width, detokenize=False, ignore_eos=True
    )
    searches = [_Search(prompt_len=len(ids), running=[Beam(token_ids=list(ids))]) for ids in prompts]
    for length in range(1, params.max_tokens + 1):
        active = [s for s in searches if not s.done]
        if not active:
            break
        outputs = iter(step([beam.token_ids for s in active for beam in s.running], sampling))
        for search in active:
            _advance(search, [next(outputs) for _ in search.running], params, ends, length)
    return [_conclude(search, params, tokenizer) for search in searches]


def _advance(
    search: _Search, outputs: list[RequestOutput], params: BeamSearchParams, ends: frozenset[int], length: int
) -> None:
    candidates = [
        (beam.cumulative_logprob + entry.logprob, token, beam)
        for beam, output in zip(search.running, outputs, strict=True)
        for token, entry in _logprobs(output).items()
    ]
    candidates.sort(key=lambda c: c[0], reverse=True)
    width = params.beam_width
    search.running = []
    for rank, (logprob, token, parent) in enumerate(candidates[: 2 * width]):
        beam = Beam(
            token_ids=[*parent.token_ids, token],
            cumulative_logprob=logprob,
            score=logprob / length**params.length_penalty,
        )
        if token in ends:
            if rank < width:  # an end that is not among the best `width` would not have been extended either
                beam.finish_reason = "stop"
                search.finished.append(beam)
        elif len(search.running) < width:
            search.running.append(beam)
    search.finished.sort(key=lambda b: b.score, reverse=True)
    del search.finished[width:]
    if len(search.finished) == width and search.running:
        search.done = search.finished[-1].score >= search.running[0].score
    search.done = search.done or not search.running


def _logprobs(output: RequestOutput) -> dict[int, Logprob]:
    completion = output.outputs[0]
    if not completion.logprobs:
        raise InvalidRequest(f"a beam could not be extended: {output.error or completion.finish_reason}")
    return completion.logprobs[0]


def _conclude(search: _Search, params: BeamSearchParams, tokenizer: Tokenizer) -> BeamSearchOutput:
    for beam in search.running:
        beam.finish_reason = "length"
    beams = sorted(
        search.finished
        + ([] if search.done and len(search.finished) == params.beam_width else search.running),
        key=lambda b: b.score,
        reverse=True,
    )
    for beam in beams[: params.beam_width]:
        beam.text = tokenizer.decode(beam.token_ids[search.prompt_len :])
    return BeamSearchOutput(sequences=beams[: params.beam_width])
