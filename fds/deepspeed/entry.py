"""`fds.initialize`: DeepSpeed's entry point."""

import os
from collections.abc import Mapping
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import nn

from fds.deepspeed import client as clients
from fds.deepspeed import saving, zero
from fds.deepspeed.chain import recipe
from fds.deepspeed.config import DeepSpeedConfig
from fds.deepspeed.engine import Engine
from fds.deepspeed.errors import DeepSpeedConfigError
from fds.deepspeed.front import EngineOptimizer, EngineScheduler, groups_for
from fds.deepspeed.logging import log_dist, logger
from fds.deepspeed.recipe import Recipe, value
from fds.files import ranks as all_ranks
from fds.version import __git_branch__, __git_hash__


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Engine, EngineOptimizer | None, Any, Any]:
    """Make a model and a ds_config into an engine: ``(engine, optimizer, training_dataloader, lr_scheduler)``. On every rank.

    What is built is logged on rank 0 as runnable Python: the chain of transformations, the optimizer, the train step.

    Args:
        args: with `deepspeed_config`, a path, in place of `config`.
        model: any `nn.Module`. It is not changed, but for the mode of ``engine.train()`` and ``engine.eval()``; its weights after training are
            ``engine.module``'s. Drop it to have its memory back.
        optimizer: one of torch's (or a function of parameters that makes one) in place of the configuration's: its class becomes a rule of fds, its
            groups stay the place where numbers are read. Leaves that it does not have are frozen.
        model_parameters: parameters or groups for the configuration's optimizer. Default: all that take gradients.
        training_data: a data set, for the third result.
        lr_scheduler: of torch, on `optimizer`; or a function of an optimizer that makes one.
        distributed_port, dist_init_required: of `fds.init_distributed`; False: the process group has to be there.
        mpu: an object with ``get_data_parallel_world_size()``; that has to be what the configuration says.
        collate_fn: of the loader.
        config: a dictionary, a path of JSON or HJSON, base64, or a `DeepSpeedConfig`.
        mesh_param: (data-parallel ranks, sequence-parallel ranks); the second has to be 1.
        config_params: an old name of `config`.

    Raises:
        DeepSpeedConfigError: the configuration; ValueError: anything else that does not fit.
    """
    log_dist(f"fds {_version()}, git {__git_hash__ or 'unknown'}, branch {__git_branch__ or 'unknown'}", ranks=[0])
    if not isinstance(model, nn.Module):
        raise ValueError(f"initialize: model is {type(model).__name__}, required a torch.nn.Module")
    _start(distributed_port, dist_init_required, args)
    found = _config(args, config if config is not None else config_params, model, mpu, mesh_param)
    made = _optimizer(optimizer, model_parameters, model, lr_scheduler)
    groups = _groups(found, model, made, model_parameters, lr_scheduler)
    plan = _plan(found, model, groups)
    front = _front(made, groups)
    built = plan.build(model=model)
    schedules = [None if g.schedule is None else value(g.schedule, {}).learning_rate for g in groups]
    engine = Engine(model, found, built, recipe=plan, optimizer=front, schedules=schedules, collate=collate_fn)  # fmt: skip
    core: Any = engine.program.origin.core
    for module in {id(m): m for m in (model, core.module)}.values():
        zero.attach(module, engine, getattr(built.get("step"), "tx", None))  # for `zero.GatheredParameters`
    engine.lr_scheduler = _scheduler(lr_scheduler, front, made, found, groups, engine)
    if training_data is not None:
        engine.training_dataloader = saving.loader(engine, training_data, collate_fn=collate_fn)
    if made is not None:
        _release(made)
    return engine, front, engine.training_dataloader, engine.lr_scheduler


def _groups(config: Any, model: nn.Module, made: Any, parameters: Any, scheduler: Any) -> list[clients.Group]:
    """What is trained by which rule, of the client's optimizer or of the configuration's; with the configuration's schedule, unless the client has one."""
    if made is None:
        groups = clients.groups_of(config, model, parameters)
    else:
        groups = clients.of_torch(made, model, apart=scheduler is not None or bool(config.scheduler.type))
    own = None if scheduler is not None else config
    return [attrs.evolve(g, schedule=None if own is None else clients.schedule_of(own, g.params)) for g in groups]


def _plan(config: Any, model: nn.Module, groups: list[clients.Group]) -> Recipe:
    """The program, and a line of the log with it."""
    frozen = clients.left_out(groups, model) if groups else []
    patterns = clients.patterns(frozen, clients.trainable(model)) if frozen else ()
    plan = recipe(config, model, groups=groups, frozen=patterns)
    if config.log_level is not None:
        logger.setLevel(config.log_level.upper())
    if config.dump_state:
        log_dist(str(config), ranks=[0])
    log_dist("the configuration is this program:\n" + plan.source(), ranks=[0])
    return plan


def _version() -> str:
    from fds import __version__

    return __version__


def _start(port: int, required: bool | None, args: Any) -> None:
    from fds.sharding.comm import init_distributed, world_size

    running = dist.is_available() and dist.is_initialized()
    if required is False and not running:
        raise ValueError(
            "initialize: dist_init_required=False, and no process group is running; start one, or leave it out"
        )
    local = getattr(args, "local_rank", None)
    if local is not None and int(local) >= 0 and int(os.environ.get("LOCAL_RANK", str(local))) != int(local):
        raise ValueError(f"initialize: args.local_rank is {local}, and LOCAL_RANK is {os.environ['LOCAL_RANK']}; start with torchrun, which sets both")  # fmt: skip
    if not running and world_size() > 1:
        init_distributed(distributed_port=port, verbose=False)


def _config(args: Any, config: Any, model: nn.Module, mpu: Any, mesh_param: Any) -> Any:
    old, named = getattr(args, "deepscale_config", None), getattr(args, "deepspeed_config", None)
    if old is not None and named is not None:
        raise ValueError("initialize: args.deepscale_config and args.deepspeed_config are both given; give the second")
    named = named if named is not None else old
    if named is not None and config is not None:
        raise ValueError("initialize: config= and args.deepspeed_config are both given; give one of them")
    config = config if config is not None else named
    if config is None:
        raise ValueError("initialize: no configuration; give config=, or --deepspeed_config on the command line")
    found = config if isinstance(config, DeepSpeedConfig) else DeepSpeedConfig(config, mpu, model=model)
    if found.world_size != all_ranks():
        raise DeepSpeedConfigError(f"initialize: the configuration was read for {_ranks(found.world_size)}, and the job has {_ranks(all_ranks())}; read it by DeepSpeedConfig(..., world_size={all_ranks()}), or give initialize its path or dictionary", ["world_size"])  # fmt: skip
    if mesh_param is not None:
        sizes = tuple(int(n) for n in mesh_param)
        if len(sizes) != 2 or sizes[1] != 1 or sizes[0] != found.data_parallel_size:
            raise ValueError(f"initialize: mesh_param={mesh_param!r}, required ({found.data_parallel_size}, 1): the data-parallel ranks there are, and no sequence parallelism over ranks")  # fmt: skip
    tp = max(int(found.tensor_parallel.autotp_size), 1)
    if found.data_parallel_size * tp != found.world_size:
        raise ValueError(f"initialize: {found.data_parallel_size} data-parallel ranks (mpu) times tensor_parallel.autotp_size {tp} are not the {found.world_size} ranks of the job; set autotp_size to the model-parallel ranks")  # fmt: skip
    return found


def _ranks(n: int) -> str:
    return f"{n} rank{'s' * (n > 1)}"


def _optimizer(given: Any, parameters: Any, model: nn.Module, scheduler: Any) -> torch.optim.Optimizer | None:
    """The client's optimizer."""
    if given is None:
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            raise ValueError("initialize: lr_scheduler is an instance, on an optimizer that was not given; give optimizer= as well, or a function of an optimizer")  # fmt: skip
        return None
    if isinstance(given, torch.optim.Optimizer):
        if parameters is not None and not _same(given, parameters):
            raise ValueError("initialize: optimizer and model_parameters are both given, with different parameters; leave model_parameters out")  # fmt: skip
        return given
    if not callable(given):
        raise ValueError(f"initialize: optimizer is {type(given).__name__}, required one of torch, or a function of parameters that makes one")  # fmt: skip
    default = [p for p in model.parameters() if p.requires_grad]
    made = given(default if parameters is None else list(parameters))
    if not isinstance(made, torch.optim.Optimizer):
        raise ValueError(f"initialize: optimizer(parameters) returned {type(made).__name__}, required one of torch's")
    return made


def _same(optimizer: torch.optim.Optimizer, parameters: Any) -> bool:
    given = list(parameters)
    flat = [p for x in given for p in (x["params"] if isinstance(x, Mapping) else [x])]
    return not flat or {id(p) for p in flat} >= {id(p) for g in optimizer.param_groups for p in g["params"] if p.requires_grad}  # fmt: skip


def _front(made: torch.optim.Optimizer | None, groups: list[clients.Group]) -> EngineOptimizer | None:
    if not groups:
        return None
    if made is None:
        return EngineOptimizer(groups_for(groups))
    kept = [g for g in made.param_groups if any(p.requires_grad for p in g["params"])]
    return EngineOptimizer(kept[: len(groups)])  # one group stands for all that are alike


def _scheduler(given: Any, front: EngineOptimizer | None, made: Any, config: Any, groups: list[clients.Group], engine: Engine) -> Any:  # fmt: skip
    name = config.scheduler.type
    if given is not None and name:
        log_dist(f"initialize: lr_scheduler is given, and the configuration's {name} is not used", ranks=[0])
    if front is None:
        if given is not None or name:
            raise ValueError("initialize: a scheduler without an optimizer")
        return None
    if given is not None:
        engine._scheduled = made if made is not None else front
        if isinstance(given, torch.optim.lr_scheduler.LRScheduler) or not callable(given):
            if getattr(given, "optimizer", made) is not made:
                raise ValueError("initialize: lr_scheduler belongs to another optimizer than the one that is given")
            return given
        return given(made if made is not None else front)
    return EngineScheduler(front, lambda: engine.global_steps - engine.skipped_steps) if name else None


def _release(made: torch.optim.Optimizer) -> None:
    """The client's optimizer keeps its numbers, and lets go of the parameters, which are the engine's now."""
    for group in made.param_groups:
        group["params"] = [nn.Parameter(torch.empty(0))]
    made.state.clear()


__all__ = ["initialize"]
