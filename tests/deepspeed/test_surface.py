"""Accelerator, logging, versions, the report."""

import json
import logging
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch

import fds
from fds import accelerator, report, version
from fds.accelerator import Accelerator, get_accelerator
from fds.deepspeed.logging import log_dist, logger


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    for name in ("FDS_ACCELERATOR", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["FDS_ACCELERATOR", "DS_ACCELERATOR"])
def test_the_environment_chooses(monkeypatch, name):
    monkeypatch.setenv(name, "cpu")
    assert get_accelerator() == Accelerator("cpu")


def test_a_build_for_cuda_without_a_gpu_is_a_processor(monkeypatch):
    """torch names what it was built for, unless it is asked to look."""
    built = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else built)  # fmt: skip
    assert get_accelerator() == Accelerator("cpu")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"DS_ACCELERATOR": "cdua"}, "DS_ACCELERATOR='cdua'.*cuda"),
        ({"FDS_ACCELERATOR": ""}, "FDS_ACCELERATOR='' is unknown"),
        ({"FDS_ACCELERATOR": "cpu", "DS_ACCELERATOR": "cuda"}, "two accelerators"),
        ({"DS_ACCELERATOR": "npu"}, "needs torch_npu"),
        ({"DS_ACCELERATOR": "xpu"}, "sees no such device here"),
    ],
)
def test_wrong_choices(monkeypatch, env, message):
    accelerator.of.cache_clear()
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match=message):
        get_accelerator()


def test_a_processor():
    a = Accelerator("cpu")
    assert a.device_name() == a.device_name(0) == a.current_device_name() == "cpu"
    assert (a.device_count(), a.current_device(), a.is_available()) == (1, 0, True)
    assert a.communication_backend_name() == "gloo" and a.is_synchronized_device() and not a.is_triton_supported()
    assert a.is_bf16_supported() and a.is_fp16_supported() and a.is_fp64_supported()
    assert a.on_accelerator(torch.ones(1)) and not a.on_accelerator(torch.ones(1, device="meta"))
    a.synchronize(), a.set_device(0), a.empty_cache(), a.range_push("x"), a.range_pop()
    with a.device(0), a.stream(a.current_stream()):
        assert isinstance(a.default_stream(), a.Stream)
    x = torch.ones(2)
    assert a.pin_memory(x) is x and not a.is_pinned(x)


def test_a_processors_random_numbers():
    a = Accelerator("cpu")
    a.manual_seed(3)
    state = a.get_rng_state()
    x = torch.rand(2)
    a.set_rng_state(state)
    assert torch.equal(torch.rand(2), x) and a.initial_seed() == 3
    a.manual_seed_all(4)
    assert a.initial_seed() == 4


def test_a_processors_memory_is_the_process():
    a = Accelerator("cpu")
    before = a.memory_allocated()
    held = torch.frombuffer(mmap.mmap(-1, 2**26), dtype=torch.uint8).fill_(1)  # new pages, whatever the heap has kept
    assert (
        a.memory_allocated() - before > 0.5 * held.nbytes
    )  # resident pages: the system may take some of files back meanwhile
    assert a.max_memory_allocated() >= a.memory_allocated() - 2**20
    assert a.total_memory() > a.available_memory() > 0
    with pytest.raises(ValueError, match="no reset_peak_memory_stats"):
        a.reset_max_memory_allocated()
    with pytest.raises(ValueError, match="there is one"):
        a.set_device(1)


def test_names_of_a_device_with_an_index():
    assert Accelerator("cuda").device_name(1) == "cuda:1" and Accelerator("cuda").device_name() == "cuda"
    assert Accelerator("cuda").communication_backend_name() == "nccl"
    assert Accelerator("cuda").visible_devices_envs() == ["CUDA_VISIBLE_DEVICES"]
    assert Accelerator("mps").device_name() == "mps"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu():
    a = get_accelerator()
    before = a.memory_allocated()
    held = torch.ones(2**20, device=a.current_device_name())
    a.synchronize()
    assert a.memory_allocated() - before >= held.nbytes and a.max_memory_allocated() >= a.memory_allocated()
    a.reset_peak_memory_stats()
    assert a.total_memory() > a.available_memory() and a.memory_stats()
    with a.device(0), a.stream(a.Stream()):
        assert a.current_stream() != a.default_stream()
    event = a.Event(enable_timing=True)
    event.record(), event.synchronize()
    assert a.is_fp16_supported() and a.pin_memory(torch.ones(1)).is_pinned()


# --- logging ---


def test_lines_are_seen_without_a_setting_and_once_with_one():
    script = (
        "import fds.deepspeed.logging as l{}\nl.log_dist('hello', ranks=[0])\nl.log_dist('not', ranks=[-1], level=10)"
    )
    bare = subprocess.run([sys.executable, "-c", script.format("")], capture_output=True, text=True, check=True)
    assert bare.stdout.count("[INFO] [Rank 0] hello") == 1 and "not" not in bare.stdout and bare.stderr == ""
    setting = "; import logging; logging.basicConfig(level=logging.INFO)"
    own = subprocess.run([sys.executable, "-c", script.format(setting)], capture_output=True, text=True, check=True)
    assert own.stdout == "" and own.stderr.count("hello") == 1


def _logged():
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    try:
        log_dist("one", ranks=[1])
        log_dist("all", ranks=[-1])
        log_dist("too")
    finally:
        logger.removeHandler(handler)
    return seen


def test_the_given_ranks_log():
    assert ranks.run(2, _logged) == [
        ["[Rank 0] all", "[Rank 0] too"],
        ["[Rank 1] one", "[Rank 1] all", "[Rank 1] too"],
    ]


@pytest.mark.parametrize(("given", "message"), [([], "none of this job's"), ([4], "none of this job's"), (["0"], "whole numbers"), ([-2], "whole numbers")])  # fmt: skip
def test_ranks_that_do_not_exist(given, message):
    with pytest.raises(ValueError, match=message):
        log_dist("x", ranks=given)


# --- versions ---


def test_a_checkout_does_not_know_its_commit_and_a_build_does(monkeypatch):
    assert version.__git_hash__ is None and version.__git_branch__ is None
    import types

    build = types.ModuleType("fds._build")
    build.GIT_HASH, build.GIT_BRANCH = "abc123", None
    monkeypatch.setitem(sys.modules, "fds._build", build)
    assert version._built("GIT_HASH") == "abc123" and version._built("GIT_BRANCH") is None


def test_the_core_import_stays_light():
    script = "import sys, fds; print([m for m in ('triton', 'transformers', 'rich', 'wandb', 'fds.deepspeed', 'torch.utils.data') if m in sys.modules and m not in before])"
    script = "import sys, torch; before = set(sys.modules)\n" + script
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_nothing_in_the_core_imports_the_front_door():
    root = Path(fds.__file__).parent
    core = [p for p in root.rglob("*.py") if p.relative_to(root).parts[0] != "deepspeed"]
    assert len(core) > 50
    assert [p for p in core if re.search(r"(from|import) fds\.deepspeed\b", p.read_text())] == [
        root / "__init__.py"
    ]  # for types alone; see above


# --- the report ---


def test_the_report_in_its_three_forms(capsys):
    assert report.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["fds"] == fds.__version__
    assert set(found["kernels"]) == set(fds.kernels.operators())
    assert found["communication"]["gloo"] == "yes" and found["communication"]["of this device"]
    assert report.main(["--plain"]) == 0
    text = capsys.readouterr().out
    assert report.main([]) == 0
    table = capsys.readouterr().out
    for section in found:
        assert section in text and section in table


def test_kernels_run_by_triton_where_there_is_a_gpu(monkeypatch):
    assert set(report.kernels(Accelerator("cpu")).values()) == {"reference"}
    monkeypatch.setattr(Accelerator, "is_triton_supported", lambda self: True)
    assert report.kernels(Accelerator("cuda"))["rms_norm"] == "Triton"
