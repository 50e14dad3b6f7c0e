"""Tiny token classifiers as ONNX models, and the probability of a class at each token from transformers in float64.

Run by tests/golden/exports/remake. Writes a folder a model (`model.onnx`, `config.json`, `tokenizer.json`) and
`classifiers.json`.
"""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import transformers
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "tiny-llama/tokenizer.json"
LOSSES = HERE.parent / "losses.json"
WINDOW = 64
STRIDE = 32
RULE = (
    "Windows of `window` tokens start at 0, stride, 2 stride, ... while start + window < n, and the last starts at"
    " max(0, n - window). Each is fed alone. Where the model sees both sides, a token's probability comes from the window in"
    " which the shorter of its two contexts is longest, the document's ends not counting, and from the earlier of equals; else"
    " from the first window that holds it."
)
SHAPE = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
# Wide enough that what a token sees moves its class.
COMMON = {**SHAPE, "max_position_embeddings": WINDOW, "initializer_range": 0.3}


@dataclass(frozen=True)
class Classifier:
    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    label: str
    both_sides: bool
    # Logits of [batch, length] instead of [batch, length, 1].
    flat: bool = False


def bert(labels: int) -> nn.Module:
    return transformers.BertForTokenClassification(transformers.BertConfig(**COMMON, num_labels=labels))


def llama(labels: int) -> nn.Module:
    return transformers.LlamaForTokenClassification(
        transformers.LlamaConfig(**COMMON, num_labels=labels, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    )


ENCODER = ("input_ids", "attention_mask", "token_type_ids")
CLASSIFIERS = [
    Classifier("tiny-bert", lambda: bert(3), ENCODER, ("O", "toxic", "code"), "toxic", True),
    Classifier("tiny-llama", lambda: llama(2), ENCODER[:2], ("O", "toxic"), "toxic", False),
    Classifier("tiny-bert-single", lambda: bert(1), ENCODER, ("toxic",), "toxic", True, flat=True),
]


class Logits(nn.Module):
    def __init__(self, model: nn.Module, classifier: Classifier) -> None:
        super().__init__()
        self.model = model
        self.classifier = classifier

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.classifier.inputs, inputs))
        if not self.classifier.both_sides:
            # The whole mask is made here, because what transformers makes it with (vmap) is not exportable.
            positions = torch.arange(given["input_ids"].shape[1])
            allowed = (positions[None, :] <= positions[:, None]) & (given["attention_mask"][:, None, None, :] > 0)
            given["attention_mask"] = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        logits: Tensor = self.model(**given).logits
        return logits.squeeze(-1) if self.classifier.flat else logits


def export(classifier: Classifier, model: nn.Module, path: Path) -> None:
    ids = torch.randint(1, 512, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    offered = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter says at length that it is one
        torch.onnx.export(
            Logits(model, classifier).eval(),
            tuple(offered[name] for name in classifier.inputs),
            str(path),
            input_names=list(classifier.inputs),
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*classifier.inputs, "logits")},
            opset_version=17,
            dynamo=False,
        )


def window_starts(length: int) -> list[int]:
    starts = []
    start = 0
    while start + WINDOW < length:
        starts.append(start)
        start += STRIDE
    return [*starts, max(0, length - WINDOW)]


def probabilities(classifier: Classifier, model: nn.Module, tokens: list[int]) -> list[float]:
    length = len(tokens)
    windows = [(start, min(start + WINDOW, length)) for start in window_starts(length)]
    of_window = []
    index = classifier.labels.index(classifier.label)
    for start, end in windows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[start:end]])).logits[0]
        values = logits[:, 0].sigmoid() if len(classifier.labels) == 1 else logits.softmax(dim=-1)[:, index]
        of_window.append(values.tolist())

    def context(at: int, start: int, end: int) -> float:
        if not classifier.both_sides:
            return -start
        before = float("inf") if start == 0 else at - start
        after = float("inf") if end == length else end - 1 - at
        return min(before, after)

    chosen = []
    for at in range(length):
        holding = [number for number, (start, end) in enumerate(windows) if start <= at < end]
        best = max(holding, key=lambda number: context(at, *windows[number]))
        chosen.append(of_window[best][at - windows[best][0]])
    return chosen


def main() -> None:
    documents = [document["tokens"] for document in json.loads(LOSSES.read_text())["models"]["tiny-llama"]]
    documents.insert(0, documents[0][:1])
    golden = {"window": WINDOW, "stride": STRIDE, "rule": RULE, "models": {}}
    for seed, classifier in enumerate(CLASSIFIERS):
        transformers.set_seed(seed)
        model = classifier.make().eval()
        model.config.id2label = dict(enumerate(classifier.labels))
        model.config.label2id = {label: index for index, label in enumerate(classifier.labels)}
        model.config.architectures = [type(model).__name__]
        folder = HERE / classifier.name
        folder.mkdir(exist_ok=True)
        export(classifier, model.float(), folder / "model.onnx")
        (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
        shutil.copy(TOKENIZER, folder / "tokenizer.json")
        exact = model.double()
        golden["models"][classifier.name] = {
            "class": classifier.label,
            "both_sides": classifier.both_sides,
            "documents": [
                {"tokens": tokens, "probabilities": probabilities(classifier, exact, tokens)} for tokens in documents
            ],
        }
    (HERE / "classifiers.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
