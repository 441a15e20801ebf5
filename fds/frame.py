"""What a call of a program carries besides its arguments: who answers at each site, the random seed, the buffers that were updated.

A frame is set for the time of one call and read by the dispatchers that `functionalize` leaves in its private copy of the module. Recompute
captures the frame of the forward pass and sets it again in backward, so that both runs are the same run.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import attrs
from torch import Tensor, dtype

from fds.tree import Params

Apply = Callable[..., Any]
Wrap = Callable[[Apply], Apply]


@attrs.define
class Draws:
    """How many random numbers the running site has asked for, and of what."""

    count: int = 0
    part: int = 0  # 0: of activations that all ranks hold; else the number of this rank's part of them


@attrs.frozen
class Head:
    """What the output layer was called with: a loss may need no more of it than that."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    logits: Tensor  # what the layer gave back instead of logits: zeros that take no memory
    axis: Any = None  # over whose ranks the words are split (`weight` is then this rank's), or None
    first: int = 0  # the first of this rank's words


@attrs.frozen
class Frame:
    """One call. Fields are read by `functional.py`; transformations change them through `scoped`."""

    sites: Mapping[
        str, tuple[Apply, Mapping[str, Tensor]]
    ] = {}  # site path -> the call of its program, and its stored leaves
    wraps: Mapping[str, tuple[Wrap, ...]] = {}  # module path -> wrappers of its call, innermost first
    leaves: Mapping[
        str, Tensor
    ] = {}  # the logical leaves of the module that is running: a site borrows from the root's what it is tied to
    seed: Tensor | None = None  # 0-D int64; None: modules draw from torch's global generator
    block: Tensor | int = 0  # which block of rows of the global batch this call sees (rank, microbatch)
    salt: int = 0  # tells the sites and their repeated calls apart
    calls: dict[str, int] = attrs.Factory(dict[str, int])  # how often each site was called in this call of the parent
    draws: Draws = attrs.Factory(Draws)  # of this call of the site, wrapped modules in it included
    pending: dict[str, Params] = attrs.Factory(dict[str, Params])  # buffers updated so far in this call, by site
    training: bool = False  # the mode of the module that is running
    heads: list[Head] | None = None  # when somebody wants the output layer's arguments instead of logits
    recomputed: bool = False  # inside recompute: unseeded randomness would differ in backward
    autocast: dtype | None = None  # modules run in torch.autocast of it; here, so that recompute runs in it too
    deferred: tuple[Any, ...] = ()  # mesh axes over which the caller gathers and reduces itself
    updates: dict[str, dict[str, Tensor]] | None = None  # updated buffers by site, when somebody collects them


FRAME: ContextVar[Frame] = ContextVar("fds_frame", default=Frame())  # noqa: B039 (replaced as a whole, never written to)


@contextmanager
def scoped(frame: Frame | None = None, **changes: Any) -> Generator[Frame]:
    """Set `frame` (default: the present one) with `changes` for the time of a block."""
    frame = attrs.evolve(FRAME.get() if frame is None else frame, **changes)
    token = FRAME.set(frame)
    try:
        yield frame
    finally:
        FRAME.reset(token)


def with_updates(f: Apply) -> Apply:
    """``with_updates(f)(*args) -> (f(*args), updates)``: also return the buffers that the programs called in `f` would have updated.

    `updates` is part of a stored tree, ``{site: {buffer: new value}}``. Programs never write to their inputs; BatchNorm's running
    statistics come out here.

    >>> import fds, torch
    >>> program, params = fds.functionalize(torch.nn.BatchNorm1d(3))
    >>> out, updates = fds.with_updates(program)(program.place(params), torch.ones(4, 3))
    >>> updates[""]["running_mean"]
    tensor([0.1000, 0.1000, 0.1000])
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, dict[str, Tensor]]]:
        updates: dict[str, dict[str, Tensor]] = {}
        with scoped(updates=updates):
            out = f(*args, **kwargs)
        return out, updates

    return run


def with_seed(f: Apply) -> Apply:
    """``with_seed(f)(seed, *args)``: call `f` with an explicit seed for all its dropout.

    `seed` is a 0-D int64 tensor (so that a new seed does not recompile). Masks are a function of the seed, the site, the order of
    draws in it and the element's place in the *global* batch: recompute, resharding and microbatches see the same mask.

    >>> import fds, torch
    >>> program, params = fds.functionalize(torch.nn.Dropout(0.5))
    >>> a, b = (fds.with_seed(program)(torch.tensor(7), {"": {}}, torch.ones(64)) for _ in range(2))
    >>> torch.equal(a, b), bool((a == 0).any())
    (True, True)
    """

    def run(seed: Tensor, *args: Any, **kwargs: Any) -> Any:
        with scoped(seed=seed):
            return f(*args, **kwargs)

    return run
