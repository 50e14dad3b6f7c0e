"""A matrix of tiny causal models: dtype x inputs x id type x head x opset, with losses from numpy in float64.

    flavours.py OUT     writes OUT/NAME/model.onnx, config.json, and OUT/golden.json

Each is one attention layer between an embedding and a head, its weights on a grid that bfloat16 holds exactly, so that
float64 computes the very same model. Made at test time; nothing of it is committed.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import onnx
from onnx import TensorProto, helper

VOCABULARY, WIDTH, CONTEXT = 40, 16, 32
LENGTHS = (2, 3, 9, 32)
GRID = 64
CAP, SCALE = 2.0, 0.25
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
IDS = {"int32": TensorProto.INT32, "int64": TensorProto.INT64}
INPUTS = ("ids", "mask", "positions", "past")
HEADS = ("plain", "tied", "bias", "scale", "softcap", "gemm-reshape", "widened", "mask-padding")
OPSETS = (13, 17, 21)


@dataclass(frozen=True)
class Flavour:
    dtype: str
    ids: str
    inputs: str
    head: str
    opset: int

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.ids}-{self.inputs}-{self.head}-{self.opset}"


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    def grid(*shape: int, size: float) -> np.ndarray:
        return np.clip(np.round(rng.normal(0, size, shape) * GRID) / GRID, -1.984375, 1.984375)

    return {
        "embedding": grid(VOCABULARY, WIDTH, size=0.6),
        "position": grid(CONTEXT, WIDTH, size=0.3),
        **{name: grid(WIDTH, WIDTH, size=WIDTH**-0.5) for name in ("query", "key", "value", "out")},
        "head": grid(WIDTH, VOCABULARY, size=0.4),
        "bias": grid(VOCABULARY, size=0.5),
    }


def losses(w: dict[str, np.ndarray], head: str, tokens: list[int]) -> list[float]:
    """The model in float64."""
    x = w["embedding"][tokens] + w["position"][: len(tokens)]
    scores = (x @ w["query"]) @ (x @ w["key"]).T / np.sqrt(WIDTH)
    scores[np.triu_indices(len(tokens), 1)] = -np.inf
    attention = np.exp(scores - scores.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    x = x + attention @ (x @ w["value"]) @ w["out"]
    logits = x @ (w["embedding"].T if head == "tied" else w["head"])
    if head in ("bias", "gemm-reshape"):
        logits = logits + w["bias"]
    elif head == "scale":
        logits = logits * SCALE
    elif head == "softcap":
        logits = np.tanh(logits / CAP) * CAP
    elif head == "mask-padding":
        logits[:, -2:] = -1e4
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [-float(log_probabilities[i, token]) for i, token in enumerate(tokens[1:])]


class Builder:
    """Nodes and constants of one flavour."""

    def __init__(self, flavour: Flavour, w: dict[str, np.ndarray]) -> None:
        self.flavour, self.w = flavour, w
        self.dtype = TYPES[flavour.dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, out: Optional[str] = None, **attributes: object) -> str:
        out = out or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=f"/{kind}_{len(self.nodes)}", **attributes))
        return out

    def ints(self, *values: int, scalar: bool = False) -> str:
        name = f"ints_{'_'.join(map(str, values))}_{scalar}"
        shape = [] if scalar else [len(values)]
        self.constants[name] = helper.make_tensor(name, TensorProto.INT64, shape, values)
        return name

    def number(self, value: float) -> str:
        name = f"number_{value}"
        self.constants[name] = helper.make_tensor(name, self.dtype, [], [value])
        return name

    def weight(self, name: str) -> str:
        values = self.w[name]
        self.constants[name] = helper.make_tensor(name, self.dtype, values.shape, values.flatten())
        return name

    def length(self) -> str:
        return self.op("Gather", self.op("Shape", "input_ids"), self.ints(1))

    def hidden(self) -> str:
        """[batch, sequence, width], as the exporters spell it."""
        if self.flavour.inputs in ("positions", "past"):
            positions = "position_ids"
        else:
            length = self.op("Squeeze", self.length())
            positions = self.op("Range", self.ints(0, scalar=True), length, self.ints(1, scalar=True))
        x = self.op("Add", self.op("Gather", self.weight("embedding"), "input_ids"),
                    self.op("Gather", self.weight("position"), positions))
        query, key, value = (self.op("MatMul", x, self.weight(name)) for name in ("query", "key", "value"))
        if self.flavour.inputs == "past":
            key = self.with_past(key, "key")
            value = self.with_past(value, "value")
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 2, 1]))
        scores = self.op("Mul", scores, self.number(WIDTH**-0.5))
        low = self.number(-1e4)
        square = self.op("Concat", self.length(), self.length(), axis=0)
        steps = self.op("Range", self.ints(0, scalar=True), self.op("Squeeze", self.length()),
                        self.ints(1, scalar=True))
        later = self.op("Less", self.op("Unsqueeze", steps, self.ints(1)), self.op("Unsqueeze", steps, self.ints(0)))
        scores = self.op("Add", scores, self.op("Where", later, self.op("Expand", low, square), self.number(0.0)))
        if self.flavour.inputs != "ids":
            hidden_keys = self.op("Equal", self.op("Unsqueeze", "attention_mask", self.ints(1)), self.zero_id())
            scores = self.op("Where", hidden_keys, low, scores)
        attended = self.op("MatMul", self.op("Softmax", scores, axis=-1), value)
        return self.op("Add", x, self.op("MatMul", attended, self.weight("out")))

    def zero_id(self) -> str:
        self.constants["zero_id"] = helper.make_tensor("zero_id", IDS[self.flavour.ids], [1], [0])
        return "zero_id"

    def with_past(self, new: str, what: str) -> str:
        """[batch, 1, past, width] in front of [batch, sequence, width]."""
        new = self.op("Unsqueeze", new, self.ints(1))
        whole = self.op("Concat", f"past_key_values.0.{what}", new, axis=2, out=f"present.0.{what}")
        return self.op("Squeeze", whole, self.ints(1))

    def logits(self, hidden: str) -> None:
        head = self.flavour.head
        if head == "gemm-reshape":
            shape = self.op("Concat", self.op("Shape", "input_ids"), self.ints(VOCABULARY), axis=0)
            flat = self.op("Reshape", hidden, self.ints(-1, WIDTH))
            flat = self.op("Gemm", flat, self.weight("head"), self.weight("bias"))
            self.op("Reshape", flat, shape, out="logits")
            return
        if head == "tied":
            self.op("MatMul", hidden, self.op("Transpose", "embedding", perm=[1, 0]), out="logits")
            return
        plain = self.op("MatMul", hidden, self.weight("head"), out="logits" if head == "plain" else None)
        if head == "bias":
            self.op("Add", self.weight("bias"), plain, out="logits")
        elif head == "scale":
            self.op("Mul", plain, self.number(SCALE), out="logits")
        elif head == "softcap":
            capped = self.op("Tanh", self.op("Div", plain, self.number(CAP)))
            self.op("Mul", capped, self.number(CAP), out="logits")
        elif head == "widened":
            self.op("Cast", plain, to=TensorProto.FLOAT, out="logits")
        elif head == "mask-padding":
            real = [index < VOCABULARY - 2 for index in range(VOCABULARY)]
            self.constants["real"] = helper.make_tensor("real", TensorProto.BOOL, [VOCABULARY], real)
            self.op("Where", "real", plain, self.number(-1e4), out="logits")

    def model(self) -> onnx.ModelProto:
        self.logits(self.hidden())
        ids = IDS[self.flavour.ids]
        names = {"ids": 1, "mask": 2, "positions": 3, "past": 3}[self.flavour.inputs]
        inputs = [
            helper.make_tensor_value_info(name, ids, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask", "position_ids")[:names]
        ]
        logits_type = TensorProto.FLOAT if self.flavour.head == "widened" else self.dtype
        outputs = [helper.make_tensor_value_info("logits", logits_type, ["batch", "sequence", VOCABULARY])]
        if self.flavour.inputs == "past":
            for what in ("key", "value"):
                shape = ["batch", 1, "past_sequence_length", WIDTH]
                inputs.append(helper.make_tensor_value_info(f"past_key_values.0.{what}", self.dtype, shape))
                shape = ["batch", 1, "total_sequence_length", WIDTH]
                outputs.append(helper.make_tensor_value_info(f"present.0.{what}", self.dtype, shape))
        graph = helper.make_graph(self.nodes, "flavour", inputs, outputs, list(self.constants.values()))
        opset = helper.make_opsetid("", self.flavour.opset)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def main() -> None:
    out = Path(sys.argv[1])
    rng = np.random.default_rng(3)
    w = weights(rng)
    documents = [rng.integers(0, VOCABULARY - 2, length).tolist() for length in LENGTHS]
    exact = {head: [losses(w, head, document) for document in documents] for head in HEADS}
    golden: dict[str, object] = {"documents": documents, "models": {}}
    for axes in itertools.product(TYPES, IDS, INPUTS, HEADS, OPSETS):
        flavour = Flavour(*axes)
        folder = out / flavour.name
        folder.mkdir(parents=True)
        onnx.save(Builder(flavour, w).model(), folder / "model.onnx")
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": CONTEXT}))
        golden["models"][flavour.name] = {"dtype": flavour.dtype, "losses": exact[flavour.head]}
    (out / "golden.json").write_text(json.dumps(golden))


if __name__ == "__main__":
    main()
