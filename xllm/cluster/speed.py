"""How fast an instance is, learnt from what it tells and from what was observed of its answers.

A step that computes n tokens takes about `base_s + n * token_s`: the weights are read once whatever n is, and each
token is arithmetic of its own. Both numbers come from a least-squares line through the steps that were reported, in
which old reports fade. What such a line cannot know (the network, other routers' bursts, preemptions) is seen in the
answers: `Correction` is the running ratio of observed to predicted.
"""

from dataclasses import dataclass

FADE = 0.9  # of a report's weight is left when the next one comes
GAIN = 0.2  # of a new observation in a correction
BOUNDS = (
    0.1,
    10.0,
)  # a correction beyond these says that the prediction is of no use, not that it is so far off


@dataclass(slots=True)
class StepTimes:
    """The line through (tokens of a step, seconds of a step), as fading sums."""

    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    tokens_tokens: float = 0.0
    tokens_seconds: float = 0.0

    def seen(self, tokens: float, seconds: float) -> None:
        """The steps since the last report had `tokens` tokens and took `seconds` each, on average."""
        self.weight = FADE * self.weight + 1
        self.tokens = FADE * self.tokens + tokens
        self.seconds = FADE * self.seconds + seconds
        self.tokens_tokens = FADE * self.tokens_tokens + tokens * tokens
        self.tokens_seconds = FADE * self.tokens_seconds + tokens * seconds

    @property
    def known(self) -> bool:
        return self.weight > 0 and self.seconds > 0 and self.tokens > 0

    @property
    def mean_tokens(self) -> float:
        """Of a step."""
        return self.tokens / self.weight if self.weight else 0.0

    def line(self) -> tuple[float, float]:
        """`(base_s, token_s)`, neither negative; zeros where nothing was seen.

        Where all reports had about the same number of tokens no slope can be told, and half of the time is laid on the
        tokens: wrong in a way that corrections mend, and never zero.
        """
        if not self.known:
            return 0.0, 0.0
        mean, mean_s = self.tokens / self.weight, self.seconds / self.weight
        spread = self.tokens_tokens / self.weight - mean * mean
        slope = 0.5 * mean_s / mean
        if spread > (0.05 * mean) ** 2:
            slope = (self.tokens_seconds / self.weight - mean * mean_s) / spread
        slope = min(max(slope, 0.0), mean_s / mean)
        return mean_s - slope * mean, slope


@dataclass(slots=True)
class Correction:
    """Observed over predicted, as a running mean."""

    factor: float = 1.0

    def seen(self, predicted: float, observed: float) -> None:
        if predicted > 0 and observed > 0:
            low, high = BOUNDS
            ratio = min(max(observed / predicted, low), high)
            self.factor += GAIN * (ratio - self.factor)
