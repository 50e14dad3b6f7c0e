"""Reads the scored topic with nothing of Sluice but its `.proto`, and prints a JSON line for each record."""

import argparse
import json
import math
import struct
import sys
import tempfile
from pathlib import Path

from confluent_kafka import Consumer
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[2] / "schemas/proto"


def load_records_module():
    """Compiles the `.proto` as any user of another language would, and imports the result."""
    with tempfile.TemporaryDirectory() as out:
        failed = protoc.main(["protoc", f"-I{PROTO}", f"--python_out={out}", str(PROTO / "sluice/v1/records.proto")])
        if failed:
            sys.exit(f"protoc refuses {PROTO}")
        sys.path.insert(0, str(Path(out) / "sluice/v1"))
        import records_pb2

        return records_pb2


def numbers(data: bytes, code: str) -> list:
    return list(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))


def describe(records, payload: bytes) -> dict:
    scored = records.ScoredDocument()
    scored.ParseFromString(payload)
    codes = {records.LOSS_FORMAT_F32: "f", records.LOSS_FORMAT_F16: "e"}
    if scored.model_kind == records.MODEL_KIND_TOKEN_CLASSIFIER:
        attribute = scored.attribute
        said = {"class": attribute.class_name, "attribute": numbers(attribute.values, codes[attribute.format])}
    else:
        losses = numbers(scored.reference_loss, codes[scored.loss_format])
        said = {"reference_loss": [None if math.isnan(loss) else loss for loss in losses]}
    document = scored.document
    return {
        **said,
        "id": document.id,
        "source": document.source,
        "tokens": numbers(document.tokens, {2: "H", 4: "I"}[document.token_width]),
        "tokenizer": document.tokenizer_fingerprint.hex(),
        "reference_model": scored.reference_model_fingerprint.hex(),
        "window": scored.context.window,
        "stride": scored.context.stride,
        "precision": records.Precision.Name(scored.precision),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bootstrap-servers", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--count", type=int, required=True, help="records to wait for")
    parser.add_argument("--patience", type=float, default=30, help="longest wait for a record, in seconds")
    arguments = parser.parse_args()

    records = load_records_module()
    consumer = Consumer(
        {
            "bootstrap.servers": arguments.bootstrap_servers,
            "group.id": "python-reader",
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe([arguments.topic])
    for _ in range(arguments.count):
        message = consumer.poll(arguments.patience)
        if message is None:
            sys.exit(f"no record of {arguments.topic} came within {arguments.patience:.0f} s")
        if message.error():
            sys.exit(str(message.error()))
        print(json.dumps(describe(records, message.value())))
    consumer.close()


if __name__ == "__main__":
    main()
