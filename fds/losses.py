"""Loss functions ``loss(program, stored, batch) -> scalar`` (or ``(scalar, dict)``) for `train_step`.

A loss may have a `weight(batch)`: how many terms its mean is over. Then microbatches and ranks are weighed by it, and the result is the
mean over all terms of the global batch, however it is cut.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fds.frame import Head, scoped
from fds.program import Program
from fds.sharding.collectives import join

_IGNORED = -100


def causal_lm(program: Program, stored: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token, in float32.

    `batch` has the model's keyword arguments: ``input_ids`` [rows, length], optionally ``attention_mask`` and ``labels`` (default: the
    tokens themselves, padding left out; -100 is ignored). Labels are shifted here. The logits are not made where the model ends with a plain
    linear layer (`kernels.linear_cross_entropy`); a model that does more to them (Gemma 2's softcap) gets them whole.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    targets = _labels(batch)[:, 1:].reshape(-1)
    share = 1.0 / (targets != _IGNORED).sum().clamp(min=1)
    head = _head_of(program, stored, inputs)
    if head is not None:
        from fds.kernels.cross_entropy import linear_cross_entropy  # Triton takes time to import

        hidden = head.hidden[:, :-1].flatten(0, 1)
        if head.axis is not None:
            return _over_words(head, hidden, targets).sum() * share
        scale = share.float().expand(targets.shape)
        return linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, scale=scale)
    logits = logits_of(program(stored, **inputs))[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, targets, ignore_index=_IGNORED, reduction="sum") * share


def _head_of(program: Program, stored: Any, inputs: dict[str, Tensor]) -> Head | None:
    """What the output layer is called with, if the model returns that layer's result as it is; None where it does more to its logits.

    Told by identity, in the first call; from then on the program remembers.
    """
    compiled = any("whole" in t.provides for t in program.history)  # its graph was made without asking
    if compiled or not program.memo.get("ends with its output layer", True):
        return None
    heads: list[Head] = []
    with scoped(heads=heads):
        out = program(stored, **inputs)
    plain = len(heads) == 1 and getattr(out, "logits", out) is heads[0].logits
    program.memo["ends with its output layer"] = plain
    return heads[0] if plain else None


def _over_words(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [n] where every rank has some of the words: log sum exp of all logits, less the target's.

    Each rank's logsumexp and its target's logit, where that is among its words, are all that the ranks exchange: two numbers per row and
    rank, in one message. As Shoeybi et al. 2019, arXiv:1909.08053, section 3, who reduce the largest logit, the sum and the target's.
    """
    from fds.kernels.cross_entropy import each_row

    here = targets - head.first
    mine = (here >= 0) & (here < len(head.weight))
    loss, lse, _ = each_row(hidden, head.weight, head.bias, here.where(mine, _IGNORED), _IGNORED, 0.0, 0.0, 0.0, False)
    ranks = join(torch.stack([lse, (lse - loss).where(mine, 0.0)])[None], head.axis, dim=0)
    return (ranks[:, 0].logsumexp(0) - ranks[:, 1].sum(0)).where(targets != _IGNORED, 0.0)


def _labels(batch: dict[str, Tensor]) -> Tensor:
    if "labels" in batch:
        return batch["labels"]
    if "input_ids" not in batch:
        raise ValueError(
            f"causal_lm: the batch has {sorted(batch)}, required 'input_ids' (and optionally 'attention_mask', 'labels')"
        )
    mask = batch.get("attention_mask")
    return batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, _IGNORED)


def _causal_weight(batch: dict[str, Tensor]) -> Tensor:
    return (_labels(batch)[:, 1:] != _IGNORED).sum()


causal_lm.weight = _causal_weight  # type: ignore[attr-defined]


def model_loss(program: Program, stored: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the model itself computes from ``labels`` in the batch (encoder-decoders, classifiers)."""
    loss = getattr(program(stored, **batch), "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise ValueError(
            "model_loss: the model returned no `loss`; put `labels` into the batch, or write loss(program, stored, batch)"
        )
    return loss


def logits_of(out: Any) -> Tensor:
    """The logits in a model's output: its `logits`, or the output itself if it is a tensor."""
    logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f"the model returned {type(out).__name__} without `logits`; write your own loss(program, stored, batch)"
        )
    return logits
