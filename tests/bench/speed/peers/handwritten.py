"""A careful hand-written consumer: consume(B), one MGET for what the batch needs, one DeepCTR-Torch forward, orjson."""

import json
import signal
import sys

import numpy as np
import orjson
import redis
import torch
from confluent_kafka import Consumer, Producer
from deepctr import build

config = json.loads(sys.argv[1])
running = True


def stop(*_):
    global running  # noqa: PLW0603
    running = False


signal.signal(signal.SIGTERM, stop)
model = build(config["weights"], config["floats"], config["towers"], config["threads"])
store = redis.Redis.from_url(config["redis"])
base = {"bootstrap.servers": config["bootstrap"], "log_level": 3}
consumer = Consumer(
    {
        **base,
        "group.id": config["group"],
        "auto.offset.reset": "earliest",
        "enable.auto.commit": False,
        "fetch.wait.max.ms": 10,
        "fetch.queue.backoff.ms": 10,
    }
)
producer = Producer({**base, "linger.ms": 5, "compression.type": "lz4", "enable.idempotence": True})
consumer.subscribe([config["requests"]])
NUMPY = orjson.OPT_SERIALIZE_NUMPY
with torch.inference_mode():
    while running:
        messages = [m for m in consumer.consume(config["batch"], 0.02) if m.error() is None]
        if not messages:
            continue
        requests = [orjson.loads(m.value()) for m in messages]
        users = [r["user_id"] for r in requests]
        items = [item for r in requests for item in r["items"]]
        user_index = {user: at for at, user in enumerate(dict.fromkeys(users))}
        item_index = {item: at for at, item in enumerate(dict.fromkeys(items))}
        values = store.mget([*(f"user:{u}" for u in user_index), *(f"item:{i}" for i in item_index)])
        rows = np.frombuffer(b"".join(values), np.float32).reshape(len(values), -1)
        counts = [len(r["items"]) for r in requests]
        user_of = np.repeat(np.fromiter(map(user_index.__getitem__, users), np.int64, len(users)), counts)
        item_of = np.fromiter(map(item_index.__getitem__, items), np.int64, len(items)) + len(user_index)
        x = np.concatenate([rows[user_of], rows[item_of]], 1)
        scores = model(torch.from_numpy(x)).numpy()
        ctr, ctcvr = np.ascontiguousarray(scores[:, 0]), np.ascontiguousarray(scores[:, 1])
        cvr = ctcvr / ctr
        start = 0
        for message, request, count in zip(messages, requests, counts, strict=True):
            stop_ = start + count
            body = {
                "request_id": request["request_id"],
                "user_id": request["user_id"],
                "ts": request["ts"],
                "items": request["items"],
                "ctr": ctr[start:stop_],
                "cvr": cvr[start:stop_],
                "ctcvr": ctcvr[start:stop_],
            }
            start = stop_
            while True:
                try:
                    producer.produce(config["output"], orjson.dumps(body, option=NUMPY), message.key())
                    break
                except BufferError:
                    producer.poll(0.05)
        producer.poll(0)
        consumer.commit(asynchronous=True)
producer.flush(10)
consumer.close()
