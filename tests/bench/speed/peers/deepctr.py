"""DeepCTR-Torch's ESMM with the benchmark's weights."""

import importlib
import sys
import types

import numpy as np
import torch


def build(weights: str, floats: int, towers: list[int], threads: int):
    """The model in eval mode; ``weights`` is an .npz of its state_dict."""
    torch.set_num_threads(threads)
    esmm, inputs = _load()
    columns = [inputs.DenseFeat("user", floats), inputs.DenseFeat("item", floats)]
    model = esmm.ESMM(columns, tower_dnn_hidden_units=tuple(towers), device="cpu")
    arrays = np.load(weights)
    state = model.state_dict()
    missing = set(state) - set(arrays)
    assert not missing, missing
    model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in state})
    return model.eval()


def _load():
    """Its __init__ asks a package index for updates from a thread: not here."""
    had = sys.modules.get("requests")
    answer = types.SimpleNamespace(status_code=0)
    codes = types.SimpleNamespace(ok=200)
    sys.modules["requests"] = types.SimpleNamespace(get=lambda _: answer, codes=codes)
    try:
        return importlib.import_module("deepctr_torch.models.multitask.esmm"), importlib.import_module(
            "deepctr_torch.inputs"
        )
    finally:
        if had is None:
            del sys.modules["requests"]
        else:
            sys.modules["requests"] = had
