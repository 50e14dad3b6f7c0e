"""The forward of a causal language model of transformers, when it is given a micro-batch to choose tokens from.

DDP counts gradients by the forward of the module that it wraps, and FSDP has parameters whole inside of it, so the loss has
to be computed there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sluice_feed._core import ConfigurationError
from sluice_feed.torch import SelectiveLoss, selective_loss, token_losses
from sluice_feed.transformers.micro_batch import MicroBatch

#: The argument of the forward that asks for a selective loss.
ARGUMENT = "selective"
#: Tokens that the check of the head looks at.
CHECKED_TOKENS = 8


class SelectiveForward:
    """In the place of `model.forward`: given a :class:`MicroBatch` it returns its loss, and else what it always did.

    Whole logits never exist: the backbone gives hidden states, and `selective_loss` runs the head in blocks.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # Where inspect.signature looks.
        self.__wrapped__ = model.forward
        self.is_checked = False

    def __call__(self, *args: Any, selective: MicroBatch | None = None, **kwargs: Any) -> Any:
        if selective is None:
            return self.__wrapped__(*args, **kwargs)
        backbone, head = _parts(self.model)
        batch = selective.to(head.weight.device)
        if not self.is_checked:
            self._check_head(batch, backbone, head)
            self.is_checked = True
        return _loss(self.model, batch, backbone, head)

    @torch.no_grad()
    def _check_head(self, batch: MicroBatch, backbone: nn.Module, head: nn.Linear) -> None:
        """Refuses a model that makes its logits otherwise than `selective_loss` does."""
        tokens = batch.input_ids[:1, :CHECKED_TOKENS]
        device = tokens.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # The same dropout in both.
            torch.manual_seed(0)
            expected = self.__wrapped__(input_ids=tokens, use_cache=False).logits.float()
            torch.manual_seed(0)
            hidden = backbone(input_ids=tokens, use_cache=False)[0]
        is_half = torch.is_autocast_enabled(device.type) or hidden.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            logits = nn.functional.linear(hidden.float(), head.weight.float(), bias)
        scale, softcap = _scale_and_softcap(self.model.config)
        logits = logits * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        # A model that has broken down is not for this check to find.
        finite = expected.isfinite()
        allowed = (0.03 if is_half else 1e-3) * expected[finite].abs().amax() + 1e-6 if finite.any() else torch.inf
        if logits.shape != expected.shape or bool(((logits - expected).abs() > allowed).any()):
            raise ConfigurationError(
                f"{type(self.model).__name__} makes its logits of hidden states otherwise than by one matrix, a bias, a"
                " scale and a soft-cap; the selective loss would be of other logits. Compute per-token losses yourself, and"
                " use sluice_feed.torch.select and masked_mean"
            )


def install(model: Any) -> None:
    """Gives a model a :class:`SelectiveForward`, if it has none.

    Args:
        model: of transformers, without the wrappers of DDP or FSDP; or a PEFT model around one.

    Raises:
        ConfigurationError: it is not a decoder with a linear head, or adds losses of its own.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if is_installed(model):
        return
    _parts(model)
    if getattr(model.config, "output_router_logits", False):
        raise ConfigurationError(
            "the model adds the loss of its router (output_router_logits=True), which the selective loss does not know: set"
            " config.output_router_logits to False, or balance experts without a loss"
        )
    model.forward = SelectiveForward(model)


def is_installed(model: Any) -> bool:
    """Whether a call of the model reaches a :class:`SelectiveForward`, beneath what accelerate puts around it."""
    forward = model.forward
    while forward is not None:
        if isinstance(forward, SelectiveForward):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _parts(model: Any) -> tuple[nn.Module, nn.Linear]:
    backbone = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    is_decoder = backbone is not model and not getattr(model.config, "is_encoder_decoder", False)
    # A layer with adapters is no longer one matrix.
    if not is_decoder or not isinstance(head, nn.Linear):
        raise ConfigurationError(
            f"{type(model).__name__} is not a causal language model with a backbone and one linear head"
            f" (its head is a {type(head).__module__}.{type(head).__name__}); give an AutoModelForCausalLM without"
            " an adapter on the head"
        )
    return backbone, head


def _scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """The names that models of transformers give them: Cohere, Falcon-H1 and Granite; Gemma."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return scale, getattr(config, "final_logit_softcapping", None)


def _loss(model: Any, batch: MicroBatch, backbone: nn.Module, head: nn.Linear) -> SelectiveLoss | tuple[Tensor, ...]:
    hidden = backbone(**_inputs(model, batch))[0].view(*batch.labels.shape, -1)
    scale, softcap = _scale_and_softcap(model.config)
    of_head: dict[str, Any] = {"bias": head.bias, "logit_scale": scale, "logit_softcap": softcap}
    weight = head.weight
    if batch.only_token_losses:
        if batch.selection is not None and batch.selection.needs_entropy:
            return token_losses(hidden, weight, batch.labels, return_entropy=True, **of_head)
        return (token_losses(hidden, weight, batch.labels, **of_head),)
    is_chosen = batch.kept is not None
    return selective_loss(
        hidden,
        weight,
        batch.labels,
        batch.signals.get("reference_loss"),
        reference_entropy=batch.signals.get("reference_entropy"),
        history_loss=batch.signals.get("history_loss"),
        attribute=batch.signals.get("attribute"),
        selection=None if is_chosen else batch.selection,
        kept=batch.kept,
        divisor=batch.divisor,
        number=batch.number,
        step=batch.step,
        group=batch.group,
        **of_head,
    )


def _inputs(model: Any, batch: MicroBatch) -> dict[str, Any]:
    """What the backbone is called with, so that packed documents do not see each other.

    No attention_mask and no cache: transformers then reads the boundaries from position_ids, in every row. FlashAttention
    reads them from position_ids in a batch of ONE row alone, so there all rows become one, with its boundaries given.
    """
    implementation = getattr(model.config, "_attn_implementation", None) or ""
    given: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        given["position_ids"] = batch.position_ids
    if "flash" not in implementation or batch.position_ids is None:
        return given
    boundaries, longest = batch.cu_seqlens, batch.max_seqlen
    if boundaries is None or longest is None:
        boundaries, longest = _boundaries(batch.position_ids)
    return {
        "input_ids": batch.input_ids.view(1, -1),
        "position_ids": batch.position_ids.view(1, -1),
        "use_cache": False,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _boundaries(position_ids: Tensor) -> tuple[Tensor, int]:
    """Where positions do not go on by one, in row-major order, int32, with the end; and the longest of the parts."""
    goes_on = torch.zeros_like(position_ids, dtype=torch.bool)
    goes_on[:, 1:] = position_ids[:, 1:] == position_ids[:, :-1] + 1
    starts = (~goes_on).view(-1).nonzero().view(-1)
    ends = torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)
    return ends, int(ends.diff().max())
