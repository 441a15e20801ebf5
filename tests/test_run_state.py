"""States of runs: written under one mesh and placement, read under every other, whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import attrs
import optree
import pytest
import ranks
import torch
from torch import nn

import fds
from fds import optim, tree
from fds.layout import Box, cut
from fds.offload import FileStore, HostStore, handles
from fds.optim.base import Optimizer, hyperparams
from fds.optim.rules import RuleState


class Odd(nn.Module):
    """Blocks of odd sizes, two dtypes, a frozen leaf, a leaf without dimensions, one without elements, buffers."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(5, 7), nn.Conv1d(3, 2, 3), nn.BatchNorm1d(3))  # noqa: E731
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.low = nn.Parameter(torch.randn(11, 3, dtype=torch.bfloat16))
        self.number = nn.Parameter(torch.tensor(0.75))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.blocks[1][0].weight.requires_grad_(False)

    def forward(self, x):
        return x


def marked():
    """An optimizer whose state says what it belongs to: moments of 2 and 3 times the parameter."""

    def init(params):
        moments = {k: tree.map(lambda p, f=f: f * p.detach().float(), params) for k, f in (("two", 2), ("three", 3))}
        return RuleState(torch.tensor(7), moments, hyperparams(rate=0.125))

    return Optimizer(init, lambda grads, state, params, **_: (grads, state))


def axis():
    return fds.sharding.mesh(dp=-1)["dp"]


# A chain of one rule wherever it stands: its state has the same names.
LAYOUTS = {
    "plain": lambda store: ([], optim.chain(marked())),
    "replicate": lambda store: ([fds.replicate(axis()), fds.checkpoint()], optim.chain(optim.offloaded(marked()))),
    "shard": lambda store: ([fds.shard(axis())], optim.chain(marked())),
    "threshold": lambda store: ([fds.shard(axis(), threshold=8), fds.checkpoint()], optim.offloaded(optim.chain(marked()))),
    "offload": lambda store: ([fds.shard(axis()), fds.offload(store)], optim.streamed(optim.chain(marked()), store)),
    "some": lambda store: ([fds.offload(store, match="blocks.0")], optim.streamed(optim.chain(marked()), store, bucket_bytes=40)),
    "zero1": lambda store: ([], optim.sharded(optim.chain(marked()), axis())),
    "zero1-away": lambda store: ([fds.offload("cpu")], optim.sharded(optim.streamed(optim.chain(marked()), store, bucket_bytes=0), axis())),
}  # fmt: skip


def odd(layout, store, *more):
    torch.manual_seed(0)
    program, params = fds.functionalize(Odd(), sites="blocks.*")
    chain, tx = LAYOUTS[layout](store)
    return fds.train_step(fds.chain(*more, *chain)(program), tx), params


def values(state):
    return [handles.read(x) if handles.is_handle(x) else x for x in tree.flat(state)]


def equal(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))


def write_all(directory):
    for name in LAYOUTS:
        with HostStore() as store:
            step, params = odd(name, store)
            fds.save_state(Path(directory) / name, step, step.init(params), extra={"row": 3})


def read_some(directory, turn):
    """The layouts whose state is not what `init` makes of the parameters there; each reads one or two of the others, in turns."""
    wrong = []
    for i, name in enumerate(LAYOUTS):
        with HostStore() as store:
            step, params = odd(name, store)
            want = step.init(params)
            for j, other in enumerate(LAYOUTS):
                if (i + j - turn) % 7 == 0:
                    got = fds.load_state(Path(directory) / other, step)
                    if not equal(got, want) or optree.tree_structure(got) != optree.tree_structure(want):
                        wrong.append((other, name))
    return wrong


def test_every_layout_reads_every_other_on_any_number_of_ranks(tmp_path):
    """Moments that are multiples of the parameters: where an element went astray, `init` under the other layout differs."""
    write_all(tmp_path / "1")
    for n in (2, 4):
        ranks.run(n, write_all, str(tmp_path / str(n)))
    for turn, (m, n) in enumerate([(1, 1), (1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]):
        where = str(tmp_path / str(n)), turn
        assert (ranks.run(m, read_some, *where) if m > 1 else [read_some(*where)]) == [[]] * m, (n, m)
    assert fds.load_extra(tmp_path / "4" / "plain") == {"row": 3}


def test_a_cut_of_a_box_is_its_elements_in_order():
    x = torch.arange(2 * 3 * 4).view(2, 3, 4)
    for start in range(25):
        for stop in range(start, 25):
            boxes = list(cut(Box("x", (0, 0, 0), (2, 3, 4)), start, stop, at=5))
            parts = [x[tuple(slice(o, o + s) for o, s in zip(b.offsets, b.sizes, strict=True))] for b in boxes]
            assert torch.cat([p.reshape(-1) for p in parts] or [x.new_empty(0)]).tolist() == list(range(start, stop))
            assert [b.at for b in boxes] == [5 + int(p.reshape(-1)[0]) - start for p in parts] and len(boxes) <= 5


def split(family, n):
    """Tensor parallelism over pairs of ranks, shards over the rest; on one process neither."""
    import zoo

    mesh = fds.sharding.mesh(dp=-1, tp=min(n, 2))
    program, params = fds.functionalize(zoo.build(family))
    both = fds.chain(fds.tensor_parallel(mesh["tp"]), fds.shard(mesh["dp"])) if n > 1 else fds.chain()
    return fds.train_step(both(program), marked()), params


def write_split(directory, family, n):
    step, params = split(family, n)
    fds.save_state(directory, step, step.init(params))


def read_split(directory, family, n):
    step, params = split(family, n)
    return equal(fds.load_state(directory, step), step.init(params))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral"])
def test_split_leaves_go_to_other_meshes(tmp_path, family):
    """Of grouped heads, of fused ones in [in, out] weights, whose rows have three ranges each, of experts."""
    for m, n in ((4, 1), (1, 4), (2, 4)):
        where = str(tmp_path / f"{m}-{n}")
        ranks.run(m, write_split, where, family, m) if m > 1 else write_split(where, family, m)
        assert all(ranks.run(n, read_split, where, family, n) if n > 1 else [read_split(where, family, n)]), (m, n)


# --- training goes on ---

RUNS = {
    "shard": lambda store: ([fds.shard(axis()), fds.checkpoint()], lambda tx: tx),
    "zero1": lambda store: ([], lambda tx: optim.sharded(tx, axis())),
    "replicate": lambda store: ([fds.replicate(axis())], optim.offloaded),
    "offload": lambda store: ([fds.shard(axis()), fds.offload(store)], lambda tx: optim.streamed(tx, store, bucket_bytes=200)),
    "tensor": lambda store: ([fds.tensor_parallel(two_axes()["tp"], {"blocks.*.0": "column", "blocks.*.2": "row"}), fds.shard(two_axes()["dp"])], lambda tx: tx),
}  # fmt: skip


def two_axes():
    return fds.sharding.mesh(dp=-1, tp=2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 50), nn.Tanh(), nn.Linear(50, 8)) for _ in range(2))

    def forward(self, x):
        for b in self.blocks:
            x = x + b(x)
        return x


def net():
    torch.manual_seed(0)
    return fds.functionalize(Net(), sites="blocks.*")


def error(program, stored, batch):
    return (program(stored, batch["x"]) - batch["x"].flip(1)).square().mean()


def trained(run, store):
    program, params = net()
    chain, placed = RUNS[run](store)
    train = fds.chain(fds.lora(rank=2, targets="*.0"), fds.cast("float64"), *chain)(program)
    return fds.train_step(train, placed(optim.adamw(1e-2)), loss=error, seed=3), params


def steps(step, state, which):
    losses, a = [], two_axes()["dp"] if "tensor_parallel" in repr(step.program) else axis()
    for i in which:
        rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(i)).chunk(a.size)[a.rank]
        state, metrics = step(state, {"x": rows})
        losses.append(float(metrics["loss"]))
    return state, losses


def begun(directory, run):
    with HostStore() as store:
        step, params = trained(run, store)
        state, _ = steps(step, step.init(params), range(2))
        fds.save_state(Path(directory) / run, step, state)
        return steps(step, state, range(2, 5))[1]


def gone_on(directory, run, under):
    with HostStore() as store:
        step, _ = trained(under, store)
        return steps(step, fds.load_state(Path(directory) / run, step), range(2, 5))[1]


def test_the_loss_goes_on_under_another_mesh(tmp_path):
    where = str(tmp_path)
    for n, run, m, under in [
        (2, "shard", 1, "offload"),
        (2, "zero1", 4, "shard"),
        (4, "offload", 2, "replicate"),
        (2, "shard", 2, "shard"),
        (4, "tensor", 2, "shard"),
        (1, "offload", 4, "tensor"),
    ]:
        want = ranks.run(n, begun, where, run)[0] if n > 1 else begun(where, run)
        got = ranks.run(m, gone_on, where, run, under)[0] if m > 1 else gone_on(where, run, under)
        assert got == want if (n, run) == (m, under) else got == pytest.approx(want, abs=1e-6), (run, under)
        assert len(set(want)) == 3


# --- what is written ---


def written(directory):
    with HostStore() as store:
        step, params = odd("shard", store)
        fds.save_state(directory, step, step.init(params))


def test_a_rank_writes_its_part_once_and_other_readers_open_it(tmp_path):
    from safetensors.torch import load_file

    ranks.run(4, written, str(tmp_path))
    manifest = json.loads((tmp_path / "0" / "manifest.json").read_text())
    assert manifest["ranks"] == 4 and manifest["step"] == 0 and manifest["program"] == []
    files = {f: load_file(tmp_path / "0" / f) for f in manifest["files"]}
    total = sum(x.nbytes for f in files.values() for x in f.values())
    step, params = odd("plain", None)
    assert total == tree.nbytes(tuple(step.init(params)))  # nothing twice, no padding
    assert len(files) == 4 and max(sum(x.nbytes for x in f.values()) for f in files.values()) < 0.45 * total
    name = "params/blocks.0.0.weight"
    got = torch.full((7, 5), torch.nan)
    for file, key, offsets, sizes, _ in manifest["leaves"][name]["pieces"]:
        got[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = files[file][key]
    assert torch.equal(got, params["blocks.0.0.weight"])


def test_one_piece_at_a_time(tmp_path, monkeypatch):
    """No rank holds more than its part, a leaf and `AHEAD`: nothing larger than a leaf is made for writing, and without `AHEAD` a piece is
    gone when the next comes."""
    import weakref

    from fds import state_files

    with FileStore(tmp_path / "store") as store:
        step, params = odd("offload", store)
        state, alive = step.init(params), [weakref.ref(torch.zeros(1))]
        largest = max(x.nbytes for x in params.values()) * 2  # moments of bfloat16 leaves are float32

        def watched(f):
            def run(*args):
                out = f(*args)
                assert alive[-1]() is None and out.nbytes <= largest
                alive.append(weakref.ref(out))
                return out

            return run

        monkeypatch.setattr(state_files, "AHEAD", 0)
        monkeypatch.setattr(state_files.Saver, "resolve_data", watched(state_files.Saver.resolve_data))
        fds.save_state(tmp_path / "state", step, state)
        assert len(alive) > 20
        alive[:] = alive[:1]
        monkeypatch.setattr(
            state_files, "checksum", lambda x, f=state_files.checksum: alive.append(weakref.ref(x)) or f(x)
        )
        read = state_files.Reader._read
        monkeypatch.setattr(state_files.Reader, "_read", lambda *a: (any(r() is not None for r in alive) and pytest.fail(), read(*a))[1])  # fmt: skip
        assert equal(fds.load_state(tmp_path / "state", step), state) and len(alive) > 20


# --- saves ---


def small():
    program, params = fds.functionalize(nn.Linear(3, 2))
    step = fds.train_step(program, optim.sgd(0.1, momentum=0.5), loss=lambda p, s, b: p(s, b["x"]).square().mean())
    return step, step.init(params)


def test_tags_and_what_is_kept(tmp_path):
    step, state = small()
    for i in range(4):
        fds.save_state(tmp_path, step, state._replace(step=torch.tensor(i)), keep=2, extra={"i": i})
    assert {p.name for p in tmp_path.iterdir()} == {"state.json", "2", "3"}
    fds.save_state(tmp_path, step, state._replace(step=torch.tensor(10)), tag="best")
    fds.save_state(tmp_path, step, state._replace(step=torch.tensor(11)), tag="2")  # replaces the one of step 2
    assert int(fds.load_state(tmp_path, step).step) == 11
    assert int(fds.load_state(tmp_path, step, tag="best").step) == 10
    assert fds.load_extra(tmp_path, tag="3") == {"i": 3} and fds.load_extra(tmp_path) == {}
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ValueError, match="did you mean 'best'"):
        fds.load_state(tmp_path, step, tag="bst")
    for wrong in ("a/b", "", "..", "state.json", 3):
        with pytest.raises(ValueError, match="plain name"):
            fds.save_state(tmp_path, step, state, tag=wrong)
    with pytest.raises(ValueError, match="keep=0"):
        fds.save_state(tmp_path, step, state, keep=0)
    for wrong in ({"a": (1, 2)}, {"a": torch.zeros(1)}, {1: 2}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="JSON"):
            fds.save_state(tmp_path, step, state, extra=wrong)


def test_what_is_no_step_and_no_switch_is_refused(tmp_path):
    step, state = small()
    for call in (lambda: fds.save_state(tmp_path, step.program, state), lambda: fds.load_state(tmp_path, step.program)):
        with pytest.raises(ValueError, match=r"step is a Program, required what fds.train_step returned"):
            call()
    with pytest.raises(ValueError, match="keep=True"):
        fds.save_state(tmp_path, step, state, keep=True)
    with pytest.raises(ValueError, match="asynchronous='no', required True or False"):  # which is true
        fds.save_state(tmp_path, step, state, asynchronous="no")
    assert not list(tmp_path.iterdir())
    fds.save_state(tmp_path, step, state)
    with pytest.raises(ValueError, match="tag=0, required a plain name"):
        fds.load_state(tmp_path, step, tag=0)


def each_its_own(directory, rows):
    """Nothing reduces over the ranks: they stay the same if they see the same rows."""
    step, state = small()
    state, _ = step(state, {"x": torch.full((2, 3), float(1 + (0 if rows == "same" else axis().rank)))})
    try:
        fds.save_state(directory, step, state)
    except ValueError as error:
        return str(error)
    return equal(fds.load_state(directory, step), state)


def test_ranks_that_have_gone_apart_are_not_mixed(tmp_path):
    assert ranks.run(2, each_its_own, str(tmp_path / "same"), "same") == [True, True]
    for said in ranks.run(2, each_its_own, str(tmp_path / "own"), "own"):
        assert (
            "'params/bias' is not the same on ranks 0 and 1" in said
            or "'params/weight' is not the same on ranks 0 and 1" in said
        )
        assert "put shard(axis) or replicate(axis) into its chain" in said
    assert not list((tmp_path / "own").glob("*"))


def no_directory_on_one(directory):
    step, state = small()
    Path(directory, "file").touch()
    where = Path(directory, "file" if axis().rank == 1 else "folder")
    try:
        fds.save_state(where, step, state)
    except ValueError as error:
        return str(error)


def test_a_directory_that_one_rank_cannot_make_fails_on_all(tmp_path):
    first, second = ranks.run(2, no_directory_on_one, str(tmp_path), timeout=60)
    assert "rank 1 failed: ValueError" in first and "file: is a file, required a directory" in first
    assert "is a file, required a directory" in second


def test_nothing_is_a_fresh_start(tmp_path):
    step, state = small()
    with pytest.raises(ValueError, match="no checkpoint"):
        fds.load_state(tmp_path, step)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "mine.txt").write_text("not a save")
    fds.save_state(tmp_path, step, state)
    assert (tmp_path / "0" / "mine.txt").exists() and (tmp_path / "0.1" / "manifest.json").exists()


def test_missing_and_surplus_leaves_are_listed(tmp_path):
    step, state = small()
    fds.save_state(tmp_path, step, state)
    other = fds.train_step(step.program, optim.adamw(0.1))
    with pytest.raises(ValueError) as error:
        fds.load_state(tmp_path, other)
    for name in ("optimizer/moments/mu/bias", "optimizer/moments/nu/weight", "optimizer/moments/momentum/weight"):
        assert name in str(error.value)
    program, _ = fds.functionalize(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"'params/weight' has \(2, 3\) torch.float32, required \(2, 4\)"):
        fds.load_state(tmp_path, fds.train_step(program, step.tx))
    with pytest.raises(ValueError, match="saved under"):
        fds.load_state(tmp_path, fds.train_step(fds.cast("bfloat16")(step.program), step.tx))


def test_a_damaged_file_is_named(tmp_path):
    step, state = small()
    fds.save_state(tmp_path, step, state)
    data, manifest = tmp_path / "0" / "rank-00000.safetensors", tmp_path / "0" / "manifest.json"
    for file in (data, manifest):
        whole = file.read_bytes()
        swapped = bytes([whole[-5] ^ 1])
        for bad in (whole[:-1], whole[:-5] + swapped + whole[-4:], b"", pickled_bomb()):
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=file.name):
                fds.load_state(tmp_path, step)
        file.unlink()
        with pytest.raises(ValueError, match=file.name):
            fds.load_state(tmp_path, step)
        file.write_bytes(whole)
    assert equal(fds.load_state(tmp_path, step), state)


def pickled_bomb():
    import pickle

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    return pickle.dumps(Bomb())


def test_a_layout_lens_before_one_that_is_none_is_refused(tmp_path):
    double = fds.through(
        lambda spec: fds.Lens(lambda p: {k: 2 * v for k, v in p.items()}, lambda s: {k: v / 2 for k, v in s.items()}),
        name="double",
    )
    program, params = fds.functionalize(nn.Linear(3, 2))
    step = fds.train_step(fds.chain(fds.shard(axis()), double)(program), optim.sgd(0.1))
    with pytest.raises(ValueError, match="put it before"):
        fds.save_state(tmp_path, step, step.init(params))
    split = fds.through(lambda spec: fds.Lens(dict, dict, axes={k: (axis(),) for k in spec}), name="split")
    other = fds.train_step(split(program), optim.sgd(0.1))
    with pytest.raises(ValueError, match="splits leaves over ranks"):
        fds.save_state(tmp_path, other, other.init(params))
    step = fds.train_step(fds.chain(double, fds.shard(axis()))(program), optim.sgd(0.1))
    fds.save_state(tmp_path, step, step.init(params))
    assert equal(fds.load_state(tmp_path, step), step.init(params))


def blocks_of_8_bits(directory, run):
    with HostStore() as store:
        program, params = net()
        step = fds.train_step(fds.chain(*RUNS[run](store)[0])(program), optim.adamw8bit(1e-2), loss=error)
        state, _ = steps(step, step.init(params), range(1))
        fds.save_state(directory, step, state)
        return equal(fds.load_state(directory, step), state)


def test_state_in_blocks_goes_on_where_the_blocks_are_the_same(tmp_path):
    assert ranks.run(2, blocks_of_8_bits, str(tmp_path / "whole"), "replicate") == [True, True]
    assert ranks.run(2, blocks_of_8_bits, str(tmp_path / "shard"), "shard") == [True, True]
    step = fds.train_step(net()[0], optim.adamw8bit(1e-2), loss=error)
    assert int(fds.load_state(tmp_path / "whole", step).optimizer.updates) == 1
    with pytest.raises(ValueError, match=r"1 of 2.*same layout"):
        fds.load_state(tmp_path / "shard", step)


def test_parts_of_a_state_that_share_a_number_have_to_agree():
    """As the count of updates in every part of a divided state, which the files have once."""
    from fds.layout import whole
    from fds.state_entries import Entry
    from fds.state_files import Saver

    cpu = torch.device("cpu")
    count = Entry((2,), torch.float32, whole("optimizer/updates", (2,)), {"optimizer/updates": (2,)}, cpu)
    for other, fails in ((torch.ones(2), False), (torch.tensor([1.0, 2.0]), True)):
        saver = Saver([attrs.evolve(count, path="a"), attrs.evolve(count, path="b")])
        saver.set_up_planner({"a": torch.ones(2), "b": other})
        if fails:
            with pytest.raises(ValueError, match="optimizer/updates: b and a differ"):
                saver.create_local_plan()
        else:
            assert len(saver.create_local_plan().items) == 1


# --- in the background ---


def in_background(directory):
    """The step goes on and overwrites its state; what is written is what was there at the call."""
    program, params = net()
    step = fds.train_step(fds.shard(program, axis()), optim.adamw(1e-2), loss=error)
    state, _ = steps(step, step.init(params), range(1))
    want = tree.map(torch.clone, state)
    future = fds.save_state(directory, step, state, asynchronous=True, keep=1)
    for x in tree.leaves(state):
        x.zero_()
        x.set_()  # as a donated state ends
    state, _ = steps(step, want, range(1, 3))  # collectives of the step meanwhile
    future.result()
    same = equal(fds.load_state(directory, step), want)
    fds.save_state(directory, step, state, asynchronous=True, keep=1)
    fds.save_state(directory, step, state, tag="last")  # waits
    return same and equal(fds.load_state(directory, step, tag="3"), state)


def test_a_save_in_the_background(tmp_path):
    assert in_background(tmp_path / "one")
    assert ranks.run(2, in_background, str(tmp_path / "two")) == [True, True]
    assert len(list((tmp_path / "two").iterdir())) == 3
    with HostStore() as store:
        step, params = odd("offload", store)
        with pytest.raises(ValueError, match="in a store"):
            fds.save_state(tmp_path / "three", step, step.init(params), asynchronous=True)


def fails_in_background(directory):
    """Rank 1 cannot write its file: the future says so on both; the next save too where nobody asked."""
    from fds import state_files

    step, params = odd("shard", None)
    write, said = state_files.Writer.write_data, []
    if axis().rank == axis().size - 1:
        state_files.Writer.write_data = lambda *_: Path(f"{directory}/no/such/folder").touch()
    try:
        for ask in (True, False):
            future = fds.save_state(directory, step, step.init(params), asynchronous=True)
            if ask:
                said.append(str(future.exception()))
        try:
            fds.save_state(directory, step, step.init(params))
        except (ValueError, OSError) as error:
            said.append(str(error))
    finally:
        state_files.Writer.write_data = write
    fds.save_state(directory, step, step.init(params))  # told once
    return said


def test_an_error_in_the_background_is_raised(tmp_path):
    for said in ([fails_in_background(tmp_path / "1")], ranks.run(2, fails_in_background, str(tmp_path / "2"))):
        for each in said:
            assert len(each) == 2 and all("no/such/folder" in s for s in each)
    assert {p.name for p in (tmp_path / "2").iterdir()} == {"state.json", "0"}


def test_a_save_in_the_background_without_its_process_group_counts_for_nothing(tmp_path, monkeypatch):
    """`destroy_process_group` before the future is done: each rank would take itself for the only one, and publish its part."""
    from fds import run_state, state_files

    step, state = small()
    fds.save_state(tmp_path, step, state, tag="good")
    listed = (tmp_path / "state.json").read_text()
    begin = state_files.Writer.__init__

    def of_two(self, *args):
        begin(self, *args)
        self.ranks = 2

    monkeypatch.setattr(state_files.Writer, "__init__", of_two)
    future = fds.save_state(tmp_path, step, state, tag="bad", keep=1, asynchronous=True)
    run_state.finish_saves()
    assert json.loads((tmp_path / "state.json").read_text())["saves"] == json.loads(listed)["saves"]
    with pytest.raises(ValueError, match=r"process group has ended before .* wait for its future"):
        future.result()
    assert equal(fds.load_state(tmp_path, step), state)


def test_an_error_that_nobody_asked_for_is_said_at_the_end(tmp_path, monkeypatch, caplog):
    from fds import run_state, state_files

    step, state = small()
    monkeypatch.setattr(state_files.Writer, "write_data", lambda *_: Path(tmp_path, "no", "such").touch())
    fds.save_state(tmp_path, step, state, asynchronous=True)
    run_state.finish_saves()
    run_state._last_words()
    assert "the last save in the background failed: FileNotFoundError" in caplog.text
    monkeypatch.undo()
    fds.save_state(tmp_path, step, state)  # told once


# --- kills ---

_KILLS = """
import json, os, random, signal, sys, time, torch, torch.distributed as dist, fds, fds.state_files
from datetime import timedelta
from test_run_state import killed_step
torch.set_num_threads(1)
where, n, moments, parent = sys.argv[1], int(sys.argv[2]), [float(x) for x in sys.argv[3:]], os.getpid()
last = 0
def changed(where):
    file = where + "/state.json"
    return json.load(open(file))["saves"] if os.path.exists(file) else []
for i, moment in enumerate(moments):
    children, before = [], changed(where)
    for rank in range(n):
        child = os.fork()
        if child == 0:
            os.environ |= {"WORLD_SIZE": str(n), "RANK": str(rank)}
            dist.init_process_group("gloo", init_method=f"file://{where}.{i}", world_size=n, rank=rank)
            step, state = killed_step()
            state = state._replace(step=state.step + last)
            while os.getppid() == parent:
                state = state._replace(step=state.step + 1)
                fds.save_state(where, step, state, keep=2, asynchronous=i % 2 == 1)
            os._exit(0)
        children.append(child)
    deadline = time.time() + 60
    while changed(where) == before and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(moment)
    random.Random(i).shuffle(children)
    for child in children:
        os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    for child in children:
        os.waitpid(child, 0)
    step, _ = killed_step()
    state = fds.load_state(where, step)
    assert int(state.step) >= last, (int(state.step), last)
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in fds.tree.leaves(state.params))
    last = int(state.step)
print(last)
"""


def killed_step():
    """Weights of 0.5 throughout, so that a torn file shows."""
    program, params = fds.functionalize(nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 1)))
    step = fds.train_step(fds.shard(program, axis()), optim.sgd(0.1))
    return step, step.init({k: torch.full_like(v, 0.5) for k, v in params.items()})


@pytest.mark.parametrize("times", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_of_all_ranks_leaves_a_checkpoint(tmp_path, times):
    """kill -9 of both ranks, one after the other, at moments of a loop of saves that nobody chose; read by one process."""
    import random

    import test_checkpoint

    draw = random.Random(times)
    moments = [f"{0.02 + 0.15 * draw.random():.4f}" for _ in range(times)]
    where = tmp_path / "state"
    out = subprocess.run(
        [sys.executable, "-c", _KILLS, str(where), "2", *moments],
        capture_output=True, text=True, env=test_checkpoint._env() | {"GLOO_SOCKET_IFNAME": "lo"}, timeout=500,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) >= len(moments), (
        "a save before each kill; the loop does nothing else, so kills fall into saves"
    )
    step, state = killed_step()
    fds.save_state(where, step, state, keep=1)
    assert {p.name for p in where.iterdir()} == {"state.json", "0"}  # the leftovers are gone
