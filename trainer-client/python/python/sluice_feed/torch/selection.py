"""The choice of tokens on tensors: equal, bit by bit, to the Rust function behind ``sluice_feed.Selection.select``.

What is chosen follows Rho-1 (arXiv 2404.07965, section 2.2 and equation 2). Scores are compared in float32, by integer
keys in their order; of equal scores the earlier position wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Callable, Optional, Union, cast

import numpy as np
import torch
from torch import Tensor

from sluice_feed._core import ConfigurationError, Selection
from sluice_feed.selection import NO_ATTRIBUTE
from sluice_feed.torch.distributed import Ranks
from sluice_feed.torch.running import add_lowest, running_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: One micro-batch: ``loss``, ``entropy``, ``history_loss``, ``reference_loss``, ``reference_entropy`` in nats, and
#: ``attribute``, tensors of one shape on one device, NaN where there is none. What the score does not look at may be
#: absent or ``None``.
Signals = Mapping[str, Optional[Tensor]]

#: Scores that rank twice, by reference loss and by reference entropy.
TWO_RANKINGS = ("intersection", "union")
#: Where the 16-bit digits of a key begin, highest first.
SCORE_DIGITS = (16, 0)
DRAW_DIGITS = (48, 32, 16, 0)
DIGIT = 1 << 16
#: Of the keys of scores; those of scores above 0 are higher.
KEY_OF_ZERO = 1 << 31

#: A share, or the smallest and the largest share of the rule "adaptive".
Share = Union[float, tuple[float, float]]


# A compiler may drop the addition of zero and fuse a product with a sum, and so choose otherwise.
@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def select(
    signals: Sequence[Signals],
    selection: Selection,
    *,
    row_len: int,
    step: int,
    numbers: Sequence[int | None] | None = None,
    group: ProcessGroup | None = None,
) -> list[Tensor]:
    """The tokens that a step learns from: one mask (bool, shape of ``loss``, on its device) for each micro-batch.

    With scope ``batch`` the tokens of all micro-batches of all ranks of ``group`` compete, and this is a collective:
    every rank calls it once a step, also one that has no micro-batch. They agree on the lowest kept score by histograms
    of the scores' bits, so no rank sees another's scores, and nothing is sorted. With the other scopes, and while every
    token is kept or a threshold decides, ranks do not communicate. With scope ``running-quantile`` call :func:`end_step`
    when the step is done.

    Args:
        signals: The micro-batches of this rank. See :data:`Signals`.
        selection: The settings: a ``sluice_feed.Selection``.
        row_len: Length of a packed sequence, in positions; what competes where the scope is ``sequence``.
        step: Step of the run, from 1.
        numbers: Number of each micro-batch among those of all ranks in this step, from 0: of equal scores the
            lower number wins, and draws are named by it. ``None`` for one means that it only fills up this rank's
            share, and nothing of it is kept. By default rank ``r`` of ``n`` has ``r``, ``r + n``, ``r + 2 n``...
        group: The ranks. ``None``: all of them if ``torch.distributed`` is initialised, else this process.

    Raises:
        ConfigurationError: A list that the score looks at is missing or of another shape; numbers do not fit; the score is
            ``attribute`` and no token with a loss has one.
    """
    if step < 1:
        raise ConfigurationError("steps are counted from 1: give enumerate(stream, start=1)")
    if row_len < 1:
        raise ConfigurationError(f"row_len must be at least 1 position, not {row_len}")
    ranks = Ranks(group)
    numbers = _checked_numbers(numbers, len(signals), ranks)
    is_below = selection.attribute_keep == "below"
    scores = [_scores(given, selection.score, index, is_below) for index, given in enumerate(signals)]
    if selection.score == "attribute":
        _check_attributes(signals, scores, numbers)
    for own, number in zip(scores, numbers):
        if number is None:
            own.fill_(torch.nan)
    keep = selection.keep_at(step)

    lowest: list[list[Tensor]] = []

    def rank(scores: list[Tensor], keep: float | None, ranking: int) -> list[Tensor]:
        if selection.threshold is not None and keep is None:
            threshold = -selection.threshold if is_below else selection.threshold
            return [own >= threshold for own in scores]
        eligible = [~own.isnan() for own in scores]
        if keep is not None and keep >= 1.0:
            return eligible
        share: Share = cast(tuple[float, float], selection.adaptive) if keep is None else keep
        is_drawn = selection.score == "random"
        keys = (
            [_draws(own, selection, step, number) for own, number in zip(eligible, numbers)]
            if is_drawn
            else [_order_preserving(own) for own in scores]
        )
        if selection.scope == "batch":
            digits = DRAW_DIGITS if is_drawn else SCORE_DIGITS
            return _highest_of_batch(keys, eligible, share=share, digits=digits, numbers=numbers, ranks=ranks)
        lengths = [row_len if selection.scope == "sequence" else len(own) for own in keys]
        highest = [_highest_of_each(own, is_one, share, length) for own, is_one, length in zip(keys, eligible, lengths)]
        if selection.scope != "running-quantile":
            return highest
        running = selection.running_thresholds[ranking]
        chosen = [running_choice(own, mask, running) for own, mask in zip(scores, highest)]
        lowest.append([low for _, low in chosen])
        return [mask for mask, _ in chosen]

    kept = rank(scores, keep, 0)
    if selection.score in TWO_RANKINGS:
        is_warm = step > selection.warmup_steps
        entropy_keep = selection.entropy_keep if is_warm and selection.entropy_keep is not None else keep
        entropies = [_scores(given, "reference-entropy", index) for index, given in enumerate(signals)]
        # Positions that lack a reference loss cannot be chosen for their entropy either.
        entropies = [_only_where(score, entropy) for score, entropy in zip(scores, entropies)]
        combine: Callable[[Tensor, Tensor], Tensor] = torch.logical_or if selection.score == "union" else torch.logical_and
        kept = [combine(one, other) for one, other in zip(kept, rank(entropies, entropy_keep, 1))]
    if lowest:
        add_lowest(selection, lowest)
    return [mask.view(_loss(given, index).shape) for index, (mask, given) in enumerate(zip(kept, signals))]


def _checked_numbers(numbers: Sequence[int | None] | None, micro_batches: int, ranks: Ranks) -> Sequence[int | None]:
    if numbers is None:
        return [ranks.rank + index * ranks.size for index in range(micro_batches)]
    if len(numbers) != micro_batches:
        raise ConfigurationError(f"there are {micro_batches} micro-batches, but {len(numbers)} numbers of micro-batches")
    given = [number for number in numbers if number is not None]
    if any(number < 0 for number in given) or len(set(given)) < len(given):
        raise ConfigurationError(f"micro-batches are numbered from 0, each by a number of its own, not {list(numbers)}")
    return numbers


def _check_attributes(signals: Sequence[Signals], scores: Sequence[Tensor], numbers: Sequence[int | None]) -> None:
    """Refuses micro-batches whose tokens all lack an attribute: nothing would be kept, step after step."""
    pairs = [
        (score, _loss(given, index).reshape(-1))
        for index, (score, given, number) in enumerate(zip(scores, signals, numbers))
        if number is not None
    ]
    if not pairs:
        return
    has_loss = torch.stack([(~loss.isnan()).any() for _, loss in pairs]).any()
    has_score = torch.stack([(~score.isnan()).any() for score, _ in pairs]).any()
    if bool(has_loss & ~has_score):
        raise ConfigurationError(NO_ATTRIBUTE)


def _loss(signals: Signals, index: int) -> Tensor:
    loss = signals.get("loss")
    if loss is None:
        raise ConfigurationError(f"micro-batch {index} has no signal 'loss', which every selection needs")
    return loss


def _scores(signals: Signals, score: str, index: int, is_below: bool = False) -> Tensor:
    """The score of each position, higher first, ``[positions]`` in float32; NaN where it cannot be chosen.

    In nats, but for an attribute, of which the lowest come first with ``is_below``. Where two rankings decide, that of the
    reference loss; for draws the excess loss, whose positions they share, or the loss where there is an attribute alone.
    """
    loss = _loss(signals, index)

    def signal(name: str) -> Tensor:
        values = signals.get(name)
        if values is None:
            raise ConfigurationError(f"score {score!r} needs the signal {name!r}, which micro-batch {index} does not have")
        if values.shape != loss.shape:
            raise ConfigurationError(
                f"{name!r} of micro-batch {index} has the shape {tuple(values.shape)}, but 'loss' has"
                f" {tuple(loss.shape)}; both hold one value for each position"
            )
        if values.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(
                f"{name!r} of micro-batch {index} is {values.dtype}, which rounds losses to hundredths; give float32."
                " If it was float32, FSDP2 has cast it: use MixedPrecisionPolicy(..., cast_forward_inputs=False)"
            )
        return values.detach().to(loss.device, torch.float32).reshape(-1)

    current = signal("loss")
    if score == "excess":
        return current - signal("reference_loss")
    if score == "random":
        excess = current - signal("reference_loss")
        if signals.get("attribute") is None:
            return excess
        return torch.where(excess.isnan() & ~signal("attribute").isnan(), current, excess)
    if score == "improvement":
        return signal("history_loss") - current
    if score in TWO_RANKINGS:
        values = _only_where(signal("reference_entropy"), -signal("reference_loss"))
    elif score in ("reference-loss", "reference-entropy"):
        values = -signal(score.replace("-", "_"))
    elif is_below:
        values = -signal(score)
    else:
        values = signal(score)
    return _only_where(current, values)


def _only_where(target: Tensor, values: Tensor) -> Tensor:
    """``values``, and NaN where ``target`` is."""
    return values.masked_fill(target.isnan(), torch.nan)


def _order_preserving(scores: Tensor) -> Tensor:
    """The bits of float32 numbers as int64 from 0 to 2^32 - 1, changed so that they order as the numbers do."""
    # Adding zero turns -0.0 into 0.0, whose bits differ.
    bits = (scores + 0.0).view(torch.int32).to(torch.int64) & 0xFFFF_FFFF
    return torch.where(bits >> 31 == 1, 0xFFFF_FFFF - bits, bits | 0x8000_0000)


def _draws(eligible: Tensor, selection: Selection, step: int, number: int | None) -> Tensor:
    """Draws (the bits of uint64 in int64) for the positions that can be chosen, made on the host."""
    if number is None:
        return torch.zeros_like(eligible, dtype=torch.int64)
    drawn = selection.draws(eligible.cpu().numpy(), step, number)
    return torch.from_numpy(drawn.view(np.int64)).to(eligible.device)


def _count(share: Share, eligible: Tensor, positive: Tensor) -> Tensor:
    """``floor(share * eligible + 0.5)``, and at least one of any; of two bounds as many as are positive, within them."""
    if isinstance(share, tuple):
        smallest, largest = (_count(bound, eligible, positive) for bound in share)
        return torch.minimum(torch.maximum(positive, smallest), largest)
    rounded = (eligible.to(torch.float64) * share + 0.5).floor().to(torch.int64)
    return torch.minimum(torch.maximum(rounded, eligible.clamp(max=1)), eligible)


def _highest_of_each(keys: Tensor, eligible: Tensor, share: Share, row_len: int) -> Tensor:
    """Mask of the share with the highest keys of each run of ``row_len`` positions."""
    length = len(keys)
    if length == 0:
        return eligible
    missing = -length % row_len
    keys = torch.nn.functional.pad(keys, (0, missing)).view(-1, row_len)
    eligible = torch.nn.functional.pad(eligible, (0, missing)).view(-1, row_len)
    # Keys of 64 bits wrap around zero; without their highest bit turned over they would not order as they should.
    # Those of 32 bits stay in their order.
    turned = keys ^ torch.iinfo(torch.int64).min
    by_key = turned.sort(dim=1, descending=True, stable=True).indices
    # A key has no value left to say "cannot be chosen", so a second stable sort puts these last.
    by_both = by_key.gather(1, eligible.gather(1, by_key).sort(dim=1, descending=True, stable=True).indices)
    count = _count(share, eligible.sum(dim=1), (eligible & (keys >= KEY_OF_ZERO)).sum(dim=1))
    is_kept = torch.arange(row_len, device=keys.device) < count[:, None]
    return torch.zeros_like(eligible).scatter_(1, by_both, is_kept).view(-1)[:length]


def _highest_of_batch(
    keys: list[Tensor],
    eligible: list[Tensor],
    *,
    share: Share,
    digits: Sequence[int],
    numbers: Sequence[int | None],
    ranks: Ranks,
) -> list[Tensor]:
    """Masks of the share with the highest keys of all micro-batches of all ranks.

    Digit by digit, from the highest: positions above the digit in which the last kept key lies are kept, those below it
    are not, and those in it go on to the next digit. After the last they have the same key, and the first of them are
    kept, in the order of micro-batches and positions.
    """
    device = keys[0].device if keys else ranks.device()
    flat = torch.cat([*keys, torch.empty(0, dtype=torch.int64, device=device)])
    undecided = torch.cat([*eligible, torch.empty(0, dtype=torch.bool, device=device)])
    kept = torch.zeros_like(undecided)
    wanted: Tensor | None = None
    for shift in digits:
        digit = (flat >> shift) & (DIGIT - 1)
        histogram = torch.zeros(DIGIT, dtype=torch.int64, device=device)
        histogram = ranks.sum(histogram.index_add_(0, digit, undecided.to(torch.int64)))
        if wanted is None:
            # The highest digit of a score's key has its highest bit where the score is at least 0.
            wanted = _count(share, histogram.sum(), histogram[DIGIT // 2 :].sum())
        # How many keys have each digit or a higher one: it falls from left to right.
        at_least = histogram.flip(0).cumsum(0).flip(0)
        boundary = ((at_least >= wanted).sum() - 1).view(1)
        wanted = wanted - (at_least - histogram).index_select(0, boundary).view(())
        kept |= undecided & (digit > boundary)
        undecided &= digit == boundary
    assert wanted is not None
    sizes = [len(own) for own in keys]
    ties = torch.split(undecided, sizes)
    return [
        own | (tied & (tied.cumsum(0) <= quota))
        for own, tied, quota in zip(torch.split(kept, sizes), ties, _quotas(ties, wanted, numbers, ranks))
    ]


def _quotas(ties: Sequence[Tensor], wanted: Tensor, numbers: Sequence[int | None], ranks: Ranks) -> Sequence[Tensor]:
    """How many of its ties each micro-batch keeps, so that ``wanted`` are kept of all, of the lowest numbers first."""
    own = torch.zeros(len(ties), 2, dtype=torch.int64, device=wanted.device)
    for index, (tied, number) in enumerate(zip(ties, numbers)):
        own[index, 0] = -1 if number is None else number
        own[index, 1] = tied.sum()
    everyones = ranks.gather(own)
    if ranks.size > 1:
        listed = everyones[everyones[:, 1] > 0, 0].tolist()
        if len(set(listed)) < len(listed):
            raise ConfigurationError(
                f"several ranks have a micro-batch of the same number (of {sorted(listed)}); numbers must be those"
                " among the micro-batches of all ranks in this step"
            )
    is_before = everyones[:, 0] < own[:, :1]
    before = (is_before * everyones[:, 1]).sum(dim=1)
    return list((wanted - before).unbind(0))
