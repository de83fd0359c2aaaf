"""What each head does, without a T x S tensor."""

from polyhead.look.stats import stats

__all__ = ["stats"]
