"""`fds.offload.aio`: bytes at every alignment, every setting observed at work, and every failure told."""

import errno
import fcntl
import itertools
import os
import random
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import TimeoutError
from pathlib import Path

import pytest
import torch

from fds.offload import aio, blocks
from fds.offload.aio import ALIGN, Engine, Settings, empty

BLOCK = 4 * ALIGN


def noise(n_bytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def aligned(n_bytes: int, seed: int = 0) -> torch.Tensor:
    return empty(n_bytes).copy_(noise(n_bytes, seed))


def at_address(n_bytes: int, shift: int) -> torch.Tensor:
    """A buffer whose address is `shift` bytes past a page."""
    return empty(n_bytes + shift)[shift:]


def content(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


class Watch:
    """Stands in for `os.preadv` and `os.pwritev`: who is in a call, how many at once, and what each call asked."""

    def __init__(self, monkeypatch, *, hold=0.0, barrier=None):
        self.lock, self.now, self.most, self.calls, self.running = threading.Lock(), 0, 0, [], Counter()
        self.most_of, self.hold, self.barrier, self.events = Counter(), hold, barrier, []
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(os, name, self.around(getattr(os, name)))

    def around(self, call):
        def watched(descriptor, buffers, offset):
            who = threading.current_thread().name.split(".")[0]
            with self.lock:
                self.now += 1
                self.running[who] += 1
                self.most = max(self.most, self.now)
                self.most_of[who] = max(self.most_of[who], self.running[who])
                self.events.append(("start", offset))
                direct = bool(blocks._is_direct(descriptor))
                self.calls.append((who, offset, sum(len(b) for b in buffers), direct))
            try:
                if self.barrier:
                    self.barrier()
                time.sleep(self.hold)
                return call(descriptor, buffers, offset)
            finally:
                with self.lock:
                    self.now -= 1
                    self.running[who] -= 1
                    self.events.append(("stop", offset))

        return watched


# --- bytes ---


@pytest.mark.parametrize("shift", [0, 512, 64, 1])
def test_any_size_offset_and_address(tmp_path, shift):
    draw = random.Random(shift)
    edges = [0, 1, ALIGN - 1, ALIGN, ALIGN + 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17, 9 * BLOCK]
    model = bytearray()
    path = tmp_path / "file"
    with Engine(Settings(block_size=BLOCK, queue_depth=3, thread_count=2)) as engine:
        for i, size in enumerate(edges * 2):
            offset = draw.choice([0, 1, 511, ALIGN, ALIGN + 5, 2 * BLOCK, 2 * BLOCK + 3])
            x = at_address(size, shift).copy_(noise(size, i))
            assert engine.write(path, x, offset=offset).result() == size
            model.extend(bytes(max(0, offset + size - len(model)) if size else 0))
            model[offset : offset + size] = x.numpy().tobytes()
            out = at_address(size, shift).fill_(7)
            assert engine.read(path, out, offset=offset).result() is out
            assert torch.equal(out, x)
            assert path.read_bytes() == model


def test_neighbours_written_at_the_same_time_share_pages(tmp_path):
    """Ragged ends meet inside of pages: no write may lose its neighbour's bytes."""
    draw = random.Random(3)
    cuts = sorted({0, *(draw.randrange(1, 40 * ALIGN) for _ in range(60)), 40 * ALIGN})
    with Engine(Settings(block_size=ALIGN, queue_depth=8, thread_count=2)) as engine:
        for round_ in range(5):
            x = noise(40 * ALIGN, round_)
            jobs = list(itertools.pairwise(cuts))
            draw.shuffle(jobs)
            futures = [engine.write(tmp_path / "f", x[a:b], offset=a) for a, b in jobs]
            assert [f.result() for f in futures] == [b - a for a, b in jobs]
            out = torch.empty_like(x)
            parts = [engine.read(tmp_path / "f", out[a:b], offset=a) for a, b in jobs]
            _ = [f.result() for f in parts]
            assert torch.equal(out, x)
            assert torch.equal(content(tmp_path / "f"), x)


def test_buffered_and_direct_writes_of_others_are_seen(tmp_path):
    path = tmp_path / "f"
    x = noise(3 * ALIGN)
    with Engine() as engine:
        engine.write(path, x).result()
        with open(path, "r+b", buffering=0) as f:  # through the page cache, dirty
            f.seek(ALIGN)
            f.write(b"\1" * ALIGN)
        x[ALIGN : 2 * ALIGN] = 1
        assert torch.equal(engine.read(path, empty(3 * ALIGN)).result(), x)
        content(path)  # the page cache has all of it
        engine.write(path, x.fill_(9)).result()
        assert torch.equal(content(path), x)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(5),
        torch.randn(3, 7, dtype=torch.bfloat16),
        torch.tensor(2.5),
        torch.randn(4, dtype=torch.complex64),
        torch.tensor([True, False, True]),
        torch.randn(9).to(torch.float8_e4m3fn),
        torch.empty(0, 3),
    ],
    ids=lambda x: str(x.dtype),
)
def test_any_dtype_and_shape(tmp_path, x):
    with Engine() as engine:
        assert engine.write(tmp_path / "x", x).result() == x.nbytes
        out = engine.read(tmp_path / "x", torch.zeros_like(x)).result()
    assert out.shape == x.shape and torch.equal(
        out.view(torch.uint8) if x.dim() else out, x.view(torch.uint8) if x.dim() else x
    )


def test_direct_where_aligned_and_only_the_ends_buffered(tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    with Engine(Settings(block_size=BLOCK)) as engine:
        x = at_address(4 * BLOCK + 100, 64)
        engine.write(tmp_path / "f", x, offset=ALIGN - 50).result()
        engine.read(tmp_path / "f", x, offset=ALIGN - 50).result()
    done = [c for c in watch.calls if c[3]]
    if not done:
        pytest.skip("the file system under the temporary directory has no direct I/O")
    assert sum(n for _, _, n, direct in watch.calls if not direct) == 2 * 100
    assert all(offset % ALIGN == 0 and n % ALIGN == 0 for _, offset, n, _ in done)
    assert {offset for _, offset, _, _ in done} == set(range(ALIGN, ALIGN + 4 * BLOCK, BLOCK))


def test_a_written_file_is_its_owners_and_keeps_other_bytes(tmp_path):
    with Engine() as engine:
        engine.write(tmp_path / "f", noise(3 * ALIGN)).result()
        before = content(tmp_path / "f")
        engine.write(tmp_path / "f", torch.zeros(ALIGN, dtype=torch.uint8)).result()
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600
    assert torch.equal(content(tmp_path / "f")[ALIGN:], before[ALIGN:])


def test_tmpfs_is_buffered_or_direct_but_right(tmp_path, monkeypatch):
    """Newer kernels accept the flag on tmpfs; where it is refused, that is said once for a file system."""
    real = fcntl.fcntl

    def refuse(descriptor, command, *flags):
        if command == fcntl.F_SETFL and flags[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(descriptor, command, *flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    x = noise(3 * BLOCK + 5)
    with warnings.catch_warnings(record=True) as said, Engine(Settings(block_size=BLOCK)) as engine:
        warnings.simplefilter("always")
        for name in "ab":
            engine.write(tmp_path / name, x).result()
            assert torch.equal(engine.read(tmp_path / name, torch.empty_like(x)).result(), x)
    assert [("refuses direct I/O" in str(w.message)) for w in said] == [True]


def test_direct_refused_by_the_call_falls_back_too(tmp_path, monkeypatch):
    def refusing(call):
        def f(descriptor, buffers, offset):
            if blocks._is_direct(descriptor):
                raise OSError(errno.EINVAL, "")
            return call(descriptor, buffers, offset)

        return f

    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    monkeypatch.setattr(os, "pwritev", refusing(os.pwritev))
    x = noise(5 * BLOCK + 5)
    settings = Settings(
        block_size=ALIGN, thread_count=3, queue_depth=1
    )  # each cuts the request by itself, one after the refusal
    for shift, offset in ((0, 0), (3, 0), (0, 7), (3, 11)):
        with pytest.warns(UserWarning, match="refuses direct I/O"), Engine(settings) as engine:
            path = tmp_path / f"{shift}.{offset}"
            for _ in range(10):
                engine.write(path, at_address(x.numel(), shift).copy_(x), offset=offset).result()
                assert torch.equal(engine.read(path, at_address(x.numel(), shift).zero_(), offset=offset).result(), x)
                assert torch.equal(content(path)[offset:], x)
                path.unlink()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_refusal_in_the_middle_does_not_change_how_a_request_is_cut(tmp_path, monkeypatch):
    """Two submitters come to the request only after the first one has been refused: all must cut it at the same places."""
    real, refused, after = os.pwritev, threading.Event(), []

    def held(descriptor, buffers, offset):
        if offset >= 2**20:  # what keeps the other submitters busy
            assert threading.current_thread().name.startswith("fds-aio-0") or refused.wait(20)
        elif blocks._is_direct(descriptor):
            raise OSError(errno.EINVAL, "")
        elif len(buffers[0]) == ALIGN:
            after.append(offset)
            if len(after) == 2:  # the first of them may not have changed the request yet
                refused.set()
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", held)
    x = noise(12 * ALIGN)
    with Engine(Settings(block_size=ALIGN, thread_count=3, queue_depth=1)) as engine:
        engine.write(tmp_path / "busy", aligned(3 * ALIGN), offset=2**20)
        engine.write(tmp_path / "f", x, offset=7).result()
    assert torch.equal(content(tmp_path / "f")[7:], x)


@pytest.mark.skipif(not os.path.isdir("/dev/shm") or not os.access("/dev/shm", os.W_OK), reason="no /dev/shm")
def test_a_real_tmpfs(tmp_path_factory):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Engine(Settings(block_size=BLOCK)) as engine:
        x = noise(7 * BLOCK + 11)
        engine.write(f"{folder}/f", x, offset=3).result()
        assert torch.equal(engine.read(f"{folder}/f", torch.empty_like(x), offset=3).result(), x)


# --- settings, observed ---


def test_defaults_are_deepspeeds():
    assert Settings().aio() == {
        "block_size": 1048576,
        "queue_depth": 8,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
        "use_gds": False,
    }
    assert Settings.of(Settings(thread_count=3, single_submit=True).aio()) == Settings(
        thread_count=3, single_submit=True
    )
    assert Settings.of({"thread_count": 2}).thread_count == 2


@pytest.mark.parametrize("depth, count", [(1, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("overlap", [True, False])
def test_depth_blocks_in_flight_for_each_submitter(tmp_path, monkeypatch, depth, count, overlap):
    """Nobody leaves its system call before all that may be in flight are: so many do get there, and never more."""
    everyone = threading.Barrier(depth * count)
    watch = Watch(monkeypatch, barrier=lambda: everyone.wait(20))
    settings = Settings(block_size=ALIGN, queue_depth=depth, thread_count=count, overlap_events=overlap)
    with Engine(settings) as engine:
        engine.write(tmp_path / "f", aligned(depth * count * 4 * ALIGN)).result()
    assert watch.most == depth * count
    assert watch.most_of == {f"fds-aio-{i}": depth for i in range(count)}


def test_block_size_is_the_size_of_a_call(tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    with Engine(Settings(block_size=BLOCK)) as engine:
        engine.write(tmp_path / "f", empty(5 * BLOCK)).result()
    assert sorted(c[1:3] for c in watch.calls) == [(i * BLOCK, BLOCK) for i in range(5)]


def test_a_request_is_dealt_to_all_submitters(tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    with Engine(Settings(block_size=ALIGN, thread_count=4)) as engine:
        engine.write(tmp_path / "f", aligned(12 * ALIGN)).result()
        assert Counter(c[0] for c in watch.calls) == {f"fds-aio-{i}": 3 for i in range(4)}
        watch.calls.clear()
        for i in range(4):  # of one block each
            engine.write(tmp_path / f"f{i}", aligned(ALIGN)).result()
        assert Counter(c[0] for c in watch.calls) == {f"fds-aio-{i}": 1 for i in range(4)}


def test_without_overlap_a_batch_waits_for_the_last(tmp_path, monkeypatch):
    depth, n = 4, 16
    draw = random.Random(0)
    watch = Watch(monkeypatch, barrier=lambda: time.sleep(draw.random() / 200))
    with Engine(Settings(block_size=ALIGN, queue_depth=depth, overlap_events=False)) as engine:
        engine.write(tmp_path / "f", aligned(n * ALIGN)).result()
    batch = [offset // ALIGN // depth for _, offset in watch.events]
    assert batch == sorted(batch)  # nothing of a batch happens before all of the one before is over


def test_with_overlap_a_finished_block_makes_room_at_once(tmp_path, monkeypatch):
    """The first block does not return before the last one has been passed on: without overlap that would be for ever."""
    n, seen = 12, threading.Event()
    real = os.pwritev

    def held(descriptor, buffers, offset):
        if offset == 0:
            assert seen.wait(20)
        if offset == (n - 1) * ALIGN:
            seen.set()
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", held)
    with Engine(Settings(block_size=ALIGN, queue_depth=2)) as engine:
        assert engine.write(tmp_path / "f", aligned(n * ALIGN)).result(30) == n * ALIGN


@pytest.mark.parametrize("single", [True, False])
def test_single_submit_passes_one_block_at_a_time(tmp_path, monkeypatch, single):
    sizes = []
    submit = aio._Submitter.submit
    monkeypatch.setattr(
        aio._Submitter, "submit", lambda self, batch: (sizes.append(len(batch)), submit(self, batch))[1]
    )
    settings = Settings(block_size=ALIGN, queue_depth=4, single_submit=single, overlap_events=False)
    with Engine(settings) as engine:
        engine.write(tmp_path / "f", aligned(10 * ALIGN)).result()
    assert sizes == ([1] * 10 if single else [4, 4, 2])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"block_size": 0}, "block_size: given 0"),
        ({"block_size": 5000}, f"use {-(-5000 // ALIGN) * ALIGN}"),
        ({"block_size": 1e6}, "block_size"),
        ({"queue_depth": True}, "queue_depth"),
        ({"thread_count": -1}, "thread_count"),
        ({"thread_count": 64, "queue_depth": 128}, "8192"),
        ({"overlap_events": 1}, "overlap_events: given 1, allowed True or False"),
        ({"single_submit": "false"}, "single_submit"),
        ({"use_gds": True}, "cuFile"),
        ({"queue_dept": 4}, "did you mean 'queue_depth'"),
        ({"intra_op_parallelism": 2, "thread_count": 3}, "two names of one setting"),
    ],
)
def test_settings_refused_with_the_reason(options, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        Settings.of(options)


# --- asynchronous ---


def test_the_caller_goes_on_and_the_gil_is_free(tmp_path):
    """A fifo with nobody at the other end: whoever waits in a system call there keeps neither the caller nor Python."""
    os.mkfifo(tmp_path / "fifo")
    with Engine() as engine:
        future = engine.read(tmp_path / "fifo", empty(ALIGN))
        ticks = sum(1 for _ in range(100_000))
        assert ticks == 100_000 and not future.done() and not future.cancel()
        # At once: a reader that opened the fifo twice would wait for ever.
        os.close(os.open(tmp_path / "fifo", os.O_WRONLY))
        with pytest.raises(OSError):  # a fifo has no offsets
            future.result(20)


def test_close_waits_and_a_closed_engine_raises(tmp_path, monkeypatch):
    Watch(monkeypatch, hold=0.01)
    engine = Engine(Settings(block_size=ALIGN, queue_depth=2))
    futures = [engine.write(tmp_path / f"{i}", noise(8 * ALIGN)) for i in range(5)]
    engine.close()
    assert all(f.done() for f in futures)
    engine.close()
    for call in (engine.read, engine.write):
        with pytest.raises(ValueError, match="closed"):
            call(tmp_path / "0", empty(ALIGN))
    assert not [t for t in threading.enumerate() if t in engine._pool.threads()]


def test_close_in_a_callback_is_refused(tmp_path):
    said = []

    def close(_):
        try:
            engine.close()
        except ValueError as error:
            said.append(str(error))

    with Engine() as engine:
        engine.write(tmp_path / "f", noise(10)).add_done_callback(close)
    assert said and "callback" in said[0]


def test_an_engine_nobody_has_any_more_ends_its_threads(tmp_path):
    import gc

    engine = Engine()
    threads = engine._pool.threads()
    future = engine.write(tmp_path / "f", noise(100))
    del engine
    gc.collect()
    for t in threads:
        t.join(20)
    assert future.result() == 100 and not any(t.is_alive() for t in threads)


def test_what_was_accepted_is_written_before_the_process_ends(tmp_path):
    code = f"import torch; from fds.offload.aio import Engine; e = Engine(); [e.write({str(tmp_path)!r} + f'/{{i}}', torch.full((2**20,), i)) for i in range(8)]"
    subprocess.run([sys.executable, "-O", "-c", code], check=True, timeout=60)
    for i in range(8):
        x = content(tmp_path / str(i)).view(torch.int64)
        assert x.numel() == 2**20 and bool((x == i).all())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_is_told(tmp_path):
    with Engine() as engine:
        child = os.fork()
        if not child:
            try:
                engine.write(tmp_path / "f", noise(1))
            except ValueError as error:
                os._exit(0 if "fork" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_reading_into_a_tensor_tells_autograd(tmp_path):
    with Engine() as engine:
        engine.write(tmp_path / "f", torch.ones(4)).result()
        a, out = torch.ones(4, requires_grad=True), torch.zeros(4)
        y = (a * out).sum()
        engine.read(tmp_path / "f", out).result()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.backward()


# --- failures ---


def test_a_short_read_says_path_offset_expected_and_found(tmp_path):
    for length, offset in ((10 * ALIGN + 7, 3), (0, 0), (5, 100), (BLOCK, ALIGN)):
        (tmp_path / "f").write_bytes(bytes(length))
        with Engine(Settings(block_size=ALIGN)) as engine, pytest.raises(OSError) as caught:
            engine.read(tmp_path / "f", empty(20 * ALIGN), offset=offset).result()
        error = caught.value
        assert error.errno == errno.ENODATA and error.filename == str(tmp_path / "f")
        assert f"expected {20 * ALIGN} bytes at offset {offset}, found {max(0, length - offset)}:" in str(error)


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_missing_directory(tmp_path, act):
    with Engine() as engine, pytest.raises(FileNotFoundError, match="at offset 8") as caught:
        getattr(engine, act)(tmp_path / "no" / "f", empty(ALIGN), offset=8).result()
    assert caught.value.filename == str(tmp_path / "no" / "f")


def test_a_failed_write_that_nobody_asked_about_is_raised_by_the_next_call_and_by_close(tmp_path, monkeypatch):
    engine = Engine()
    lost = engine.write(tmp_path / "no" / "f", empty(1))
    while not lost.done():
        time.sleep(0.001)
    with pytest.raises(FileNotFoundError, match="no/f"):
        engine.read(tmp_path / "f", empty(1))
    engine.close()  # told already

    go = threading.Event()

    def failing(descriptor, buffers, offset):
        go.wait(20)
        raise OSError(errno.EIO, "")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", failing)
        engine = Engine()
        futures = [engine.write(tmp_path / name, empty(1)) for name in "gh"]
        with pytest.raises(TimeoutError):
            futures[0].result(0.001)  # is not being told
        go.set()
        with pytest.raises(OSError, match="Input/output error") as caught:
            engine.close()
    told = {Path(e.filename).name for e in (caught.value, caught.value.__cause__)}
    assert told == {"g", "h"} and all(f.done() for f in futures)

    with Engine() as engine, pytest.raises(FileNotFoundError):  # told once
        engine.write(tmp_path / "no" / "f", empty(1)).result()

    with pytest.warns(UserWarning, match="no/f"), pytest.raises(KeyError), Engine() as engine:
        engine.write(tmp_path / "no" / "f", empty(1))
        raise KeyError


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("act", ["read", "write"])
def test_an_error_of_one_block_is_the_requests(tmp_path, monkeypatch, act, number):
    x = aligned(10 * ALIGN)
    settings = Settings(block_size=ALIGN)
    with Engine(settings) as engine:
        engine.write(tmp_path / "f", x).result()
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def failing(descriptor, buffers, offset, real=real):
            if offset == 5 * ALIGN:
                raise OSError(number, "")
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, name, failing)
    with Engine(settings) as engine:
        with pytest.raises(
            OSError, match=f"{act} of {x.nbytes} bytes at offset 0, stopped at offset {5 * ALIGN}"
        ) as caught:
            getattr(engine, act)(tmp_path / "f", x).result()
        assert caught.value.errno == number and caught.value.filename == str(tmp_path / "f")
        assert engine.write(tmp_path / "g", x[:ALIGN]).result() == ALIGN  # and the engine works on
    assert len(os.listdir("/proc/self/fd")) < 200


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_full_device(tmp_path):
    with Engine() as engine, pytest.raises(OSError, match="free space there") as caught:
        engine.write("/dev/full", noise(3 * ALIGN)).result()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"


def test_calls_that_do_less_than_asked_are_continued(tmp_path, monkeypatch):
    for name in ("preadv", "pwritev"):
        real = getattr(os, name)

        def half(descriptor, buffers, offset, real=real):
            n = len(buffers[0]) // 2 or 1
            step = n // ALIGN * ALIGN if n >= ALIGN else n
            direct = blocks._is_direct(descriptor)
            return real(descriptor, [buffers[0][: step if not direct or step % ALIGN == 0 else ALIGN]], offset)

        monkeypatch.setattr(os, name, half)
    for shift in (0, 5):
        x = at_address(6 * BLOCK + 9, shift).copy_(noise(6 * BLOCK + 9))
        with Engine(Settings(block_size=BLOCK)) as engine:
            engine.write(tmp_path / "f", x, offset=2).result()
            assert torch.equal(engine.read(tmp_path / "f", at_address(x.numel(), shift), offset=2).result(), x)


def test_a_limit_on_the_size_of_a_file(tmp_path):
    """Direct I/O fails with EINVAL where a limit cuts a block: that must not be taken for a file system without it, nor be told so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    asked = ((4_000_000, 0), (50_000, 980_000), (10, 2_000_000))
    with warnings.catch_warnings(), Engine(Settings(block_size=65536)) as engine:
        warnings.simplefilter("error")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        try:
            errors = [engine.write(tmp_path / f"f{n}", empty(n), offset=offset).exception() for n, offset in asked]
            fits = engine.write(tmp_path / "f", empty(1_000_000)).result()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert fits == 1_000_000
    for error, (n, offset) in zip(errors, asked, strict=True):
        assert isinstance(error, OSError) and error.errno == errno.EFBIG and "ulimit -f" in str(error)
        assert f"write of {n} bytes at offset {offset}, stopped at offset" in str(error)
    assert "stopped at offset 10" in str(errors[1])  # not before the limit


@pytest.mark.parametrize(
    "x, says",
    [
        (torch.empty(4, device="meta"), "on the CPU"),
        (torch.zeros(3, 3).t()[1:], "x.contiguous()"),
        (torch.zeros(3, dtype=torch.complex64).conj(), "resolve_conj"),
        (torch.eye(3).to_sparse(), "dense"),
    ],
)
def test_tensors_refused(tmp_path, x, says):
    with Engine() as engine:
        for call in (engine.read, engine.write):
            with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")):
                call(tmp_path / "f", x)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("offset", [-1, 1.5, True])
def test_offsets_refused(tmp_path, offset):
    with Engine() as engine, pytest.raises(ValueError, match="offset"):
        engine.read(tmp_path / "f", empty(1), offset=offset)


def test_no_descriptor_and_no_buffer_is_kept(tmp_path):
    import gc
    import weakref

    def descriptors():
        links = [Path(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        return [p for p in links if p.is_symlink() and str(tmp_path) in os.readlink(p)]  # the listing's own is gone

    with Engine() as engine:
        with open(tmp_path / "seen", "w"):
            assert len(descriptors()) == 1
        for act in (engine.write, engine.read):
            for path in (tmp_path / "f", tmp_path / "no" / "f"):
                x = noise(3 * ALIGN + 1)
                seen = weakref.ref(x)
                future = act(path, x)
                assert (future.exception() is None) == (path.parent == tmp_path)
                if act == engine.read and future.exception() is None:
                    del future  # it has the tensor
                del x
                for _ in range(200):  # the thread lets go a moment after the future has the answer
                    gc.collect()
                    if seen() is None:
                        break
                    time.sleep(0.005)
                assert seen() is None
        assert descriptors() == []


# --- buffers ---


@pytest.mark.parametrize("n", [0, 1, ALIGN, 3 * 2**20 + 1])
def test_empty_is_aligned(n):
    x = empty(n)
    assert x.shape == (n,) and x.dtype == torch.uint8 and x.is_contiguous()
    assert not n or x.data_ptr() % ALIGN == 0
    x.fill_(3)
    assert int(x.sum(dtype=torch.int64)) == 3 * n


def test_empty_refuses_a_negative_size():
    with pytest.raises(ValueError, match="-1"):
        empty(-1)


def test_empty_gives_its_memory_back():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(40):
        empty(64 * 2**20).fill_(1)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 256 * 2**10  # KiB
