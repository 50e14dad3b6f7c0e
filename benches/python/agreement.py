"""Losses of `sluiced model score` against transformers in float64 with the original weights, on the same tokens.

    sluiced model score --model-path $(ops/smollm2) ... TEXT | agreement.py $(ops/smollm2 --checkpoint)

Give documents that fit the window: of longer ones, transformers would see more at once.
Prints one JSON object.
"""

import json
import sys

import torch
import transformers
from torch.nn import functional


def main() -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64).eval()
    worst, ours, theirs, count = 0.0, 0.0, 0.0, 0
    for line in sys.stdin:
        document = json.loads(line)
        ids = torch.tensor([document["tokens"]])
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        exact = functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        scored = torch.tensor(document["losses"][1:], dtype=torch.float64)
        worst = max(worst, (scored - exact).abs().max().item())
        ours, theirs, count = ours + scored.sum().item(), theirs + exact.sum().item(), count + len(exact)
    result = {
        "predicted_tokens": count,
        "mean_loss": ours / count,
        "mean_loss_float64": theirs / count,
        "worst_difference_nats": worst,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
