"""Quix Streams + redis-py + DeepCTR-Torch as their documents teach it: one message at a time, a dict a candidate."""

import json
import sys

import numpy as np
import redis
import torch
from deepctr import build
from quixstreams import Application

config = json.loads(sys.argv[1])
model = build(config["weights"], config["floats"], config["towers"], config["threads"])
store = redis.Redis.from_url(config["redis"])
app = Application(
    broker_address=config["bootstrap"],
    consumer_group=config["group"],
    auto_offset_reset="earliest",
    loglevel="WARNING",
    auto_create_topics=False,
)
source = app.topic(config["requests"], value_deserializer="json", key_deserializer="str")
sink = app.topic(config["output"], value_serializer="json", key_serializer="str")


def score(request: dict) -> dict:
    values = store.mget([f"user:{request['user_id']}", *(f"item:{item}" for item in request["items"])])
    rows = np.stack([np.frombuffer(value, np.float32) for value in values])
    x = np.concatenate([np.repeat(rows[:1], len(rows) - 1, 0), rows[1:]], 1)
    with torch.no_grad():
        ctr, ctcvr = model(torch.from_numpy(x)).numpy().T
    return {
        "request_id": request["request_id"],
        "user_id": request["user_id"],
        "ts": request["ts"],
        "scores": [
            {"item": item, "ctr": float(a), "cvr": float(b / a), "ctcvr": float(b)}
            for item, a, b in zip(request["items"], ctr, ctcvr, strict=True)
        ],
    }


app.dataframe(source).apply(score).to_topic(sink)
app.run()
