"""Scoring speed against peers and the machine's limit: ``python -m tests.bench.speed``. Start at __main__.py."""
