"""Laws of the stores: every test runs on every kind of store, unless it is about one."""

import concurrent.futures
import contextlib
import errno
import gc
import itertools
import os
import random
import stat
import threading
import time
from concurrent.futures import Future, wait

import attrs
import pytest
import torch

from fds.offload.store import FileStore, HostStore, Reference, StoreError

KINDS = {
    "host": lambda path: HostStore(),
    "host-budget": lambda path: HostStore(64 << 20, window=2),
    "file": lambda path: FileStore(path),
    "file-verify": lambda path: FileStore(path, verify=True, window=2),
    "file-cache": lambda path: FileStore(path, budget=1 << 20),
    "file-one": lambda path: FileStore(path, window=1, budget=100, verify=True),
}
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.fixture(params=KINDS)
def store(request, tmp_path):
    with KINDS[request.param](tmp_path / "deep" / "down") as s:
        yield s


@pytest.fixture(params=[k for k in KINDS if k.startswith("file")])
def file_store(request, tmp_path):
    with KINDS[request.param](tmp_path) as s:
        yield s


def noise(*shape, dtype=torch.float32):
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def same(a, b):
    a, b = (t.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8) for t in (a.detach(), b.detach()))
    return torch.equal(a, b)


# --- values ---


def test_bitwise_the_same(store):
    shapes = [(), (1,), (3, 5, 7), (0,), (4, 0, 2), (1031,)]
    for i, (dtype, shape) in enumerate(itertools.product(DTYPES, shapes)):
        x = noise(*shape, dtype=dtype)
        reference = store.put(f"k{i}", x).result()
        assert (reference.key, reference.shape, reference.dtype) == (f"k{i}", shape, dtype)
        assert reference.nbytes == x.nbytes
        for out in (None, torch.empty_like(x)):
            got = store.get(reference, out).result()
            assert got.shape == x.shape and got.dtype == dtype and same(got, x)
            assert out is None or got is out


@pytest.mark.parametrize("n", [4095, 4096, 4097, 8 << 20, (8 << 20) + 5])
def test_sizes_around_sectors_and_parts(store, n):
    x = noise(n, dtype=torch.uint8)
    reference = store.put("x", x).result()
    assert torch.equal(store.get(reference).result(), x)
    shifted = torch.empty(n + 1, dtype=torch.uint8)[1:]  # at an address that suits no disk
    assert torch.equal(store.get(reference, shifted).result(), x)
    assert torch.equal(store.get(store.put("y", shifted).result()).result(), x)


def test_tensors_that_are_not_contiguous(store):
    base, z = noise(6, 8), torch.randn(4, 4, dtype=torch.complex64)
    cases = [
        base.t(),
        base[::2, 1::3],
        base[:, 3],
        base[0].expand(5, 8),
        z.conj(),
        z.conj().imag,
        base.requires_grad_(),
    ]
    for i, x in enumerate(cases):
        reference = store.put(f"k{i}", x).result()
        got = store.get(reference).result()
        assert same(got, x) and got.is_contiguous() and not got.requires_grad
        into = torch.zeros([2 * n for n in x.shape], dtype=x.dtype)[tuple(slice(None, None, 2) for _ in x.shape)]
        assert store.get(reference, into).result() is into and same(into, x)
    leaf = torch.nn.Parameter(torch.zeros(6, 8))
    assert same(store.get(reference, leaf).result(), base)


def test_autograd_sees_that_out_was_written(store):
    reference = store.put("x", torch.ones(3)).result()
    out, w = torch.zeros(3), torch.ones(3, requires_grad=True)
    y = (w * out).sum()
    store.get(reference, out).result()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_comes_back_is_the_callers_own(store):
    x = torch.ones(100)
    reference = store.put("x", x).result()
    x.zero_()  # allowed: the future is resolved
    store.get(reference).result().fill_(7)
    assert store.get(reference).result().eq(1).all()
    assert store.get(reference).result().eq(1).all()


def test_keys_never_meet(store):
    names = [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a_b",
        "a%2Fb",
        "a\0b",
        "A",
        "a",
        "lock",
        "\u00e4",
        "a\u0308",
        "k" * 5000,
        "\n",
        "\udcff",
    ]
    references = [store.put(k, torch.full((3,), i)) for i, k in enumerate(names)]
    wait(references)
    assert store.keys() == sorted(names)
    for i, r in enumerate(references):
        assert store.get(r.result()).result().tolist() == [i] * 3


# --- generations ---


def test_a_stale_reference_raises(store):
    first = store.put("layers.0.weight", torch.zeros(3)).result()
    second = store.put("layers.0.weight", torch.ones(3)).result()
    assert second.generation > first.generation
    with pytest.raises(
        StoreError, match=f"generation {first.generation}.*current one is {second.generation}.*last put"
    ) as e:
        store.get(first)
    assert e.value.errno == errno.ESTALE and e.value.key == "layers.0.weight"
    assert store.get(second).result().eq(1).all()


def test_a_reference_of_another_store_raises(store):
    with HostStore() as other:
        foreign = other.put("x", torch.zeros(3)).result()
        store.put("x", torch.ones(3)).result()
        with pytest.raises(StoreError, match="ask that store") as e:
            store.get(foreign)
        assert e.value.errno == errno.ESTALE


def test_a_reference_of_another_shape_or_dtype_raises(store):
    reference = store.put("x", torch.zeros(6)).result()
    for change in ({"shape": (2, 3)}, {"dtype": torch.int32}):
        with pytest.raises(StoreError, match="held as"):
            store.get(attrs.evolve(reference, **change))


@pytest.mark.parametrize("out", [torch.zeros(5), torch.zeros(6, dtype=torch.float64), torch.zeros(2, 3), [0.0] * 6])
def test_an_out_that_does_not_fit_raises(store, out):
    reference = store.put("x", torch.zeros(6)).result()
    with pytest.raises(ValueError, match="out is"):
        store.get(reference, out)


def test_deleted_keys(store):
    reference = store.put("weight", torch.zeros(6)).result()
    store.put("other", torch.zeros(3)).result()
    with pytest.raises(StoreError, match="did you mean 'weight'"):
        store.delete("weigth")
    store.delete("weight")
    assert store.keys() == ["other"] and store.nbytes == 12
    with pytest.raises(StoreError, match="deleted") as e:
        store.get(reference)
    assert e.value.errno == errno.ENOENT
    again = store.put("weight", torch.ones(6)).result()
    with pytest.raises(StoreError, match="current one"):
        store.get(reference)
    assert again.generation > reference.generation and store.get(again).result().eq(1).all()


def test_the_last_put_begun_wins(store):
    for _ in range(3):
        puts = [store.put("x", torch.full((1000,), i)) for i in range(20)]
        last = [p.result() for p in puts][-1]
        assert store.get(last).result().eq(19).all()
        assert store.nbytes == 8000
        with pytest.raises(StoreError, match="current one"):
            store.get(puts[0].result())


def test_a_delete_takes_the_puts_under_way_with_it(store):
    for i in range(8):
        puts = [store.put("x", torch.full((1000,), i)) for _ in range(4)]
        with contextlib.suppress(StoreError):  # all were done already, and one delete takes them all
            store.delete("x")
        wait(puts)
        assert store.keys() == [] and store.nbytes == 0
    assert store.get(store.put("x", torch.ones(3)).result()).result().eq(1).all()


def test_a_read_that_has_begun_sees_its_generation_whole(store):
    reference = store.put("x", torch.zeros(100_000)).result()
    for i in range(1, 12):
        gets = [store.get(reference) for _ in range(3)]
        new = [store.put("x", torch.full((100_000,), float(j))) for j in (-i, i)]
        for g in gets:
            assert g.result().eq(i - 1).all()
        reference = new[-1].result()


def test_many_threads(store):
    """Every value is of one number; a mixture, or the number of another key, would be a torn or misplaced one."""
    errors, seed = [], random.randrange(1 << 30)

    def work(thread):
        draw, held = random.Random(seed + thread), {}
        try:
            for step in range(20):
                key = f"{thread}.{draw.randrange(3)}"
                if key not in held or draw.random() < 0.4:
                    number = thread * 1000 + step
                    n = draw.choice([10, 5000, 5001])
                    held[key] = number, store.put(key, torch.full((n,), number, dtype=torch.int32)).result()
                elif draw.random() < 0.1:
                    store.delete(key)
                    del held[key]
                else:
                    number, reference = held[key]
                    out = torch.empty(reference.shape, dtype=torch.int32) if draw.random() < 0.5 else None
                    assert store.get(reference, out).result().eq(number).all(), (key, number)
                shared = store.put("shared", torch.full((3000,), thread)).result()
                with contextlib.suppress(StoreError):
                    assert store.get(shared).result().eq(thread).all()
        except BaseException as e:
            errors.append((seed, e))

    threads = [threading.Thread(target=work, args=(t,)) for t in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors


# --- failures that nobody asked for ---


class Broken:
    """An engine whose writes fail while `broken`; the rest goes to a real one."""

    def __init__(self, engine):
        self.engine, self.broken, self.now, self.most = engine, True, 0, 0
        self.lock, self.gate = threading.Lock(), threading.Event()
        self.gate.set()

    def write(self, path, x, *, offset=0):
        if not self.broken:
            return self.engine.write(path, x, offset=offset)
        self.gate.wait(20)
        failed = Future()
        failed.set_exception(OSError(errno.EIO, "the disk is gone", path))
        return failed

    def read(self, path, out, *, offset=0):
        return self.engine.read(path, out, offset=offset)

    def close(self):
        self.engine.close()


@pytest.fixture
def broken(tmp_path):
    store = FileStore(tmp_path, verify=True)
    store._engine = Broken(store._engine)
    yield store
    with contextlib.suppress(StoreError):
        store.close()


def test_a_failed_put_says_so_and_keeps_the_value(broken):
    broken._engine.broken = False
    reference = broken.put("x", torch.ones(3)).result()
    broken._engine.broken = True
    with pytest.raises(
        StoreError, match=f"put of 'x', 12 bytes: the disk is gone; generation {reference.generation} is kept"
    ) as e:
        broken.put("x", torch.zeros(3)).result()
    assert e.value.errno == errno.EIO and e.value.key == "x" and e.value.filename.startswith(str(broken.path))
    assert isinstance(e.value, OSError) and isinstance(e.value.__cause__, OSError)
    with pytest.raises(StoreError, match=r"'y'.*it has no value"):
        broken.put("y", torch.zeros(3)).result()
    assert broken.get(reference).result().eq(1).all() and broken.keys() == ["x"] and broken.nbytes == 12


@pytest.mark.parametrize("call", [
    lambda s: s.put("y", torch.zeros(3)), lambda s: s.get(Reference("x", 1, (), torch.int8)), lambda s: s.delete("x"), lambda s: s.keys(), lambda s: s.close(),
], ids=["put", "get", "delete", "keys", "close"])  # fmt: skip
def test_a_failure_nobody_asked_for_is_told_by_the_next_call(broken, call):
    broken._engine.gate.clear()
    puts = [broken.put("x", torch.zeros(3)), broken.put("z", torch.zeros(3))]
    broken._engine.gate.set()
    wait(puts)
    with pytest.raises(StoreError, match=r"nobody asked its future \(1 more did\): .*the disk is gone"):
        call(broken)
    broken.close()  # told once


def test_a_failure_that_was_asked_for_is_not_told_again(broken):
    assert isinstance(broken.put("x", torch.zeros(3)).exception(), StoreError)
    with pytest.raises(StoreError):
        broken.put("x", torch.zeros(3)).result()
    heard = threading.Event()
    broken.put("x", torch.zeros(3)).add_done_callback(lambda f: (f.exception(), heard.set()))
    assert heard.wait(10)
    assert broken.keys() == []
    broken.close()


def test_a_failure_is_told_to_nobody_elses_put(tmp_path):
    """The engine tells its next caller of a failed write that nobody asked for: that must not be the put of another key."""
    with FileStore(tmp_path) as store:
        for _ in range(20):
            failed = store._asked(lambda: store._engine.write(tmp_path / "no" / "such", torch.zeros(3)))
            wait([failed])
            assert store.get(store.put("x", torch.ones(3)).result()).result().eq(1).all()
            assert isinstance(failed.exception(), OSError)


def test_who_waits_for_a_future_is_told_and_no_other_call(broken):
    broken._engine.gate.clear()
    put, told = broken.put("x", torch.zeros(3)), []
    with pytest.raises(concurrent.futures.TimeoutError):
        put.result(timeout=0.01)
    waiting = threading.Thread(target=lambda: told.append(put.exception()))
    waiting.start()
    while not put.asked:
        time.sleep(0.001)
    broken._engine.gate.set()
    wait([put])
    assert broken.keys() == []
    waiting.join()
    assert isinstance(told[0], StoreError)


def test_an_error_on_its_way_is_not_replaced_by_close(broken, caplog):
    with pytest.raises(KeyboardInterrupt), broken:
        wait([broken.put("x", torch.zeros(3))])
        raise KeyboardInterrupt
    assert "the disk is gone" in caplog.text


def test_a_store_nobody_closed_says_at_the_end_what_failed(tmp_path, caplog):
    from fds.offload import _keyed

    store = FileStore(tmp_path)
    store._engine = Broken(store._engine)
    wait([store.put("x", torch.zeros(3))])
    _keyed._last_words(store._failed, os.getpid())
    assert "the disk is gone" in caplog.text
    store.close()  # told once


def test_a_put_can_be_cancelled_while_it_waits(tmp_path):
    with HostStore(window=1) as store:
        gate = threading.Event()
        store._workers.submit(gate.wait)
        put = store.put("x", torch.zeros(3))
        assert put.cancel()
        gate.set()
        assert store.get(store.put("y", torch.ones(3)).result()).result().eq(1).all()
        assert store.keys() == ["y"]


# --- memory ---


def test_the_budget_of_a_host_store(tmp_path):
    with HostStore(100_000) as store:
        a = store.put("a", noise(10_000)).result()
        store.put("b", noise(15_000)).result()
        assert store.nbytes == 100_000
        with pytest.raises(
            StoreError, match=r"'c' needs 4 bytes more, 100000 are held .* the budget is 100000; raise it"
        ) as e:
            store.put("c", noise(1)).result()
        assert e.value.errno == errno.ENOSPC
        x = noise(10_000)
        a = store.put("a", x).result()  # in its own room
        with pytest.raises(StoreError, match="'a' needs 4 bytes more"):
            store.put("a", noise(10_001)).result()
        assert same(store.get(a).result(), x)
        store.delete("b")
        store.put("c", noise(15_000)).result()
        assert store.nbytes == 100_000


def test_a_budget_that_is_just_enough():
    """A value that is held is not counted among those on their way as well, however long its put takes to end."""
    with HostStore(40_000) as store:
        end = store._end_put
        store._end_put = lambda reference: (time.sleep(0.005), end(reference))
        for _ in range(2):
            for put in [store.put(f"k{i}", torch.zeros(1250)) for i in range(8)]:
                put.result()
        assert store.nbytes == 40_000


def test_puts_of_one_key_at_a_time_do_not_exceed_the_budget():
    with HostStore(1000, window=3) as store:
        store.put("a", torch.zeros(800, dtype=torch.int8)).result()
        gate, copy = threading.Event(), store._places.take
        store._places.take = lambda n: (gate.wait(20) if n == 800 else None, copy(n))[1]
        large = store.put("a", torch.ones(800, dtype=torch.int8))
        while not store._coming:
            time.sleep(0.001)
        with pytest.raises(StoreError, match="'b' needs 500 bytes more, 800 are held and 0 on their way"):
            store.put("b", torch.zeros(500, dtype=torch.int8)).result()
        small = store.put("a", torch.zeros(100, dtype=torch.int8)).result()
        with pytest.raises(StoreError, match="'b' needs 500 bytes more, 100 are held and 700 on their way"):
            store.put("b", torch.zeros(500, dtype=torch.int8)).result()
        gate.set()
        large.result()
        assert store.get(small).result().eq(0).all() and store.nbytes == 100
        store.put("b", torch.zeros(500, dtype=torch.int8)).result()


@pytest.mark.parametrize("bad", [-1, 1.5, True, "8GB"])
def test_budgets_and_windows_that_are_none(tmp_path, bad):
    for make in (
        lambda: HostStore(bad),
        lambda: FileStore(tmp_path, budget=bad),
        lambda: FileStore(tmp_path, window=bad),
    ):
        with pytest.raises(ValueError, match="required"):
            make()
    assert not list(tmp_path.iterdir())


def test_hot_keys_come_from_memory(tmp_path):
    with FileStore(tmp_path, budget=3000) as store:
        refs = [store.put(f"k{i}", torch.full((1000,), i, dtype=torch.int8)).result() for i in range(3)]
        store.get(refs[0]).result()  # used last, after 1 and 2
        refs.append(store.put("k3", torch.full((1000,), 3, dtype=torch.int8)).result())
        assert store.cached_nbytes == 3000 and store.nbytes == 4000
        assert len(list(store.path.iterdir())) == 4  # written through
        for f in store.path.iterdir():
            f.unlink()
        for i in (0, 2, 3):
            assert store.get(refs[i]).result().eq(i).all()
        with pytest.raises(StoreError):
            store.get(refs[1]).result()
        store.put("large", torch.zeros(3001, dtype=torch.int8)).result()
        assert store.cached_nbytes == 3000
        store.delete("k0")
        assert store.cached_nbytes == 2000
        store.put("k2", torch.zeros(10, dtype=torch.int8)).result()
        assert store.cached_nbytes == 1010


def test_a_read_makes_a_key_hot(tmp_path):
    with FileStore(tmp_path, budget=1000) as store:
        a = store.put("a", torch.ones(1000, dtype=torch.int8)).result()
        store.put("b", torch.zeros(1000, dtype=torch.int8)).result()
        store.get(a).result().zero_()
        (store.path / "00000001").unlink()
        assert store.get(a).result().eq(1).all() and store.cached_nbytes == 1000


def test_the_steady_state_makes_no_file(file_store):
    window = file_store._workers._max_workers
    sizes = [1000, 5000, 5001, 20_000]
    for _ in range(3):
        wait([file_store.put(f"k{i}", noise(sizes[i % 4], dtype=torch.uint8)) for i in range(16)])
    files = {f.name: f.stat().st_ino for f in file_store.path.iterdir()}
    assert len(files) <= 16 + 4 * window
    made = file_store._serial.__reduce__()[1]
    for _ in range(10):
        for i in range(16):
            file_store.put(f"k{i}", noise(sizes[i % 4], dtype=torch.uint8)).result()
    assert {f.name: f.stat().st_ino for f in file_store.path.iterdir()} == files
    assert file_store._serial.__reduce__()[1] == made
    for i in range(16):
        file_store.delete(f"k{i}")
    assert list(file_store.path.iterdir()) == []


def test_a_host_store_uses_its_buffers_again():
    with HostStore(window=1) as store:
        for i in range(10):
            store.put("x", torch.full((5000,), i)).result()
        assert len(store._places._free) == 1
        for i in range(10):
            store.put("x", torch.full((5000 + 512 * i,), i)).result()
        assert len(store._places._free) == 1


def test_buffers_are_as_many_as_the_window_and_as_large_as_the_largest_key(tmp_path):
    with FileStore(tmp_path, window=3) as store:
        largest = 0
        for n in (100, 300, 200, 50, 400):
            wait([store.put(f"k{i}", torch.zeros(n, n).t()) for i in range(10)])
            largest = max(largest, 4 * n * n)
            assert len(store._buffers._free) <= 3 and max(b.nbytes for b in store._buffers._free) <= largest
    with FileStore(tmp_path) as store:
        store.get(store.put("x", torch.zeros(100)).result()).result()
        assert store._buffers._free == []  # contiguous host memory needs none


def test_what_is_beyond_the_window_waits(tmp_path):
    class Slow(Broken):
        def write(self, path, x, *, offset=0):
            written = Future()
            threading.Thread(target=self.slowly, args=(written, path, x, offset)).start()
            return written

        def slowly(self, written, path, x, offset):
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(0.01)
            n = self.engine.write(path, x, offset=offset).result()
            with self.lock:
                self.now -= 1
            written.set_result(n)

    with FileStore(tmp_path, window=3) as store:
        store._engine = Slow(store._engine)
        puts = [store.put(f"k{i}", torch.full((10,), i)) for i in range(20)]
        for i, p in enumerate(puts):
            assert store.get(p.result()).result().eq(i).all()
        assert 1 < store._engine.most <= 3


# --- the directory, and the end ---


def test_the_directory_is_the_owners_alone(tmp_path):
    before = os.umask(0)
    try:
        with FileStore(tmp_path) as store:
            store.put("x", torch.zeros(3)).result()
            assert stat.S_IMODE(store.path.stat().st_mode) == 0o700
            assert [stat.S_IMODE(f.stat().st_mode) for f in store.path.iterdir()] == [0o600]
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == []


def test_close_waits_for_what_is_under_way(tmp_path):
    store = FileStore(tmp_path)
    puts = [store.put(f"k{i}", noise(100_000)) for i in range(20)]
    store.close()
    assert all(p.done() and p.exception() is None for p in puts)
    assert list(tmp_path.iterdir()) == [] and store.nbytes == 0
    store.close()


def test_a_closed_store_says_so(store):
    reference = store.put("x", torch.zeros(3)).result()
    store.close()
    for call in (
        lambda: store.put("x", torch.zeros(3)),
        lambda: store.get(reference),
        lambda: store.delete("x"),
        lambda: store.keys(),
    ):
        with pytest.raises(ValueError, match="is closed"):
            call()


def test_a_store_nobody_holds_removes_its_directory(tmp_path):
    store = FileStore(tmp_path)
    store.put("x", torch.zeros(3)).result()
    assert len(list(tmp_path.iterdir())) == 1
    del store
    for _ in range(100):  # a worker may be about to let go of its last task
        gc.collect()
        if not list(tmp_path.iterdir()):
            return
        time.sleep(0.05)
    raise AssertionError(list(tmp_path.iterdir()))


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(ValueError, match="is a file, required a directory"):
        FileStore(tmp_path / "f")


def test_a_relative_path_outlives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with FileStore("here") as store:
        monkeypatch.chdir("/")
        assert store.get(store.put("x", torch.ones(3)).result()).result().eq(1).all()
    assert list((tmp_path / "here").iterdir()) == []


def test_what_a_store_does_not_take(store):
    for key, x, words in (
        (3, torch.zeros(3), "key 3 is a int"),
        ("x", [1.0], "'x' is a list"),
        ("x", torch.zeros(3, device="meta"), "on meta"),
        ("x", torch.eye(3).to_sparse(), "torch.sparse_coo"),
    ):
        with pytest.raises(ValueError, match=words):
            store.put(key, x)
    with pytest.raises(ValueError, match="required the Reference"):
        store.get(store.put("x", torch.zeros(3)))
