"""Against DeepSpeed itself, where it is installed: FDS_PEER_PYTHON, or the environment that `make .venv-peers/ready` makes."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from torch import nn

from fds.deepspeed.data import Curriculum
from fds.deepspeed.profiler import get_model_profile

PEER = Path(os.environ.get("FDS_PEER_PYTHON", Path(__file__).parents[2] / ".venv-peers/bin/python"))
pytestmark = pytest.mark.skipif(not PEER.exists(), reason="needs DeepSpeed: make .venv-peers/ready")


def ask(script, given):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [PEER, "-c", script], input=json.dumps(given), env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def sections(n, seed=0):
    draw = random.Random(seed)
    for _ in range(n):
        kind = draw.choice(["fixed_linear", "fixed_root", "fixed_discrete"])
        low = draw.randint(1, 100)
        config = {"total_curriculum_step": draw.randint(1, 300), "difficulty_step": draw.choice([1, 3, 8, 16, 64])}
        if kind == "fixed_root":
            config["root_degree"] = draw.choice([1, 2, 3, 0.5, 2.5])
        if kind == "fixed_discrete":
            steps = sorted(draw.sample(range(1, 300), draw.randint(1, 6)))
            config = {"difficulty": [draw.randint(1, 512) for _ in range(len(steps) + 1)], "max_step": steps}
        yield {"min_difficulty": low, "max_difficulty": low + draw.randint(0, 2000), "schedule_type": kind, "schedule_config": config}  # fmt: skip


_CURRICULUM = """
import json, sys
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
given = json.load(sys.stdin)
print(json.dumps([[CurriculumScheduler(s).get_difficulty(step) for step in range(1, 400)] for s in given]))
"""


def test_difficulties_of_200_schedules():
    given = list(sections(200))
    theirs = ask(_CURRICULUM, given)
    for section, expected in zip(given, theirs, strict=True):
        curriculum = Curriculum.of(section)
        assert [curriculum.difficulty(step) for step in range(1, 400)] == expected, section


_PROFILE = """
import json, sys, torch, transformers
from torch import nn
from deepspeed.profiling.flops_profiler import get_model_profile
def ask(model, *args, **kwargs):
    return get_model_profile(model, args=list(args), kwargs=kwargs, print_profile=False, as_string=False)
base = json.load(sys.stdin)
stack = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
conv = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU())
llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**base)).eval()
print(json.dumps([ask(stack, torch.ones(3, 8)), ask(conv, torch.ones(2, 4, 10, 6)), ask(llama, input_ids=torch.ones(2, 12, dtype=torch.long), use_cache=False)]))
"""


def test_macs_and_parameters_of_three_models():
    def mine(model, *args, **kwargs):
        return get_model_profile(model, args=args, kwargs=kwargs, print_profile=False, as_string=False)

    models = [
        mine(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.ones(3, 8)),
        mine(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU()), torch.ones(2, 4, 10, 6)),
        mine(transformers.LlamaForCausalLM(transformers.LlamaConfig(**zoo._BASE)), input_ids=torch.ones(2, 12, dtype=torch.long)),
    ]  # fmt: skip
    for (flops, macs, parameters), theirs in zip(models, ask(_PROFILE, zoo._BASE), strict=True):
        assert [macs, parameters] == theirs[1:]
        assert flops == pytest.approx(
            theirs[0], rel=0.1
        )  # they count a normalisation's or activation's element otherwise
