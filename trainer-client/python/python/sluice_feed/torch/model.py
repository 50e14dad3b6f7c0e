"""A backbone and its head as one module whose forward is the loss."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from sluice_feed.torch.loss import SelectiveLoss, selective_loss, token_losses


class SelectiveModel(nn.Module):
    """A backbone and its head, whose forward is :func:`~sluice_feed.torch.selective_loss`.

    DDP counts gradients by its own forward, and FSDP2 makes parameters whole in the forward of the module that has
    them, so the loss has to be computed inside one. Under FSDP2 apply ``fully_shard`` to the layers of the backbone and
    then to this module, which makes the head whole for its own forward and backward passes; not to the head by itself.
    A tied head is the embedding's parameter, which must then be in this module's group too::

        model = SelectiveModel(llama.model, llama.lm_head)   # of transformers' LlamaForCausalLM
        for layer in llama.model.layers:
            fully_shard(layer)
        fully_shard(model)

    Args:
        backbone: Returns hidden states ``[..., width]``, or an object with ``last_hidden_state``, or a tuple that
            begins with them.
        head: Has a ``weight`` ``[vocabulary, width]``, and a ``bias`` or none. An ``nn.Linear``.
        logit_scale: Factor of the logits.
        logit_softcap: ``c`` of ``c * tanh(logits / c)``, after the scale.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, *, logit_scale: float = 1.0, logit_softcap: float | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap

    def forward(
        self,
        labels: Tensor,
        reference_loss: Tensor | None = None,
        *,
        inputs: Any,
        only_token_losses: bool = False,
        return_entropy: bool = False,
        **options: Any,
    ) -> SelectiveLoss | Tensor | tuple[Tensor, Tensor]:
        """The loss of a micro-batch.

        Args:
            labels: ``[rows, length]`` or ``[positions]``, already shifted, -100 where nothing is predicted.
            reference_loss: In nats, shape of the labels.
            inputs: Keyword arguments of the backbone, as a dictionary.
            only_token_losses: Return :func:`~sluice_feed.torch.token_losses` of all labels, for a choice over several
                micro-batches; to be called under ``torch.no_grad()``.
            return_entropy: With ``only_token_losses``, return the entropies as well.
            options: All other arguments of :func:`~sluice_feed.torch.selective_loss`.
        """
        output = self.backbone(**inputs)
        if not isinstance(output, Tensor):
            output = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        head: dict[str, Any] = {
            "bias": getattr(self.head, "bias", None),
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }
        weight = cast(Tensor, self.head.weight)
        if not only_token_losses:
            return selective_loss(output, weight, labels, reference_loss, **head, **options)
        if not return_entropy:
            losses: Tensor = token_losses(output, weight, labels, **head)
            return losses
        return token_losses(output, weight, labels, return_entropy=True, **head)
