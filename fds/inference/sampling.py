"""How tokens are chosen from logits: the numbers, checked."""

from numbers import Integral, Real
from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen
class Sampling:
    """How tokens are chosen from logits. In this order: repetition penalty, temperature, top-k, top-p, min-p.

    temperature: 0 is greedy. top_k: 0 is no limit. top_p, min_p: see `fds.kernels.sample`.
    repetition_penalty: logits of tokens that a row has had are divided by it where positive, multiplied where negative (Keskar et al. 2019,
    arXiv:1909.05858). 1: none.
    seed: of the draws.

    Raises `ValueError` for what is no number or out of range, and for a limit at temperature 0, where nothing is drawn that it could limit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        for name, kind, fine, want in (
            ("temperature", float, lambda v: 0.0 <= v < float("inf"), ">= 0 and finite (0 is greedy)"),
            ("top_k", int, lambda v: 0 <= v < 2**63, "a whole number >= 0 (0 or None is no limit)"),
            ("top_p", float, lambda v: 0.0 < v <= 1.0, "0 < top_p <= 1"),
            ("min_p", float, lambda v: 0.0 <= v <= 1.0, "0 <= min_p <= 1"),
            ("repetition_penalty", float, lambda v: 0.0 < v < float("inf"), "> 0 and finite"),
            ("seed", int, lambda v: -(2**63) <= v < 2**63, "a whole number of 64 bits"),
        ):  # fmt: skip
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real) or not fine(value):
                raise ValueError(f"generate: {name}={value!r}, required {want}")
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if self.greedy and getattr(self, name) != neutral:
                raise ValueError(f"generate: {name}={getattr(self, name)!r} with temperature 0, which takes the likeliest token and draws none; give temperature=1.0, or leave {name} out")  # fmt: skip

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0

    def numbers(self, device: torch.device) -> dict[str, Tensor]:
        """0-D tensors: other numbers are other data, not another graph."""
        whole = ("top_k", "seed")
        return {k: torch.tensor(v, dtype=torch.int64 if k in whole else torch.float32, device=device) for k, v in attrs.asdict(self).items()}  # fmt: skip
