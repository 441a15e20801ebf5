"""The hybrid engine: training and generation by turns, with one set of weights.

The training weights are never written. What serving needs in another form (gathered from shards, adapters fused, split for tensor parallelism) is made
from them site by site and is dropped when they change; what it needs as it is, it takes as it is: then a switch copies nothing. There is
nothing to undo, so no number of switches changes a bit.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
from torch import Tensor

from fds import tree
from fds.inference.clock import now
from fds.inference.generate import generate
from fds.inference.prompts import room
from fds.inference.workspace import Workspace
from fds.lora import fuse_lora
from fds.precision import cast
from fds.program import Program, check_stored
from fds.transform import Transform, at, bridge, check_same_module

_LEFT_OUT = ("shard", "replicate", "quantized", "checkpoint", "offload", "compile")


@attrs.frozen
class Statistics:
    """Seconds since the last report, with the device's work: in all, in gathering (weights into their serving form), generating, training, and the
    rest; and samples (rows generated) per second of all of it.
    """

    end_to_end: float
    gather: float
    generate: float
    train: float
    samples: int

    @property
    def other(self) -> float:
        return max(0.0, self.end_to_end - self.gather - self.generate - self.train)

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.end_to_end if self.end_to_end else 0.0

    def __str__(self) -> str:
        parts = {k: getattr(self, k) for k in ("gather", "generate", "train", "other")}
        shares = ", ".join(f"{k} {v:.3f} s ({v / max(self.end_to_end, 1e-9):.0%})" for k, v in parts.items())
        return f"end to end {self.end_to_end:.3f} s: {shares}; {self.samples_per_second:.2f} samples/s"


class Hybrid:
    """See `hybrid`."""

    def __init__(self, train: Program, serve: Program, max_out_tokens: int, release_cache: bool, pin: bool, together: int) -> None:  # fmt: skip
        self.train, self.serve, self.max_out_tokens = train, serve, max_out_tokens
        self.workspace = None if release_cache else Workspace()
        self._pin, self._together = pin, together
        self._from: list[tuple[weakref.ref[Tensor], int]] = []
        self._weights: Any = None
        self._times, self._samples, self._since = dict.fromkeys(("gather", "generate", "train"), 0.0), 0, now()

    def weights(self, stored: Any) -> Any:
        """The training weights in their serving form: made once for these weights; leaves of sites that are the same in both are the same tensors."""
        check_stored(stored, self.train.spec)
        leaves = tree.flat(stored)
        if self._weights is None or not self._made_from(leaves):
            self._weights = None  # before the next ones are made
            with self.measured("gather"):
                self._weights = self._moved(stored)
            self._from = [(weakref.ref(x), x._version) for x in leaves]
        return self._weights

    def generate(self, stored: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int, **options: Any) -> Any:  # fmt: skip
        """`fds.generate` with the weights of a training state. `ValueError` for more than `max_out_tokens` in all, before any work, and for a `workspace`."""
        if "workspace" in options:
            raise ValueError(
                "generate: workspace= is the engine's own (release_inference_cache=False keeps it); leave it out"
            )
        room(input_ids, attention_mask, max_new_tokens, self.max_out_tokens, "hybrid()")
        weights = self.weights(stored)
        with self.measured("generate"):
            out = generate(self.serve, weights, input_ids, attention_mask, max_new_tokens=max_new_tokens, workspace=self.workspace, **options)  # fmt: skip
        self._samples += input_ids.shape[0] * options.get("n", 1)
        if not self._pin:
            self._weights = None
        return out

    def release(self) -> None:
        """Give back the serving weights, as far as they are not the training weights themselves, and the memory of caches."""
        self._weights = None
        if self.workspace is not None:
            self.workspace.release()

    @contextmanager
    def measured(self, what: str) -> Iterator[None]:
        """Count the time of a block as "gather", "generate" or "train": ``with engine.measured("train"): state, _ = step(state, batch)``."""
        if what not in self._times:
            raise ValueError(f"measured: {what!r} is unknown; {tree.suggest(what, self._times)}")
        start = now()
        try:
            yield
        finally:
            self._times[what] += now() - start

    def statistics(self) -> Statistics:
        """Since the last question."""
        found = Statistics(now() - self._since, **self._times, samples=self._samples)
        self._times, self._samples, self._since = dict.fromkeys(self._times, 0.0), 0, now()
        return found

    def _made_from(self, leaves: Sequence[Tensor]) -> bool:
        return len(leaves) == len(self._from) and all(r() is x and v == x._version for x, (r, v) in zip(leaves, self._from, strict=True))  # fmt: skip

    def _moved(self, stored: Any) -> Any:
        """Some sites at a time; one that is the same in both programs is returned as it is."""
        names, moved = list(self.serve.sites), dict[str, Any]()
        for first in range(0, len(names), self._together):
            bridges = {
                s: bridge(self.train.sites[s], self.serve.sites[s]) for s in names[first : first + self._together]
            }
            between = {s: down(stored[s]) for s, (down, _) in bridges.items()}
            for s, (_, up) in bridges.items():
                moved[s] = tree.compact(up(between.pop(s)), keep=stored[s])
        return moved


def hybrid(
    train: Program, serve: Program | None = None, *, max_out_tokens: int = 512, inference_tp_size: int = 1, release_inference_cache: bool = False, pin_parameters: bool = True,
    tp_gather_partition_size: int = 8, fuse: bool = True,
) -> Hybrid:  # fmt: skip
    """An engine that generates with the weights of a training program.

        engine = hybrid(train)
        tokens = engine.generate(state.params, ids, max_new_tokens=64)       # rollouts
        with engine.measured("train"):
            state, metrics = step(state, batch)
        print(engine.statistics())

    Names and defaults of the settings are DeepSpeed's.

    Args:
        train: with all its transformations: ZeRO, LoRA, offload, recompute.
        serve: what generates, of the same model. Default: `train` without its layouts and wrappers (`shard`, `replicate`, `quantized`, `offload`,
            `checkpoint`, `compile`, whole or by `at`), a `cast` that stores its dtype, and adapters fused.
        max_out_tokens: of prompt and new ones together.
        inference_tp_size: ranks that serve together, each with 1/n of the weights; all of them get the same prompts.
        release_inference_cache: give the cache's memory back after every call. Else it stays, until `release`.
        pin_parameters: keep the serving weights for later calls, until the training weights change. Else they are made for each call.
        tp_gather_partition_size: sites that are in logical form at the same time while weights change their form, at most.
        fuse: fuse adapters into weights, with one rounding. Else they are computed beside or within, as in training: exact, and no copy.

    Raises `ValueError` for a setting out of range, and for a `serve` of another model.
    """
    if not isinstance(train, Program):
        raise ValueError(
            f"hybrid: got {type(train).__name__}, required a program; fds.functionalize(model) makes one of a module"
        )
    for name, value in (("release_inference_cache", release_inference_cache), ("pin_parameters", pin_parameters), ("fuse", fuse)):  # fmt: skip
        tree.switch(f"hybrid: {name}", value)
    for name, value in (("max_out_tokens", max_out_tokens), ("inference_tp_size", inference_tp_size), ("tp_gather_partition_size", tp_gather_partition_size)):  # fmt: skip
        tree.positive(f"hybrid: {name}", value)
    if serve is None:
        serve = _serving(train, fuse, inference_tp_size)
    elif inference_tp_size != 1 or not fuse:
        raise ValueError(
            "hybrid: inference_tp_size and fuse say how to make a serving program, and serve= is one; give one of them"
        )
    check_same_module(train, serve, what="hybrid")
    return Hybrid(train, serve, max_out_tokens, release_inference_cache, pin_parameters, tp_gather_partition_size)


def _serving(train: Program, fuse: bool, ranks: int) -> Program:
    kept: list[Transform] = []
    names = [t.name for t in train.history]
    beside = 0 if fuse or "lora" not in names else names.index("lora") + 1
    for i, t in enumerate(train.history):
        if i < beside:
            kept.append(t)  # what adapters are beside stays as it is
        else:
            kept += _serving_form(t)
    if ranks > 1:
        from fds.sharding import mesh, tensor_parallel

        kept = [t for t in kept if t.name != "tensor_parallel"] + [tensor_parallel(mesh(dp=-1, tp=ranks)["tp"])]
    program = train.eval().replay(*kept)
    return fuse_lora()(program) if fuse and any(t.name == "lora" for t in kept) else program


def _serving_form(t: Transform) -> list[Transform]:
    """What serves in the place of a transformation: nothing for one of layouts and wrappers, for others what computes the same."""
    options: dict[str, Any] = dict(t.options)
    if t.name == "at":
        return [at(options["pattern"], x) for x in _serving_form(options["transform"])]
    if t.name == "cast":
        return [cast(**{**options, "stored": True})]
    return [] if t.name in _LEFT_OUT else [t]


__all__ = ["Hybrid", "Statistics", "hybrid"]
