"""Scoring a `RankBatch`: the plain path, which is the oracle, and the fast path, which gives the same scores sooner.

Start at `build.build_predictor`; for a guided tour of the fast path read fold.py, table.py, rows.py, fast.py.
Names are imported from the modules, not from here.
"""
