"""Consume, orjson both ways, produce, no scoring: what the input and output allow. Starts over at the end."""

import json
import signal
import sys

import numpy as np
import orjson
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition

config = json.loads(sys.argv[1])
running = True


def stop(*_):
    global running  # noqa: PLW0603
    running = False


signal.signal(signal.SIGTERM, stop)
base = {"bootstrap.servers": config["bootstrap"], "log_level": 3}
consumer = Consumer({**base, "group.id": config["group"], "enable.auto.commit": False, "enable.partition.eof": True})
producer = Producer({**base, "linger.ms": 5, "compression.type": "lz4", "enable.idempotence": True})
partitions = len(consumer.list_topics(config["requests"]).topics[config["requests"]].partitions)
consumer.assign([TopicPartition(config["requests"], n, OFFSET_BEGINNING) for n in range(partitions)])
values = np.random.default_rng(0).random(10_000, np.float32)
NUMPY = orjson.OPT_SERIALIZE_NUMPY
while running:
    for message in consumer.consume(200, 0.05):
        if message.error() is not None:
            if message.error().code() == KafkaError._PARTITION_EOF:
                consumer.seek(TopicPartition(message.topic(), message.partition(), OFFSET_BEGINNING))
            continue
        request = orjson.loads(message.value())
        column = values[: len(request["items"])]
        body = {
            "request_id": request["request_id"],
            "user_id": request["user_id"],
            "ts": request["ts"],
            "items": request["items"],
            "ctr": column,
            "cvr": column,
            "ctcvr": column,
        }
        while True:
            try:
                producer.produce(config["output"], orjson.dumps(body, option=NUMPY), message.key())
                break
            except BufferError:
                producer.poll(0.05)
    producer.poll(0)
producer.flush(10)
