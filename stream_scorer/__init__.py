"""A streaming recommendation scorer: requests in on Kafka, CTR, CVR and CTCVR scores out, labels back, models swapped live.

For a guided tour read ``core/messages.py``, ``scorer.py``, ``core/join.py``, ``trainer.py``, ``hotswap.py`` in this order.
"""

__version__ = "0.1.0"
