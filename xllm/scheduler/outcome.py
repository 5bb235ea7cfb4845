"""What a step's result means for one request: tokens kept, the end if it is one, and the output that tells of it."""

from collections.abc import Sequence

from xllm.core.output import Finish, SequenceOutput
from xllm.core.plan import TokenLogprobs
from xllm.core.request import Request


def accept(request: Request, tokens: Sequence[int]) -> tuple[Sequence[int], Finish | None]:
    """Append sampled tokens up to the first that ends the request. Returns those kept, and why it ended if it did.

    A stop id counts once `min_tokens` others are out, and goes out as the last token itself.
    """
    output = request.output_token_ids
    room = request.max_total_tokens - len(request.prompt_token_ids)
    for i, token in enumerate(tokens):
        output.append(token)
        if token in request.stop_ids and len(output) > request.params.min_tokens:
            return tokens[: i + 1], Finish.STOP
        if len(output) >= room:
            return tokens[: i + 1], Finish.LENGTH
    return tokens, None


def ended(request: Request) -> SequenceOutput | None:
    """The terminal output of a request whose given output has an end in it already: no token is to follow."""
    given, request.output_token_ids = request.output_token_ids, []
    kept, finish = accept(request, given)
    request.output_token_ids = given
    if finish is None:
        return None
    return SequenceOutput(request.id, finish=finish, stop_reason=_stop_reason(request, kept[-1], finish))


def mismatch(request: Request, sampled: bool, brought: int) -> str | None:
    """Why a number of tokens other than what was asked for cannot be accepted, or None where it can: several, of a
    sequence none of whose later tokens is in flight."""
    if brought == sampled:
        return None
    if not sampled:
        return f"a step that was to sample nothing brought {brought} tokens"
    if brought == 0:
        return "the step brought no token"
    if request.num_computed > request.num_known:
        return f"a step brought {brought} tokens at once while the next was computed already"
    return None


def unsent_prompt_logprobs(
    request: Request, start: int, found: Sequence[TokenLogprobs]
) -> Sequence[TokenLogprobs]:
    """Of logprobs at positions start + 1 .., those of the prompt that have not been sent: after a preemption the same
    positions are computed again."""
    if not found:
        return ()
    unsent = found[request.num_prompt_logprobs - start : len(request.prompt_token_ids) - 1 - start]
    request.num_prompt_logprobs += len(unsent)
    return unsent


def news(
    request: Request,
    tokens: Sequence[int],
    finish: Finish | None,
    logprob: TokenLogprobs | None,
    prompt_logprobs: Sequence[TokenLogprobs],
    now: float,
) -> SequenceOutput:
    """The output that tells of `tokens`, which `accept` has appended. The first one also tells how the request began."""
    logprobs = () if logprob is None else (logprob,)
    first = len(request.output_token_ids) == len(tokens)
    if not first and finish is None:
        return SequenceOutput(
            request.id, tokens, logprobs, prompt_logprobs, num_preemptions=request.num_preemptions
        )
    return SequenceOutput(
        request_id=request.id,
        token_ids=tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=request.num_cached_tokens,
        finish=finish,
        stop_reason=_stop_reason(request, tokens[-1], finish),
        queued_s=_queued_s(request) if first else None,
        prefill_s=now - request.first_scheduled if first and request.first_scheduled is not None else None,
        num_preemptions=request.num_preemptions,
        fetched_tokens=request.fetched_tokens if first else 0,
        fetch_s=request.fetch_s if first else 0.0,
    )


def terminal(request: Request, finish: Finish, error: str | None = None) -> SequenceOutput:
    """The last output of a request that ends without a further token."""
    first = not request.output_token_ids
    return SequenceOutput(
        request_id=request.id,
        num_cached_tokens=request.num_cached_tokens,
        finish=finish,
        error=error,
        queued_s=_queued_s(request) if first else None,
        num_preemptions=request.num_preemptions,
    )


def _stop_reason(request: Request, token: int, finish: Finish | None) -> int | None:
    return token if finish is Finish.STOP and token not in request.eos_ids else None


def _queued_s(request: Request) -> float | None:
    return None if request.first_scheduled is None else request.first_scheduled - request.arrival
