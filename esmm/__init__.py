"""ESMM in PyTorch: features, model, loss, learner, fast predictor and checkpoints. Knows nothing of streams.

For a guided tour read ``features.py``, ``model.py``, ``loss.py``, ``learner.py``, ``predictor.py`` in this order.
"""
