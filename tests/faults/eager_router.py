"""`xllm router`, for which nothing is worse than to compute a long prompt where others decode: it comes from elsewhere, however
long that takes and however often that has failed."""

from xllm import cli
from xllm.cluster import pairing

if __name__ == "__main__":
    pairing.HELD = 1e6
    pairing.SHUNNED_S = 0.0
    raise SystemExit(cli.main())
