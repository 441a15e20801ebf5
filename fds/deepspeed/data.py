"""Data: which rows a rank sees and when, as a pure function of seed, epoch and position; a loader that goes on where a saved run stopped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from fds import tree
from fds.files import rank as this_rank
from fds.files import ranks as all_ranks


def order(length: int, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The order of the rows in an epoch: a permutation, the same on every rank, and that of torch's `DistributedSampler`.

    >>> order(5, seed=0, epoch=0), order(5, seed=0, epoch=0, shuffle=False)
    ([4, 0, 1, 3, 2], [0, 1, 2, 3, 4])
    """
    if not shuffle:
        return list(range(length))
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def batches(
    rows: Sequence[int], *, batch_size: int, rank: int, ranks: int, drop_last: bool, wrap: Sequence[int] | None = None
) -> list[list[int]]:
    """The batches of one rank from the `rows` that are left of an epoch.

    The next ``batch_size * ranks`` rows are a global batch, of which each rank takes `batch_size` in a row. What is left at the end is no batch
    with `drop_last`; else it is a smaller one, as large on every rank, for which up to ``ranks - 1`` rows of `wrap` (default: `rows`) are
    seen once more.

    >>> [batches(range(10), batch_size=2, rank=r, ranks=2, drop_last=False) for r in (0, 1)]
    [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]
    """
    size = batch_size * ranks
    whole = len(rows) // size * size
    found = [list(rows[i + rank * batch_size : i + (rank + 1) * batch_size]) for i in range(0, whole, size)]
    rest = list(rows[whole:])
    if rest and not drop_last:
        again = rows if wrap is None else wrap
        missing = -len(rest) % ranks
        rest += [again[i % len(again)] for i in range(missing)]
        share = len(rest) // ranks
        found.append(rest[rank * share : (rank + 1) * share])
    return found


@attrs.define
class DistributedLoader:
    """Batches of a data set for this rank; every ``iter()`` goes on where the last one stopped, to the end of the epoch.

    The position (`state_dict`: plain numbers, the same on all ranks) says how many rows of the epoch all ranks have been given together. So a run
    goes on from it under any number of ranks and any batch size, and no row of the epoch comes twice or is left out:

        fds.save_state(directory, step, state, extra={"data": loader.state_dict()})
        loader.load_state_dict(fds.load_extra(directory)["data"])

    Args:
        dataset: rows by number, with a length.
        batch_size: rows of a batch of this rank.
        seed: of the order; each epoch has another. Ranks have to be given the same.
        drop_last: leave out the last rows of an epoch that make no whole batch on every rank (see `batches`).
        collate_fn, num_workers, pin_memory: as of `torch.utils.data.DataLoader`, which reads the rows. Workers are seeded by seed and epoch.
        rank, ranks: this process's place among those that share the data. Default: the whole job's.

    Raises:
        ValueError: a data set without length or rows by number; sizes that are not positive; no batch in an epoch.

    >>> loader = DistributedLoader(range(6), batch_size=2, shuffle=False)
    >>> next(iter(loader)), loader.state_dict()
    (tensor([0, 1]), {'seed': 0, 'epoch': 0, 'row': 2, 'length': 6})
    >>> [batch.tolist() for batch in loader], loader.epoch
    ([[2, 3], [4, 5]], 1)
    """

    dataset: Any
    batch_size: int
    seed: int = attrs.field(default=0, kw_only=True)
    shuffle: bool = attrs.field(default=True, kw_only=True)
    drop_last: bool = attrs.field(default=False, kw_only=True)
    collate_fn: Callable[[list[Any]], Any] | None = attrs.field(default=None, kw_only=True)
    num_workers: int = attrs.field(default=0, kw_only=True)
    pin_memory: bool = attrs.field(default=False, kw_only=True)
    rank: int = attrs.field(factory=this_rank, kw_only=True)
    ranks: int = attrs.field(factory=all_ranks, kw_only=True)
    epoch: int = attrs.field(default=0, init=False)
    row: int = attrs.field(default=0, init=False)  # rows of this epoch that all ranks have been given
    _running: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        if not (hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__")):
            raise ValueError(
                f"data: {type(self.dataset).__name__} has no length or no rows by number, so that ranks could not share it; pass a map-style data set, or a loader of your own"
            )
        for name, value, least in (("batch_size", self.batch_size, 1), ("ranks", self.ranks, 1), ("num_workers", self.num_workers, 0), ("seed", self.seed, 0)):  # fmt: skip
            if not isinstance(value, int) or value < least:
                raise ValueError(f"data: {name}={value!r}, required a whole number >= {least}")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"data: rank={self.rank}, required one of 0 to {self.ranks - 1}")
        if self.length < (self.global_batch if self.drop_last else 1):
            raise ValueError(
                f"data: {self.length} rows, and a batch takes {self.global_batch} ({self.batch_size} on each of {self.ranks} ranks); use a smaller batch_size{', or drop_last=False' if self.drop_last and self.length else ''}"
            )

    @property
    def length(self) -> int:
        """Rows of the data set."""
        return len(self.dataset)

    @property
    def global_batch(self) -> int:
        """Rows of a batch over all ranks."""
        return self.batch_size * self.ranks

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the loader stands in it."""
        return self.length // self.global_batch if self.drop_last else -(-self.length // self.global_batch)

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch. A loader has one position: a second iterator ends the first one."""
        from torch.utils.data import DataLoader

        self._running += 1
        mine, epoch, first = self._running, self.epoch, self.row
        rows = order(self.length, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        found = batches(rows[first:], batch_size=self.batch_size, rank=self.rank, ranks=self.ranks, drop_last=self.drop_last, wrap=rows)  # fmt: skip
        reader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=found,
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Without one of its own torch draws the workers' seed from the global generator, and every iteration changes the run's numbers.
            generator=torch.Generator().manual_seed(self.seed + epoch),
        )
        for i, batch in enumerate(reader):
            self._check_mine(mine)
            self.row = min(first + (i + 1) * self.global_batch, self.length)
            if i + 1 == len(
                found
            ):  # before it is handed out: who saves after the last batch goes on with the next epoch
                self.epoch, self.row = epoch + 1, 0
            yield batch
        if not found:  # so few rows were left that they make no batch
            self._check_mine(mine)
            self.epoch, self.row = epoch + 1, 0

    def _check_mine(self, mine: int) -> None:
        if mine != self._running:
            raise ValueError(
                "data: this iterator ended when the loader was iterated or loaded anew; a loader has one position, use one iterator at a time"
            )

    def state_dict(self) -> dict[str, int]:
        """The position, as plain numbers: the same on every rank."""
        return {"seed": self.seed, "epoch": self.epoch, "row": self.row, "length": self.length}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a position of any loader over the same rows, whatever its ranks and its batch size were.

        Raises `ValueError` for another data set's length, another seed, or keys that are missing or unknown.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            name = sorted(state.keys() ^ mine.keys())[0]
            raise ValueError(
                f"data: key {name!r} of the position is {'missing' if name in mine else 'unknown'}; give what state_dict() returned"
            )
        for key in ("length", "seed"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"data: the position is of {key} {state[key]}, this loader has {mine[key]}; the order would be another one"
                )
        if state["epoch"] < 0 or not 0 <= state["row"] < self.length:
            raise ValueError(f"data: epoch {state['epoch']}, row {state['row']} of {self.length}: no such position")
        self._running += 1
        self.epoch, self.row = int(state["epoch"]), int(state["row"])


@attrs.define
class RepeatingLoader:
    """A loader without an end: it is iterated anew whenever it ends.

    >>> repeated = RepeatingLoader([1, 2])
    >>> [next(repeated) for _ in range(5)]
    [1, 2, 1, 2, 1]
    """

    loader: Any
    _left: Iterator[Any] | None = attrs.field(init=False, default=None)

    def __iter__(self) -> "RepeatingLoader":
        return self

    def __next__(self) -> Any:
        for _ in range(3):  # a loader that was restored at its very end has nothing left in its first epoch
            if self._left is None:
                self._left = iter(self.loader)
            try:
                return next(self._left)
            except StopIteration:
                self._left = None
        raise ValueError("data: the loader gives no batch; is it a generator, which can be iterated once?")


def loader_for(dataset: Any, config: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None, **options: Any) -> DistributedLoader:  # fmt: skip
    """The loader that a configuration asks for: ``train_micro_batch_size_per_gpu`` rows a batch, ``dataloader_drop_last``.

    `options` go to `DistributedLoader`.
    """
    drop_last = bool(getattr(config, "dataloader_drop_last", False))
    size = config.train_micro_batch_size_per_gpu
    return DistributedLoader(dataset, size, collate_fn=collate_fn, drop_last=drop_last, **options)


# --- curriculum ---

_TYPES = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
    "custom": (),
}


@attrs.frozen
class Curriculum:
    """A difficulty for every step, by DeepSpeed's ``curriculum_learning`` section; for ``"seqlen"`` the length of the sequences.

    * fixed_root: ``(step / total_curriculum_step) ** (1 / root_degree)`` of the way from `min_difficulty` to `max_difficulty`, rounded down to
      a multiple of `difficulty_step`, at least the first such multiple from `min_difficulty` on, at most `max_difficulty`.
    * fixed_linear: the same of degree 1.
    * fixed_discrete: ``difficulty[i]`` up to and including step ``max_step[i]``; the last one from then on.
    * custom: what `custom(step)` says.

    >>> section = {"curriculum_type": "seqlen", "min_difficulty": 8, "max_difficulty": 64, "schedule_type": "fixed_linear",
    ...            "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8}}
    >>> curriculum = Curriculum.of(section)
    >>> [curriculum.difficulty(step) for step in (1, 5, 10, 11)]
    [8, 32, 64, 64]
    """

    schedule_type: str
    min_difficulty: int
    max_difficulty: int
    schedule_config: Mapping[str, Any] = attrs.field(factory=dict[str, Any])
    curriculum_type: str = "seqlen"
    custom: Callable[[int], int] | None = None

    @staticmethod
    def of(section: Mapping[str, Any], *, custom: Callable[[int], int] | None = None) -> "Curriculum":
        """From the section of a configuration. `ValueError` names the key that is missing, unknown or wrong."""
        keys = ["enabled", *(a.name for a in attrs.fields(Curriculum) if a.name != "custom")]
        for key in section:
            if key not in keys:
                raise ValueError(f"curriculum_learning.{key}: no such key; {tree.suggest(key, keys)}")
        for key in ("min_difficulty", "max_difficulty", "schedule_type"):
            if key not in section:
                raise ValueError(f"curriculum_learning.{key}: missing; a curriculum needs it")
        return Curriculum(**{k: v for k, v in section.items() if k != "enabled"}, custom=custom)

    def __attrs_post_init__(self) -> None:
        what = "curriculum_learning"
        if self.curriculum_type != "seqlen":
            raise ValueError(
                f"{what}.curriculum_type: {self.curriculum_type!r}, and fds has 'seqlen'; select rows of another difficulty in your data set"
            )
        if self.schedule_type not in _TYPES:
            raise ValueError(
                f"{what}.schedule_type: {self.schedule_type!r} is unknown; {tree.suggest(self.schedule_type, _TYPES)}"
            )
        for key in ("min_difficulty", "max_difficulty"):
            _whole(f"{what}.{key}", getattr(self, key), 1)
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(
                f"{what}.min_difficulty: {self.min_difficulty}, required at most max_difficulty {self.max_difficulty}"
            )
        given, needed = self.schedule_config, _TYPES[self.schedule_type]
        for key in (*needed, *given):
            if key not in given or key not in needed:
                state = "missing" if key not in given else "no such key"
                raise ValueError(
                    f"{what}.schedule_config.{key}: {state}; {self.schedule_type} takes {', '.join(needed) or 'none'}"
                )
        if (self.custom is not None) != (self.schedule_type == "custom"):
            raise ValueError(
                f"{what}.schedule_type: 'custom' and a function custom= belong together, got {self.schedule_type!r} with{'' if self.custom else 'out'} one"
            )
        if self.schedule_type == "fixed_discrete":
            _check_discrete(f"{what}.schedule_config", **given)
        else:
            for key in needed:
                if key != "root_degree":
                    _whole(f"{what}.schedule_config.{key}", given[key], 1)
                elif not isinstance(given[key], int | float) or not given[key] > 0:
                    raise ValueError(f"{what}.schedule_config.{key}: {given[key]!r}, required a number > 0")

    def difficulty(self, step: int) -> int:
        """The difficulty of a step. DeepSpeed counts from 1."""
        given = self.schedule_config
        if self.custom is not None:
            return self.custom(step)
        if self.schedule_type == "fixed_discrete":
            levels = zip(given["max_step"], given["difficulty"], strict=False)
            return next((d for last, d in levels if step <= last), given["difficulty"][-1])
        multiple = given["difficulty_step"]
        way = (float(step) / given["total_curriculum_step"]) ** (1.0 / given.get("root_degree", 1))
        reached = int(way * (self.max_difficulty - self.min_difficulty) + self.min_difficulty)
        first = -(-self.min_difficulty // multiple) * multiple
        return min(max(reached - reached % multiple, first), self.max_difficulty)

    def shorten(self, batch: Mapping[str, Any], step: int) -> dict[str, Any]:
        """`batch` with its sequences cut to the step's length: dimension 1 of every tensor that is as long there as the first one.

        Every length is a graph of its own to a compiler: a `difficulty_step` of 64 or more keeps them few.
        """
        length = self.difficulty(step)
        sizes = [x.shape[1] for x in batch.values() if isinstance(x, torch.Tensor) and x.dim() > 1]
        if not sizes:
            raise ValueError("curriculum_learning: the batch has no tensor [rows, positions, ...] to shorten")
        return {
            k: x[:, :length] if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[1] == sizes[0] else x
            for k, x in batch.items()
        }


def _whole(key: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key}: {value!r}, required a whole number >= {least}")


def _check_discrete(what: str, difficulty: Any, max_step: Any) -> None:
    for key, values in (("difficulty", difficulty), ("max_step", max_step)):
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"{what}.{key}: {values!r}, required a list of whole numbers")
        for v in values:
            _whole(f"{what}.{key}", v, 1)
    if len(difficulty) != len(max_step) + 1:
        raise ValueError(
            f"{what}.max_step: {len(max_step)} steps for {len(difficulty)} difficulties, required one less than difficulties: the last one has no end"
        )
    if list(max_step) != sorted(set(max_step)):
        raise ValueError(f"{what}.max_step: {list(max_step)}, required rising steps")


__all__ = ["Curriculum", "DistributedLoader", "RepeatingLoader", "batches", "loader_for", "order"]
