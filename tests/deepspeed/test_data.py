"""Rows, ranks and positions; the curriculum."""

import types

import pytest
import ranks
import torch
from torch.utils.data import DistributedSampler

import fds
from fds.deepspeed.data import Curriculum, DistributedLoader, RepeatingLoader, loader_for, order


def rows_of(loader):
    return [batch.tolist() for batch in loader]


def flat(batches):
    return sorted(x for batch in batches for x in batch)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (3, 0), (0, 2)])
def test_global_batches_have_the_rows_of_torchs_sampler(seed, epoch):
    loaders = [DistributedLoader(range(24), 3, rank=r, ranks=2, seed=seed) for r in range(2)]
    for loader in loaders:
        loader.load_state_dict({"seed": seed, "epoch": epoch, "row": 0, "length": 24})
    mine = [rows_of(loader) for loader in loaders]
    theirs = []
    for r in range(2):
        sampler = DistributedSampler(range(24), num_replicas=2, rank=r, seed=seed)
        sampler.set_epoch(epoch)
        theirs.append(torch.tensor(list(sampler)).view(-1, 3).tolist())
    for step in range(4):
        assert {x for r in mine for x in r[step]} == {x for r in theirs for x in r[step]}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("length", "size", "n"), [(23, 2, 3), (24, 4, 2), (7, 4, 2), (5, 1, 4), (40, 3, 1)])
def test_an_epoch_has_every_row_once(length, size, n, drop_last):
    if drop_last and length < size * n:
        pytest.skip("no batch: refused, see below")
    loaders = [DistributedLoader(range(length), size, rank=r, ranks=n, drop_last=drop_last) for r in range(n)]
    found = [rows_of(loader) for loader in loaders]
    assert all([len(b) for b in r] == [len(b) for b in found[0]] for r in found)  # the same shapes on all ranks
    assert len(found[0]) == len(loaders[0])
    seen = sorted(x for r in found for b in r for x in b)
    if drop_last:
        assert len(seen) == len(set(seen)) == length // (size * n) * size * n
    else:
        assert set(seen) == set(range(length)) and len(seen) - length == -length % n


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize(("before", "after"), [((2, 3), (1, 4)), ((1, 4), (3, 2)), ((4, 1), (2, 2))])
def test_a_position_goes_on_under_other_ranks_and_batch_sizes(before, after, taken):
    n, size = before
    seen = []
    for loader in [DistributedLoader(range(36), size, rank=r, ranks=n, seed=5) for r in range(n)]:
        batches = iter(loader)
        seen += [x for _ in range(taken) for x in next(batches).tolist()]
        position = loader.state_dict()
    n, size = after
    for loader in [DistributedLoader(range(36), size, rank=r, ranks=n, seed=5) for r in range(n)]:
        loader.load_state_dict(position)
        seen += [x for batch in rows_of(loader) for x in batch]
        assert loader.state_dict() == {"seed": 5, "epoch": 1, "row": 0, "length": 36}
    assert set(seen) == set(range(36)) and len(seen) - 36 == -(36 - position["row"]) % n  # but for the end of the epoch


def test_a_position_is_saved_with_a_run(tmp_path):
    program, params = fds.functionalize(torch.nn.Linear(1, 1))
    data = [{"x": torch.tensor([float(i)])} for i in range(8)]
    step = fds.train_step(program, fds.optim.sgd(0.01), loss=lambda p, s, b: p(s, b["x"]).mean())
    loader, state = DistributedLoader(data, 2), step.init(params)
    batches = iter(loader)
    for _ in range(2):
        state, _ = step(state, next(batches))
    fds.save_state(tmp_path, step, state, extra={"data": loader.state_dict()})
    rest = [b["x"].tolist() for b in batches]
    again = DistributedLoader(data, 2)
    again.load_state_dict(fds.load_extra(tmp_path)["data"])
    assert [b["x"].tolist() for b in again] == rest and len(rest) == 2


def test_the_order_is_another_one_in_every_epoch_and_the_same_in_every_run():
    loader = DistributedLoader(range(10), 5)
    first, second = rows_of(loader), rows_of(loader)
    assert first != second and flat(first) == flat(second)
    assert rows_of(DistributedLoader(range(10), 5)) == first
    assert order(10, seed=0, epoch=0) != order(10, seed=1, epoch=0)


def test_the_position_counts_what_was_handed_out_not_what_workers_fetched():
    loader = DistributedLoader(range(12), 2, num_workers=2)
    batches = iter(loader)
    first = next(batches).tolist()
    assert loader.row == 2
    assert [first, *(b.tolist() for b in batches)] == rows_of(DistributedLoader(range(12), 2))


def test_collate_fn_and_configuration():
    config = types.SimpleNamespace(train_micro_batch_size_per_gpu=2, dataloader_drop_last=True)
    loader = loader_for(range(5), config, collate_fn=tuple, shuffle=False)
    assert list(loader) == [(0, 1), (2, 3)] and len(loader) == 2


def test_a_loader_that_was_restored_at_its_end_goes_on_with_the_next_epoch():
    loader = DistributedLoader(range(7), 3, drop_last=True)
    loader.load_state_dict({"seed": 0, "epoch": 0, "row": 6, "length": 7})  # one row is left: no batch
    repeated = RepeatingLoader(loader)
    assert next(repeated).tolist() == order(7, seed=0, epoch=1)[:3]


def test_repeating_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="gives no batch"):
        next(RepeatingLoader(x for x in ()))


def test_one_position_one_iterator():
    loader = DistributedLoader(range(8), 2)
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(ValueError, match="one position"):
        next(first)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((x for x in range(3)), {}, "generator has no length"),
        (range(8), {"batch_size": 0}, "batch_size=0"),
        (range(8), {"rank": 2, "ranks": 2}, "rank=2"),
        (range(8), {"seed": -1}, "seed=-1"),
        (range(8), {"num_workers": -1}, "num_workers=-1"),
        (range(0), {}, "0 rows"),
        (range(3), {"ranks": 2, "drop_last": True}, "3 rows, and a batch takes 4.*drop_last=False"),
    ],
)
def test_wrong_arguments(data, options, message):
    with pytest.raises(ValueError, match=message):
        DistributedLoader(data, **{"batch_size": 2, "rank": 0, "ranks": 1, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 9}, "length 9.*has 8"),
        ({"seed": 1}, "seed 1.*has 0"),
        ({"row": 8}, "row 8 of 8"),
        ({"epoch": -1}, "epoch -1"),
        ({"more": 1}, "'more'.*unknown"),
    ],
)
def test_wrong_positions(change, message):
    loader = DistributedLoader(range(8), 2)
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})


def _of_this_rank():
    loader = DistributedLoader(range(12), 2)
    return [batch.tolist() for batch in loader]


def test_ranks_are_those_of_the_job():
    first, second = ranks.run(2, _of_this_rank)
    assert flat(first + second) == list(range(12))
    one = rows_of(DistributedLoader(range(12), 4))
    assert [a + b for a, b in zip(first, second, strict=True)] == one  # n ranks see the global batches of one


# --- curriculum ---


def section(kind="fixed_linear", low=8, high=64, **config):
    return {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": low,
        "max_difficulty": high,
        "schedule_type": kind,
        "schedule_config": config,
    }


# Difficulties at the given steps, as DeepSpeed 0.19.8's CurriculumScheduler gives them (test_peer_tools.py asks it anew).
STEPS = (1, 2, 3, 5, 7, 10, 11, 100)
SCHEDULES = [
    (section(total_curriculum_step=10, difficulty_step=8), (8, 16, 24, 32, 40, 64, 64, 64)),
    (section("fixed_root", total_curriculum_step=10, difficulty_step=8, root_degree=2), (24, 32, 32, 40, 48, 64, 64, 64)),
    (section("fixed_root", low=5, high=70, total_curriculum_step=50, difficulty_step=16, root_degree=3), (16, 16, 16, 32, 32, 32, 32, 70)),
    (section("fixed_discrete", difficulty=[1, 2, 3], max_step=[5, 10]), (1, 1, 1, 1, 2, 2, 3, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), SCHEDULES)
def test_difficulties_are_deepspeeds(given, expected):
    curriculum = Curriculum.of(given)
    assert tuple(curriculum.difficulty(step) for step in STEPS) == expected


def test_a_curriculum_of_ones_own():
    assert Curriculum.of(section("custom"), custom=lambda step: 3 * step).difficulty(4) == 12


def test_sequences_are_cut_and_nothing_else_is():
    batch = {"input_ids": torch.arange(40).view(2, 20), "labels": torch.zeros(2, 20), "weight": torch.ones(2), "image": torch.ones(2, 3), "name": "x"}  # fmt: skip
    short = Curriculum.of(section(total_curriculum_step=10, difficulty_step=8)).shorten(batch, 1)
    shapes = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in short.items()}
    assert shapes == {"input_ids": (2, 8), "labels": (2, 8), "weight": (2,), "image": (2, 3), "name": "x"}
    assert torch.equal(short["input_ids"], batch["input_ids"][:, :8])
    with pytest.raises(ValueError, match="no tensor"):
        Curriculum.of(section(total_curriculum_step=10, difficulty_step=8)).shorten({"weight": torch.ones(2)}, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**section(), "min_dificulty": 1}, "curriculum_learning.min_dificulty.*min_difficulty"),
        ({k: v for k, v in section().items() if k != "max_difficulty"}, "max_difficulty: missing"),
        (section("linear"), "schedule_type: 'linear'.*fixed_linear"),
        (section(low=65, total_curriculum_step=1, difficulty_step=8), "min_difficulty: 65"),
        (section(low=0, total_curriculum_step=1, difficulty_step=8), "min_difficulty: 0"),
        (section(difficulty_step=8), "schedule_config.total_curriculum_step: missing"),
        (section(total_curriculum_step=1, difficulty_step=8, root_degree=2), "schedule_config.root_degree: no such key"),
        (section(total_curriculum_step=0, difficulty_step=8), "total_curriculum_step: 0"),
        (section("fixed_root", total_curriculum_step=1, difficulty_step=8, root_degree=0), "root_degree: 0"),
        (section("fixed_discrete", difficulty=[1, 2], max_step=[5, 10]), "max_step: 2 steps for 2"),
        (section("fixed_discrete", difficulty=[1, 2, 3], max_step=[10, 5]), "rising"),
        (section("fixed_discrete", difficulty=3, max_step=[10]), "difficulty: 3, required a list"),
        (section("custom"), "'custom' and a function"),
        ({**section(total_curriculum_step=1, difficulty_step=8), "curriculum_type": "vocab"}, "curriculum_type: 'vocab'"),
    ],
)  # fmt: skip
def test_wrong_curricula_name_the_key(given, message):
    with pytest.raises(ValueError, match=message):
        Curriculum.of(given)
