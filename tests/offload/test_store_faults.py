"""Faults that really happen: full disks, limits, altered files, killed processes. Each leaves an error that says what, and no wrong value.

Scenarios run in processes of their own, forked from one that has imported torch already (this file, run as a script).
"""

import atexit
import contextlib
import ctypes
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from fds.offload.store import FileStore, StoreError

_ROOT = Path(__file__).resolve().parents[2]
_MIB = 1 << 20
_ONE = 9 * _MIB + 5  # more than one part, and no whole number of sectors


# --- processes ---


class Children:
    """Start functions of this file by name, each in a fork of a process with one thread; wait for them; kill them."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__, "serve"], env=_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.living = set()

    def _ask(self, *request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, function, *args):
        pid = self._ask("start", function.__name__, [str(a) if isinstance(a, Path) else a for a in args])
        self.living.add(pid)
        return pid

    def kill(self, pid):
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def wait(self, pid):
        """Its exit status; its answer is in the file it was given."""
        self.living.discard(pid)
        return self._ask("wait", pid)

    def run(self, function, answer, *args):
        status = self.wait(self.start(function, answer, *args))
        assert status == 0, f"{function.__name__}: status {status}"
        return json.loads(Path(answer).read_text())

    def close(self):
        for pid in list(self.living):
            with contextlib.suppress(ProcessLookupError):
                self.kill(pid)
        self.server.stdin.close()
        self.server.wait(20)
        self.server.stdout.close()


def _env():
    path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _serve():
    for line in sys.stdin:
        what, *request = json.loads(line)
        if what == "start":
            answer = os.fork() or _child(*request)
        else:
            _, status = os.waitpid(request[0], 0)
            answer = os.waitstatus_to_exitcode(status)
        print(json.dumps(answer), flush=True)


def _child(name, args):
    code = 1
    try:
        os.close(0)  # it is the server's
        os.dup2(2, 1)
        globals()[name](*args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def children():
    c = Children()
    yield c
    c.close()


def _answer(path, value):
    aside = Path(f"{path}.aside")
    aside.write_text(json.dumps(value))
    aside.rename(path)


def _until(path, seconds=60):
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.002)


def _told(call):
    """What an expected error says."""
    try:
        call()
    except OSError as e:
        return {
            "type": type(e).__name__, "errno": e.errno, "text": str(e), "path": e.filename,
            **{k: getattr(e, k, None) for k in ("key", "offset", "expected", "found")},
        }  # fmt: skip
    return {"type": "nothing"}


def _numbers(i, n=_MIB):
    """n bytes of a prime period, so that no block looks like another."""
    return torch.arange(65_521).mul_(2 * i + 1).to(torch.uint8).repeat(-(-n // 65_521))[:n]


# --- a full file system ---

_NEWNS, _NEWUSER, _PRIVATE = 0x20000, 0x10000000, 0x4000 | 1 << 18


def _call(function, *args):
    if function(*args):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount(kind, folder, size, image):
    """A file system of `size` bytes that only this process sees and that goes with it; as root, or in a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    try:
        _call(libc.unshare, _NEWNS)
    except PermissionError:
        _call(libc.unshare, _NEWNS | _NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _call(libc.mount, b"none", b"/", None, _PRIVATE, None)
    if kind == "tmpfs":
        _call(libc.mount, b"fds", folder.encode(), b"tmpfs", 0, f"size={size}".encode())
        return
    with open(image, "wb") as f:
        f.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)


def _fill(answer, kind, folder, image):
    try:
        _mount(kind, folder, 24 * _MIB, image)
    except (OSError, subprocess.CalledProcessError) as e:
        return _answer(answer, {"skip": f"{kind} cannot be mounted here: {e}"})
    try:
        _answer(answer, _filled(folder))
    finally:
        if kind != "tmpfs":
            subprocess.run(["umount", folder], check=True, capture_output=True)


def _filled(folder):
    said = {"wrong": []}
    with FileStore(folder, verify=True, window=2) as store:
        held = {}
        for i in range(100):
            said["full"] = _told(lambda i=i: held.update({i: store.put(f"k{i}", _numbers(i)).result()}))
            if said["full"]["type"] != "nothing":
                break
        said["held"], said["keys"] = len(held), len(store.keys())
        said["again"] = [
            _told(lambda i=i: held.update({i: store.put(f"k{i}", _numbers(i)).result()})) for i in range(3)
        ]
        several = []  # at a time; those begun after one has failed may be told of it, instead of being begun
        said["begun"] = [
            _told(lambda i=i: several.append(store.put(f"more{i}", _numbers(i, 5 * _MIB)))) for i in range(4)
        ]
        said["several"] = [_told(p.result) for p in several] + said["begun"]
        said["wrong"] += [i for i, r in held.items() if not torch.equal(store.get(r).result(), _numbers(i))]
        store.delete("k0")
        store.delete("k1")
        reference = store.put("new", _numbers(77)).result()
        said["after"] = torch.equal(store.get(reference).result(), _numbers(77))
        # Files that wait for values of their size (two of 1 MiB here) make room for a value of another.
        for i in range(3, len(held)):
            store.delete(f"k{i}")
        n = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize + _MIB
        said["room"] = [n, len(os.listdir(store.path)) - len(store.keys())]
        large = store.put("large", _numbers(5, n)).result()
        said["large"] = torch.equal(store.get(large).result(), _numbers(5, n))
    said["left"] = [f for f in os.listdir(folder) if f != "lost+found"]
    return said


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_file_system(children, tmp_path, kind):
    folder = tmp_path / "mounted"
    folder.mkdir()
    said = children.run(_fill, tmp_path / "answer", kind, folder, tmp_path / "image")
    if "skip" in said:
        pytest.skip(said["skip"])
    full = said["full"]
    assert full["type"] == "StoreError" and full["errno"] == errno.ENOSPC, full
    assert full["key"] in full["text"] and full["path"].startswith(str(folder)) and "No space left" in full["text"]
    assert "it has no value" in full["text"]
    assert said["held"] == said["keys"] >= 10
    assert {t["type"] for t in said["again"]} <= {
        "StoreError",
        "nothing",
    }  # there may be room for one copy more, or none
    assert "StoreError" in {t["type"] for t in said["several"]}
    assert {t.get("errno") for t in said["several"]} <= {errno.ENOSPC, None}
    assert said["wrong"] == [] and said["after"] and said["left"] == []
    assert said["large"] and said["room"][0] > 10 * _MIB and said["room"][1] == 2


def _limited(answer, folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MIB, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with FileStore(folder) as store:
        small = store.put("x", _numbers(1)).result()
        said = {"larger": _told(lambda: store.put("x", _numbers(2, 4 * _MIB)).result())}
        said["other"] = _told(lambda: store.put("y", _numbers(2, _MIB + 1)).result())
        said["kept"] = torch.equal(store.get(small).result(), _numbers(1))
        said["again"] = torch.equal(store.get(store.put("x", _numbers(3)).result()).result(), _numbers(3))
        said["files"] = len(os.listdir(store.path))
    _answer(answer, said)


def test_a_limit_of_the_size_of_files(children, tmp_path):
    said = children.run(_limited, tmp_path / "answer", tmp_path / "store")
    for key, kept in (("larger", "generation 1 is kept"), ("other", "it has no value")):
        assert said[key]["type"] == "StoreError" and said[key]["errno"] == errno.EFBIG, said[key]
        assert kept in said[key]["text"] and "File too large" in said[key]["text"]
    assert said["kept"] and said["again"] and said["files"] <= 2


# --- altered files ---


@pytest.fixture(params=[False, True], ids=["plain", "verify"])
def one(request, tmp_path):
    with FileStore(tmp_path, verify=request.param) as store:
        reference = store.put("layers.0", _numbers(1, _ONE)).result()
        (file,) = store.path.iterdir()
        yield store, reference, file, request.param


@pytest.mark.parametrize("length", [0, 4096, 8 * _MIB + 1, _ONE - 1])
def test_a_truncated_file(one, length):
    store, reference, file, _ = one
    os.truncate(file, length)
    with pytest.raises(
        StoreError, match=rf"get of 'layers\.0', generation 1, {_ONE} bytes: its file has {length} bytes"
    ) as e:
        store.get(reference).result()
    assert e.value.errno == errno.ENODATA and e.value.filename == str(file) and e.value.key == "layers.0"
    assert (e.value.offset, e.value.expected, e.value.found) == (length, _ONE, length)
    again = store.put("layers.0", _numbers(2, _ONE)).result()
    assert torch.equal(store.get(again).result(), _numbers(2, _ONE))


@pytest.mark.parametrize("place", [0, 8 * _MIB - 1, 8 * _MIB, _ONE - 1])
def test_one_flipped_bit(one, place):
    store, reference, file, verify = one
    with open(file, "r+b") as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 4]))
        f.flush()
        os.fsync(f.fileno())
    if not verify:  # what verify is for
        differ = (store.get(reference).result() != _numbers(1, _ONE)).nonzero().flatten().tolist()
        assert differ == [place]
        return
    part = place // (8 * _MIB) * 8 * _MIB
    for out in (None, torch.empty(_ONE, dtype=torch.uint8), torch.empty(2 * _ONE, dtype=torch.uint8)[::2]):
        with pytest.raises(StoreError, match=f"from {part} have the checksum .* the file was altered") as e:
            store.get(reference, out).result()
        assert e.value.errno == errno.EBADMSG and e.value.filename == str(file) and e.value.offset == part
        assert e.value.expected != e.value.found


def test_a_file_of_another_generation_or_key(one):
    store, reference, file, verify = one
    other = store.put("other", _numbers(2, _ONE)).result()
    (second,) = set(store.path.iterdir()) - {file}
    shutil.copyfile(second, file)
    if verify:
        with pytest.raises(StoreError, match="checksum"):
            store.get(reference).result()
    assert torch.equal(store.get(other).result(), _numbers(2, _ONE))


def test_errors_of_the_system_while_reading_and_writing(one):
    store, reference, file, _ = one
    file.unlink()
    file.symlink_to("/proc/self/mem")  # its first page is not mapped: the system says EIO
    with pytest.raises(StoreError, match=r"get of 'layers\.0'") as e:
        store.get(reference).result()
    assert e.value.errno == errno.EIO
    file.unlink()
    file.symlink_to("/dev/full")
    small = store.put("small", _numbers(3)).result()
    store._places._free.append((-(-_ONE // 4096) * 4096, str(file)))
    # It is taken, fails, and is given up; nothing else waits, so that the error is the caller's.
    with pytest.raises(StoreError, match=r"put of 'new'.*No space left") as e:
        store.put("new", _numbers(1, _ONE)).result()
    assert e.value.errno == errno.ENOSPC and not os.path.lexists(file)
    assert torch.equal(store.get(small).result(), _numbers(3))


def test_a_directory_removed_while_running(one, caplog):
    store, reference, _, _ = one
    shutil.rmtree(store.path)
    with pytest.raises(StoreError, match=r"get of 'layers\.0'.*No such file") as e:
        store.get(reference).result()
    assert e.value.errno == errno.ENOENT and e.value.filename.startswith(str(store.path))
    for _ in range(2):
        with pytest.raises(StoreError, match=r"put of 'layers\.0'.*No such file.*generation 1 is kept") as e:
            store.put("layers.0", _numbers(1)).result()
        assert e.value.errno == errno.ENOENT
    with FileStore(store.path.parent) as other:  # it has no part in that
        assert torch.equal(other.get(other.put("x", _numbers(4)).result()).result(), _numbers(4))
    store.close()
    assert "killed" not in caplog.text


# --- processes that end, and processes that meet ---


def _write_for_ever(folder, ready, seed):
    store = FileStore(folder, window=3, budget=seed % 2 * _MIB, verify=bool(seed % 2))
    for i in range(1 << 30):
        puts = [store.put(f"k{j}", torch.full((3 * _MIB,), (i + j) % 251, dtype=torch.uint8)) for j in range(6)]
        if i == 1:
            _answer(ready, str(store.path))
        for p in puts:
            p.result()


def test_a_kill_in_the_middle_of_writing(children, tmp_path, caplog):
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    root = tmp_path / "root"
    for i in range(6):
        ready = tmp_path / f"ready{i}"
        pid = children.start(_write_for_ever, root, ready, i)
        _until(ready)
        time.sleep(draw.random() * 0.15)
        assert children.kill(pid) == -signal.SIGKILL
        left = Path(json.loads(ready.read_text()))
        assert [left] == list(root.iterdir()), seed
        size = sum(f.stat().st_blocks * 512 for f in left.iterdir())
        caplog.clear()
        with FileStore(root, verify=True) as store:
            assert [store.path] == list(root.iterdir()) and store.path != left, seed
            assert [r.getMessage() for r in caplog.records] == [
                f"{root}: removed what 1 killed runs left, {size} bytes"
            ]
            assert store.keys() == []  # nothing of the old run is taken for a value
            assert torch.equal(store.get(store.put("k0", _numbers(i)).result()).result(), _numbers(i))
        assert list(root.iterdir()) == []


def _open_and_close_for_ever(folder, ready):
    for i in range(1 << 30):
        with FileStore(folder) as store:
            store.put("x", torch.zeros(3)).result()
            if i == 1:
                _answer(ready, 1)


def test_a_kill_while_a_store_begins_or_ends(children, tmp_path):
    root, draw = tmp_path / "root", random.Random()
    pids = []
    for i in range(5):
        pids.append(children.start(_open_and_close_for_ever, root, tmp_path / f"ready{i}"))
        _until(tmp_path / f"ready{i}")
    for pid in pids:
        time.sleep(draw.random() * 0.05)
        children.kill(pid)
    with FileStore(root) as store:
        assert list(root.iterdir()) == [store.path]
    assert list(root.iterdir()) == []


def _live(answer, folder, me, go, end):
    _until(go)
    wrong = 0
    with FileStore(folder, verify=True) as store:
        for _ in range(20):
            references = [store.put(f"k{j}", torch.full((50_000,), 16 * me + j, dtype=torch.uint8)) for j in range(4)]
            wrong += sum(not store.get(r.result()).result().eq(16 * me + j).all() for j, r in enumerate(references))
        _answer(answer, [wrong, str(store.path)])
        if end:
            _until(end)
            wrong += sum(not store.get(r.result()).result().eq(16 * me + j).all() for j, r in enumerate(references))
            _answer(end + str(me), wrong)


def test_processes_on_one_path(children, tmp_path, caplog):
    root, go, end = tmp_path / "root", tmp_path / "go", tmp_path / "end"
    answers = [tmp_path / f"answer{i}" for i in range(4)]
    pids = [children.start(_live, a, root, i, go, str(end)) for i, a in enumerate(answers)]
    go.touch()
    for a in answers:
        _until(a)
    found = [json.loads(a.read_text()) for a in answers]
    assert [w for w, _ in found] == [0] * 4
    assert sorted(p for _, p in found) == sorted(map(str, root.iterdir()))  # each has its own
    children.kill(pids[0])
    with FileStore(root) as store:  # removes the dead one's, and no other
        assert {p for _, p in found[1:]} | {str(store.path)} == set(map(str, root.iterdir()))
    assert "removed what 1 killed runs left" in caplog.text
    end.touch()
    assert [children.wait(p) for p in pids[1:]] == [0, 0, 0]
    assert [json.loads(Path(f"{end}{i}").read_text()) for i in (1, 2, 3)] == [0, 0, 0]
    assert list(root.iterdir()) == []


def test_a_stranger_in_the_directory_is_left_alone(tmp_path, caplog):
    kept = [tmp_path / n for n in ("fds-offload", "fds-offload-x", f"fds-offload-{os.geteuid()}-file", "data")]
    kept[0].mkdir(), kept[1].mkdir(), kept[2].write_text("a file"), kept[3].mkdir()
    outside = tmp_path / "data" / "precious"
    outside.write_text("x")
    link = tmp_path / f"fds-offload-{os.geteuid()}-link"
    link.symlink_to(tmp_path / "data")
    with FileStore(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([*kept, link]) and outside.exists() and caplog.text == ""


def _forked(answer, folder):
    with FileStore(folder) as store:
        reference = store.put("x", _numbers(1)).result()
        pid = os.fork()
        if not pid:
            calls = (lambda: store.put("x", _numbers(2)), lambda: store.get(reference), store.keys)
            said = []
            for call in calls:
                try:
                    call()
                except ValueError as e:
                    said.append("make a store in each process" in str(e))
            store.close()
            _answer(f"{answer}.fork", said)
            atexit._run_exitfuncs()
            os._exit(0)
        os.waitpid(pid, 0)
        same = torch.equal(store.get(reference).result(), _numbers(1))
    _answer(answer, [same, json.loads(Path(f"{answer}.fork").read_text())])


def test_a_fork_is_refused_and_harms_nothing(children, tmp_path):
    assert children.run(_forked, tmp_path / "answer", tmp_path / "root") == [True, [True] * 3]


def _optimized(said, folder):
    """Without `assert` statements: the same checks, the same waits."""
    said["asserts"] = __debug__
    with FileStore(folder, verify=True, budget=0, window=2) as store:
        puts = [store.put(f"k{i}", _numbers(i)) for i in range(8)]
        references = [p.result() for p in puts]
        said["wrong"] = [i for i, r in enumerate(references) if not torch.equal(store.get(r).result(), _numbers(i))]
        file = store.path / "00000001"
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
        said["altered"] = [t for t in (_told(store.get(r).result) for r in references) if t["type"] != "nothing"]
        os.truncate(file, 100)
        said["short"] = [t for t in (_told(store.get(r).result) for r in references) if t["type"] != "nothing"]
        store.put("k7", _numbers(9)).result()
        said["stale"] = _told(lambda: store.get(references[7]))
        shutil.rmtree(store.path)
        store.put("lost", torch.zeros(3))


def test_without_asserts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-O", __file__, "optimized", str(tmp_path)],
        env=_env(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["asserts"] is False and said["wrong"] == []
    assert [t["errno"] for t in said["altered"]] == [errno.EBADMSG] and [t["errno"] for t in said["short"]] == [
        errno.ENODATA
    ]
    assert said["stale"]["errno"] == errno.ESTALE
    assert "nobody asked" in said["lost"] and "No such file" in said["lost"]


def _main(what, *args):
    if what == "serve":
        return _serve()
    said = {}
    try:
        _optimized(said, *args)
    except StoreError as e:
        said["lost"] = str(e)
    print(json.dumps(said))


if __name__ == "__main__":
    _main(*sys.argv[1:])
