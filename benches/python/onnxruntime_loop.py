"""Scoring as one would write it in Python: confluent-kafka, onnxruntime with whole logits, numpy.

Reads COUNT documents from a topic, scores them in batches as they come, publishes the losses and commits. Prints one
JSON object: seconds and CPU seconds from the first record to the last commit.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from confluent_kafka import Consumer, Producer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/python"))

from read_scored import load_records_module

BATCH_DOCUMENTS = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--count", required=True, type=int)
    arguments = parser.parse_args()
    records = load_records_module()
    session = onnxruntime.InferenceSession(str(arguments.model / "model.onnx"), providers=["CPUExecutionProvider"])
    session.run(["logits"], {"input_ids": np.zeros((1, 8), dtype=np.int64)})
    consumer = Consumer(
        {
            "bootstrap.servers": arguments.bootstrap_servers,
            "group.id": arguments.out,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([arguments.topic])
    producer = Producer({"bootstrap.servers": arguments.bootstrap_servers, "message.max.bytes": 10_000_000})

    done, tokens, loss_sum, predicted, padded = 0, 0, 0.0, 0, 0
    started = None
    while done < arguments.count:
        messages = consumer.consume(min(BATCH_DOCUMENTS, arguments.count - done), timeout=1.0)
        if not messages:
            continue
        if started is None:
            started, cpu = time.perf_counter(), time.process_time()
        documents = []
        for message in messages:
            document = records.TokenizedDocument.FromString(message.value())
            documents.append(np.frombuffer(document.tokens, dtype={2: "<u2", 4: "<u4"}[document.token_width]))
        longest = max(map(len, documents))
        batch = np.zeros((len(documents), longest), dtype=np.int64)
        for row, ids in zip(batch, documents):
            row[: len(ids)] = ids
        (logits,) = session.run(["logits"], {"input_ids": batch})
        shifted = logits[:, :-1]
        highest = shifted.max(-1, keepdims=True)
        normalizer = np.log(np.exp(shifted - highest).sum(-1)) + highest[..., 0]
        losses = normalizer - np.take_along_axis(shifted, batch[:, 1:, None], -1)[..., 0]
        for message, ids, row in zip(messages, documents, losses):
            of_document = row[: len(ids) - 1]
            producer.produce(arguments.out, key=message.key(), value=of_document.astype("<f4").tobytes())
            loss_sum += float(of_document.sum(dtype=np.float64))
            predicted += len(of_document)
            tokens += len(ids)
        padded += batch.size
        producer.flush()
        consumer.commit(asynchronous=False)
        done += len(messages)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu,
                "tokens": tokens,
                "padded_tokens": padded,
                "mean_loss": loss_sum / predicted,
            }
        )
    )
    consumer.close()


if __name__ == "__main__":
    main()
