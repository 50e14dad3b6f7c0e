"""Losses of `sluiced model score` against the original weights in float64, and beside it transformers in float32.

    sluiced model score --model-path $(ops/smollm2) ... TEXT | agreement.py $(ops/smollm2 --checkpoint)

transformers computes rotary angles in float32 whatever the model's type is, which costs more at 2,000 tokens than all the
rest; so the float64 model is given its angles in float64. Give documents that fit the window: of longer ones, transformers
would see more at once. Prints one JSON object.
"""

import json
import sys

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional


class ExactAngles(nn.Module):
    """Cosines and sines of the rotary embedding, computed in float64 and rounded to the model's type at the end."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        self.frequencies = torch.tensor(config.rope_theta, dtype=torch.float64) ** -exponents

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


def main() -> None:
    plain, half_exact, exact = (load(dtype) for dtype in (torch.float32, torch.float32, torch.float64))
    for model in (half_exact, exact):
        model.model.rotary_emb = ExactAngles(model.config)
    models = {"float64": exact, "as_it_is": plain, "exact_angles": half_exact}
    found: dict[str, list[Tensor]] = {name: [] for name in (*models, "ours")}
    for line in sys.stdin:
        document = json.loads(line)
        ids = torch.tensor([document["tokens"]])
        for name, model in models.items():
            found[name].append(losses(model, ids))
        found["ours"].append(torch.tensor(document["losses"][1:], dtype=torch.float64))
    of = {name: torch.cat(parts) for name, parts in found.items()}
    result = {
        "predicted_tokens": len(of["ours"]),
        "mean_loss": of["ours"].mean().item(),
        "mean_loss_float64": of["float64"].mean().item(),
        **differences(of["ours"] - of["float64"]),
        "transformers_float32": differences(of["as_it_is"] - of["float64"]),
        "transformers_float32_with_exact_angles": differences(of["exact_angles"] - of["float64"]),
    }
    print(json.dumps(result, indent=2))


def load(dtype: torch.dtype) -> nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Of each token but the first. The cross entropy is in float64, so that the model's own arithmetic is what shows."""
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.double(), ids[0, 1:], reduction="none")


def differences(errors: Tensor) -> dict[str, float]:
    return {
        "worst_difference_nats": errors.abs().max().item(),
        "rms_difference_nats": errors.square().mean().sqrt().item(),
    }


if __name__ == "__main__":
    main()
