"""A streaming recommendation scorer: requests in, CTR, CVR and CTCVR out, labels back, models swapped live.

For a guided tour read ``core/messages.py``, ``scorer.py``, ``core/join.py``, ``trainer/loop.py``, ``hotswap.py``.
"""

__version__ = "0.1.0"
