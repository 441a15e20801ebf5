"""The batch triangle: rows of a step = rows of a microbatch x microbatches x ranks."""

from typing import NamedTuple

from fds.deepspeed.errors import DeepSpeedConfigError

KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class Batch(NamedTuple):
    """Rows of a step over all ranks, rows of a rank's microbatch, and microbatches of a step."""

    train: int
    micro: int
    steps: int


def closed(train: int | None, micro: int | None, steps: int | None, ranks: int) -> Batch:
    """All three of the triangle from those that are given (None: not), for so many data-parallel ranks; DeepSpeed's rule.

    Two give the third; one of `train` and `micro` alone has one microbatch. `DeepSpeedConfigError` names keys and legal values where they do
    not close, and where only `steps` or nothing is given.

    >>> closed(32, 4, None, 2)
    Batch(train=32, micro=4, steps=4)
    """
    if train is None and micro is None:
        raise DeepSpeedConfigError(
            "train_batch_size, train_micro_batch_size_per_gpu: neither is given (or both are \"auto\"); give one of them", KEYS[:2]
        )  # fmt: skip
    if train is None:
        assert micro is not None
        steps = steps or 1
        return Batch(micro * steps * ranks, micro, steps)
    if micro is None:
        steps = steps or 1
        if train % (steps * ranks):
            raise _open(train, KEYS[2], steps, ranks)
        return Batch(train, train // (steps * ranks), steps)
    if steps is None:
        if train % (micro * ranks):
            raise _open(train, KEYS[1], micro, ranks)
        return Batch(train, micro, train // (micro * ranks))
    if train != micro * steps * ranks:
        raise DeepSpeedConfigError(
            f"train_batch_size {train} != train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {steps} x {ranks} data-parallel rank{'s' * (ranks > 1)} = {micro * steps * ranks}; leave one of the three out, or make train_batch_size {micro * steps * ranks}",
            KEYS,
        )
    return Batch(train, micro, steps)


def _open(train: int, key: str, value: int, ranks: int) -> DeepSpeedConfigError:
    unit = value * ranks
    legal = " or ".join(str(n) for n in (train // unit * unit, -(-train // unit) * unit) if n)
    return DeepSpeedConfigError(
        f"train_batch_size {train} does not divide by {key} {value} x {ranks} data-parallel rank{'s' * (ranks > 1)} = {unit}; nearest legal train_batch_size: {legal}",
        (KEYS[0], key),
    )
