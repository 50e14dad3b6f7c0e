"""Selections worked out the slow way, by sorting, with numpy: what trainer-client/src/select is held against.

    python selection.py > selection.json

Losses are drawn with many ties and with positions that predict nothing. Every case says what was kept of each
micro-batch, and at which share.
"""

import json
import math

import numpy as np

ROWS, LENGTH, MICRO_BATCHES = 3, 16, 4
STEPS, WARMUP_STEPS = 100, 10


def signals(generator):
    """One micro-batch: float32 values on a coarse grid, so that ties are common, NaN where there is none."""
    size = ROWS * LENGTH
    grid = lambda high: np.float32(generator.integers(0, high, size)) / np.float32(8)
    target = generator.random(size) < 0.85
    scored = target & (generator.random(size) < 0.95)
    hide = lambda values, shown: np.where(shown, values, np.float32("nan"))
    return {
        "loss": hide(grid(60), target),
        "entropy": hide(grid(40), target),
        "history_loss": hide(grid(60), target),
        "reference_loss": hide(grid(60), scored),
        "reference_entropy": hide(grid(40), scored),
    }


def scores(name, micro_batch):
    """Higher is kept first."""
    loss, reference = micro_batch["loss"], micro_batch["reference_loss"]
    missing = np.isnan(loss)
    value = {
        "excess": loss - reference,
        "reference-loss": -reference,
        "reference-entropy": -micro_batch["reference_entropy"],
        "loss": loss,
        "entropy": micro_batch["entropy"],
        "improvement": micro_batch["history_loss"] - loss,
    }[name]
    return np.where(missing, np.float32("nan"), value)


def share_of(eligible, keep):
    return min(max(math.floor(keep * eligible + 0.5), 1), eligible)


def highest(values, keep):
    """Indices of the `keep` share: a stable sort leaves ties in the order of their positions. Two bounds in its place keep
    as many as score at least 0, but no fewer than the first and no more than the second."""
    eligible = np.flatnonzero(~np.isnan(values))
    if len(eligible) == 0:
        return set()
    if isinstance(keep, tuple):
        smallest, largest = (share_of(len(eligible), bound) for bound in keep)
        count = min(max(int((values >= 0).sum()), smallest), largest)
    else:
        count = share_of(len(eligible), keep)
    return set(eligible[np.argsort(-values[eligible], kind="stable")][:count].tolist())


def ranked(lists, keep, scope):
    """What each micro-batch keeps when they compete as `scope` says."""
    if scope == "sequence":
        return [
            {row * LENGTH + i for row in range(ROWS) for i in highest(v[row * LENGTH : (row + 1) * LENGTH], keep)}
            for v in lists
        ]
    if scope == "micro-batch":
        return [highest(v, keep) for v in lists]
    if scope == "batch":
        size, kept = ROWS * LENGTH, highest(np.concatenate(lists), keep)
        return [{i - m * size for i in kept if i // size == m} for m in range(len(lists))]
    # Two steps of half the micro-batches: in the first each ranks its own, and the second goes by the mean of the first's
    # thresholds.
    half = len(lists) // 2
    own = [highest(values, keep) for values in lists[:half]]
    lowest = [min(values[i] for i in kept) for values, kept in zip(lists, own)]
    threshold = np.float32(np.mean(np.array(lowest, dtype=np.float64)))
    return own + [{i for i in range(len(values)) if values[i] >= threshold} for values in lists[half:]]


def keep_at(schedule, step):
    if step <= WARMUP_STEPS:
        return 1.0
    progress = (step - WARMUP_STEPS - 1) / (STEPS - WARMUP_STEPS - 1)
    kind, values = schedule
    if kind == "constant":
        return values[0]
    if kind == "linear":
        return values[0] + (values[1] - values[0]) * progress
    if kind == "cosine":
        return values[1] + (values[0] - values[1]) * 0.5 * (1 + math.cos(math.pi * progress))
    share = values[0]
    for first, other in values[1:]:
        if step >= first:
            share = other
    return share


def main():
    generator = np.random.default_rng(2404)
    batch = [signals(generator) for _ in range(MICRO_BATCHES)]
    cases = []
    for scope in ("sequence", "micro-batch", "batch", "running-quantile"):
        for keep in (0.05, 0.3, 0.6, 0.95):
            for name in ("excess", "reference-loss", "reference-entropy", "loss", "entropy", "improvement"):
                kept = ranked([scores(name, m) for m in batch], keep, scope)
                cases.append({"score": {"name": name}, "keep": keep, "scope": scope, "kept": kept})
            for name, entropy_keep in (("intersection", None), ("union", None), ("intersection", 0.8), ("union", 0.2)):
                by_loss = [scores("reference-loss", m) for m in batch]
                by_entropy = [scores("reference-entropy", m) for m in batch]
                both = [np.isnan(a) | np.isnan(b) for a, b in zip(by_loss, by_entropy)]
                mask = lambda lists: [np.where(none, np.float32("nan"), v) for none, v in zip(both, lists)]
                first = ranked(mask(by_loss), keep, scope)
                second = ranked(mask(by_entropy), entropy_keep or keep, scope)
                join = set.intersection if name == "intersection" else set.union
                score = {"name": name} | ({"entropy_keep": entropy_keep} if entropy_keep else {})
                kept = [join(a, b) for a, b in zip(first, second)]
                cases.append({"score": score, "keep": keep, "scope": scope, "kept": kept})
    for threshold in (-2.0, 0.0, 1.125, 1e9):
        for name in ("excess", "reference-loss", "entropy"):
            kept = [set(np.flatnonzero(scores(name, m) >= np.float32(threshold)).tolist()) for m in batch]
            cases.append({"score": {"name": name}, "threshold": threshold, "kept": kept})
    for bounds in ((0.05, 1.0), (0.05, 0.3), (0.6, 0.8)):
        for scope in ("sequence", "micro-batch", "batch"):
            for name in ("excess", "improvement"):
                kept = ranked([scores(name, m) for m in batch], bounds, scope)
                adaptive = {"min": bounds[0], "max": bounds[1]}
                cases.append({"score": {"name": name}, "adaptive": adaptive, "scope": scope, "kept": kept})
    for case in cases:
        case["kept"] = [sorted(int(i) for i in kept) for kept in case["kept"]]

    schedules = {
        "0.6": ("constant", [0.6]),
        "linear:0.8:0.6": ("linear", [0.8, 0.6]),
        "cosine:0.9:0.4": ("cosine", [0.9, 0.4]),
        "steps:0.8,30=0.7,60=0.5": ("steps", [0.8, (30, 0.7), (60, 0.5)]),
    }
    plain = lambda values: [None if math.isnan(v) else float(v) for v in values]
    print(json.dumps({
        "about": "made by selection.py with numpy " + np.__version__,
        "row_len": LENGTH, "steps": STEPS, "warmup_steps": WARMUP_STEPS,
        "batch": [{name: plain(values) for name, values in m.items()} for m in batch],
        "cases": cases,
        "schedules": {text: [keep_at(s, step) for step in range(1, STEPS + 1)] for text, s in schedules.items()},
    }, separators=(",", ":")))


main()
