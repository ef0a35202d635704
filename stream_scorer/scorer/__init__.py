"""The scorer: `loop.py` is its loop, `publisher.py` the second half of a batch's life."""

from stream_scorer.scorer.loop import Scorer
from stream_scorer.scorer.ports import ScorerPolicy, ScorerPorts

__all__ = ["Scorer", "ScorerPolicy", "ScorerPorts"]
