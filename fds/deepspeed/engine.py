"""`Engine`: DeepSpeed's training loop over a pure step and its state.

What is hidden in it is little: `state` (the pure step's), the leaves of the calls since the last step, whose gradients autograd adds up, and the number of
the microbatch. Everything else is `program`, `step` and `state`: one can take them and leave.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fds import tree
from fds.compiling import compile as compiled
from fds.deepspeed import batches, saving, watch
from fds.deepspeed.answers import Answers
from fds.deepspeed.data import Curriculum
from fds.deepspeed.front import EngineOptimizer, Hyperparameters
from fds.deepspeed.logging import log_dist
from fds.deepspeed.monitor import Monitor
from fds.deepspeed.pending import Pending
from fds.deepspeed.timers import Throughput, Timers
from fds.deepspeed.weights import Weights
from fds.frame import Frame, scoped, with_updates
from fds.grad import NO_HOOKS
from fds.leaves import Leaves
from fds.lowering import lowered
from fds.offload import compute_device
from fds.program import Axis, Program
from fds.randomness import fold
from fds.sharding import CommsLogger
from fds.train import TrainState, TrainStep, apply_gradients, block_of, mean_over, scaled_by


class Engine(Answers, Weights):
    """See `fds.initialize`.

    ``engine(batch)`` is the model's output, to be followed by autograd; ``engine.backward(loss)`` adds gradients up; ``engine.step()`` updates at the
    boundary of accumulation, and is nothing before it. ``engine.train_batch(iterator)`` is all of that for one step. An order that cannot be meant is
    a `ValueError` that says what comes before.

    * `program`, `step_function`, `state`: the functional objects. The state is that of the last step; the next one writes over it.
    * `module`: a module with the present weights.
    * `recipe`: the program that built it; ``print(engine.recipe.source())``.
    """

    def __init__(self, model: nn.Module, config: Any, built: dict[str, Any], *, recipe: Any = None, optimizer: EngineOptimizer | None = None, schedules: Any = (), collate: Any = None) -> None:  # fmt: skip
        self.config, self.recipe = config, recipe
        self.training_dataloader: Any = None
        self.optimizer, self._collate = optimizer, collate
        self.lr_scheduler: Any = None
        self._scheduled: Any = None  # the torch optimizer that a scheduler of the client's is on
        self.step_function: Any = built.get("step")
        self._built: TrainStep | None = getattr(self.step_function, "step", self.step_function)
        self._programs: dict[bool | None, Program] = {None: built["program"]}
        self._module = weakref.ref(model)
        self._modes = [m.training for m in model.modules()]
        self._training, self._switched = model.training, False
        self._hyper = Hyperparameters(optimizer, schedules) if optimizer is not None else None
        self._pending = Pending()
        self._state = self._first(built["params"])
        self.global_steps, self.skipped_steps, self.micro_steps, self.global_samples = 0, 0, 0, 0
        self.metrics: dict[str, Any] = {}
        self._applied = False
        self._boundary: bool | None = None
        self._inside_no_sync = False
        self._fresh: TrainState | None = None  # the state that the module's weights are of
        self._hybrid: Any = built.get("serving")
        self.monitor = Monitor.of(config)
        self.timers = Timers() if config.wall_clock_breakdown else None
        self.throughput = Throughput(self.train_batch_size()) if config.timers.throughput.enabled else None
        self.comms_logger = CommsLogger(**_section(config.comms_logger))
        self.comms_logger.start()  # nothing, unless it is enabled
        course = config.curriculum_learning
        self._curriculum = Curriculum.of(_section(course)) if course.enabled else None
        self._profiled = False
        self._show()

    def _first(self, given: Any) -> TrainState:
        params, device = given, compute_device()
        if device.type != "cpu":  # the client's module stays where it is; what is placed goes site by site
            params = Leaves(list(given), lambda k: given[k].to(device), "the model")
        if self._built is not None:
            state = self._built.init(params)
        else:
            zero = torch.zeros((), dtype=torch.int64)
            with torch.no_grad():
                state = TrainState(self.program.place(params), (), zero, zero.clone(), zero.clone())
        for name, x in tree.named(state.params).items():
            if x.is_meta:
                raise ValueError(f"initialize: {name} is on the meta device, without a value; build the model under zero.Init, or load it first")  # fmt: skip
        return state

    # --- the functional objects ---

    @property
    def program(self) -> Program:
        """The program that is trained, with all transformations."""
        return self._programs[None]

    @property
    def state(self) -> TrainState:
        """The pure step's state: parameters as they are stored, the optimizer's, counts. Set it to go on from another one."""
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        if self._pending.backwards:
            raise ValueError("state: set in the middle of an accumulation, whose gradients are of the old parameters; after engine.step(), or engine.zero_grad()")  # fmt: skip
        self._state, self._pending = state, Pending()
        if self._hyper is not None:
            self._hyper.forget()  # the groups' numbers are those that count, in this state too

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The mesh axes over which ranks see rows of their own."""
        return self._built.data_axes if self._built is not None else self.program.data_axes

    def _called(self) -> Program:
        """The program in the mode that the engine is in: as the module came, until something in it is switched."""
        module = self._module()
        same = [m.training for m in module.modules()] == self._modes if module is not None else not self._switched
        mode = None if same else self.training
        if mode not in self._programs:
            self._programs[mode] = self.program.train(bool(mode))
        return self._programs[mode]

    # --- modes ---

    @property
    def training(self) -> bool:
        """Whether dropout is active. The client's own ``module.train()`` counts as the engine's."""
        module = self._module()
        if module is not None:
            self._training = module.training
        return self._training

    def train(self, mode: bool = True) -> "Engine":
        """Training mode (dropout active), of the engine and of the client's module."""
        module = self._module()
        if module is not None:
            module.train(mode)
        self._training, self._switched = mode, True
        return self

    def eval(self) -> "Engine":
        """Evaluation mode."""
        return self.train(False)

    # --- forward, backward, step ---

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output. Under `torch.no_grad` nothing is kept for backward."""
        if self._curriculum is not None and self.training:
            args, kwargs = batches.arguments(
                self._curriculum.shorten(batches.named(args, kwargs), self.global_steps + 1)
            )
        if self.config.flops_profiler.enabled:
            watch.profiled_once(self, self._called(), args, kwargs)
        with self._timed("fwd"):
            program, grad, pending = self._called(), torch.is_grad_enabled() and self._built is not None, self._pending
            params = self.state.params
            stored = pending.leaves(params, self.program.spec) if grad else pending.present(params)
            frame = scoped(Frame(), **self._frame(program))
            hooks = torch.autograd.graph.disable_saved_tensors_hooks(NO_HOOKS) if grad else nullcontext()
            with frame, hooks:
                out, updates = with_updates(lowered(program.apply))(stored, *args, **kwargs)
            pending.called(updates, followed=grad)
        return out

    def _frame(self, program: Program) -> dict[str, Any]:
        """Where the call's gradients are reduced, and the seed of its dropout: that of a `train_step` over the same rows."""
        deferred = self._built.deferred if self._built is not None else ()
        if not self.training:
            return {"deferred": deferred}
        seed = fold(self.state.rng, self.state.step)
        calls = self._pending.calls
        seed = fold(seed, calls) if calls else seed
        gas = self.gradient_accumulation_steps()
        return {"deferred": deferred, "seed": seed, "block": block_of(self.axes) * gas + self.micro_steps % gas}

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Add the gradients of a loss to those since the last step, divided by the number of microbatches; the loss so divided is returned.

        Any 0-D tensor that depends on the engine's outputs. Several calls for one microbatch add up.
        """
        step = self._trained("backward")
        scaled = self._checked(loss, "backward")
        value = scaled / self.gradient_accumulation_steps() if scale_wrt_gas else scaled
        scale = step.scale(self.state)
        with self._timed("bwd"), WithLowered():
            (value if scale is None else scaled_by(value, scale)).backward(retain_graph=retain_graph)
        if not self._pending.has_gradients():
            raise ValueError(
                "backward: the loss depends on no parameter of this engine as it is now; compute it from engine(batch) of this step (calls before the last engine.step() are of other parameters)"
            )
        self._pending.carry(self.program, self.state.params)
        self._pending.passed(value)
        return value.detach()

    def scale(self, loss: Tensor) -> Tensor:
        """A loss to call `backward` on yourself, ``engine.scale(loss).backward()``: times the loss scale of fp16, divided by the number of microbatches."""
        step = self._trained("scale")
        if any(p.carries for p in self.program.sites.values()):
            raise ValueError("scale: zeropp_loco_param keeps an error from each backward pass to the next, which the engine has to see; call engine.backward(loss)")  # fmt: skip
        value = self._checked(loss, "scale") / self.gradient_accumulation_steps()
        self._pending.passed(value)
        scale = step.scale(self.state)
        return value if scale is None else scaled_by(value, scale)

    def _checked(self, loss: Any, what: str) -> Tensor:
        if not self._pending.followed:
            raise ValueError(f"{what}: no engine(batch) since the last step; call the engine first, outside of torch.no_grad(), then {what}")  # fmt: skip
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            got = (
                f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}"
                if isinstance(loss, Tensor)
                else type(loss).__name__
            )
            raise ValueError(f"{what}: loss is {got}, required a 0-D floating tensor; reduce it, as with .mean()")
        if not loss.requires_grad:
            raise ValueError(f"{what}: the loss has no graph: it was detached, or computed under torch.no_grad()")
        return loss

    def step(self, lr_kwargs: Any = None) -> None:
        """Update, if this microbatch is the last of a step; in any case the next one begins. `lr_kwargs` go to the client's scheduler."""
        self._trained("step")
        if self._inside_no_sync:
            raise ValueError("step: inside of no_sync(); leave the block first")
        if not self._pending.backwards:
            raise ValueError("step: no engine.backward(loss) since the last engine.step(); the order is loss = engine(batch), engine.backward(loss), engine.step()")  # fmt: skip
        boundary = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        self._pending.next_microbatch()
        self._applied = False
        if boundary:
            with self._timed("step"):
                self._update()
            self._after(lr_kwargs)

    def _update(self) -> None:
        step = self._trained("step")
        pending, program = self._pending, self.program
        grads = pending.taken(program)
        state = self._pushed()
        with torch.no_grad(), WithLowered():
            value = mean_over(sum((x.float() for x in pending.losses), torch.zeros(())), self.axes)
            carried = {s: {k: v for k, v in part.items() if k in program.sites[s].carries} for s, part in pending.updates.items()}  # fmt: skip
            buffers = {s: {k: v for k, v in part.items() if k not in carried[s]} for s, part in pending.updates.items()}
            meant = mean_over(buffers, self.axes)
            updates = {s: {**meant[s], **carried[s]} for s in meant}
            self._state, self.metrics = apply_gradients(step, state, value, grads, updates, {}, donated=True)
        self._pending = Pending()

    def _pushed(self) -> TrainState:
        """The state, with the hyperparameters that the client's optimizer has now."""
        if self._hyper is not None:
            self._state = self._state._replace(optimizer=self._hyper.push(self._state.optimizer))
        return self._state

    def _after(self, lr_kwargs: Any = None) -> None:
        """What follows an update: counters, the client's scheduler, lines and events."""
        skipped = bool(self.metrics["was_skipped"])
        self._applied = not skipped
        self.skipped_steps += skipped
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        if skipped:
            log_dist(watch.skipped_line(self), ranks=[0])
        elif self._scheduled is not None and self.lr_scheduler is not None:
            self._scheduled._opt_called = True  # torch's scheduler asks whether the optimizer was stepped
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self._show()
        watch.reported(self)

    def _show(self) -> None:
        if self._hyper is not None:
            self._hyper.show(self.global_steps - self.skipped_steps)

    def zero_grad(self) -> None:
        """Drop the gradients since the last step."""
        self._pending = Pending()

    def _trained(self, what: str) -> TrainStep:
        if self._built is None:
            raise ValueError(
                f"{what}: this engine has no optimizer; give initialize one, or name it in the configuration"
            )
        return self._built

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        with self.timers(name) if self.timers is not None else nullcontext():
            yield

    # --- accumulation ---

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the present microbatch is the last of a step."""
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Say yourself whether the present microbatch is the last of a step; None: the engine counts again."""
        self._boundary = is_boundary

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """No reduction of gradients in backward. At stages 0 to 2 there never is one before the update; stage 3 cannot do without, as in DeepSpeed."""
        if self._inside_no_sync:
            raise ValueError("no_sync: inside of no_sync() already")
        if self.zero_optimization_stage() == 3:
            raise ValueError(
                "no_sync: stage 3 keeps 1/n of the gradients, so that every backward reduces; use stage 0, 1 or 2"
            )
        self._inside_no_sync = True
        try:
            yield
        finally:
            self._inside_no_sync = False

    # --- whole steps ---

    def compile(self, **options: Any) -> None:
        """Make `train_batch` one graph: forward, backward, collectives and update (`fds.compile`, which gets the options)."""
        self.step_function = compiled(self._trained("compile"), **options)

    def train_batch(self, data_iter: Any = None) -> Tensor:
        """One step of ``gradient_accumulation_steps`` batches of an iterator (default: of the engine's loader); the mean loss over all ranks.

        The model computes its loss (`batches.loss_in`). Compiled where the configuration says ``compile.deepcompile``, or after `compile`.
        """
        self._trained("train_batch")
        if self.micro_steps % self.gradient_accumulation_steps() or self._pending.backwards or self._inside_no_sync:
            raise ValueError("train_batch: in the middle of an accumulation; finish it with engine.step() first")
        if not self.training:
            raise ValueError("train_batch: the engine is in evaluation mode; call engine.train() first")
        found = batches.count(self._data(data_iter, "train_batch"), self.gradient_accumulation_steps(), "train_batch")
        if self.step_function is not self._built:
            return self._whole(found)
        for batch in found:
            args, kwargs = batches.arguments(batch)
            self.backward(batches.loss_in(self(*args, **kwargs)))
            self.step()
        return self.metrics["loss"]

    def _whole(self, found: list[Any]) -> Tensor:
        whole = batches.joined(found)
        if self._curriculum is not None:
            whole = self._curriculum.shorten(whole, self.global_steps + 1)
        if self.config.flops_profiler.enabled:
            watch.profiled_once(self, self._called(), *batches.arguments(found[0]))
        self._pending = Pending()
        with self._timed("step"):
            self._state, self.metrics = self.step_function(self._pushed(), whole)
        self.micro_steps += len(found)
        self._after()
        return self.metrics["loss"]

    @torch.no_grad()
    def eval_batch(self, data_iter: Any, num_micro_batches: int | None = None) -> Tensor:
        """The mean loss of so many batches of an iterator (default: a step's), over all ranks, in evaluation mode and without gradients."""
        found = batches.count(iter(data_iter), num_micro_batches or self.gradient_accumulation_steps(), "eval_batch")
        module, before = self._module(), (self._training, self._switched)
        modes = [] if module is None else [(m, m.training) for m in module.modules()]
        self.eval()
        try:
            losses = [batches.loss_in(self(*args, **kwargs)) for args, kwargs in map(batches.arguments, found)]
        finally:
            self._training, self._switched = before
            for m, mode in modes:
                m.training = mode
        return mean_over(torch.stack([x.float() for x in losses]).mean(), self.axes)

    def _data(self, data_iter: Any, what: str) -> Any:
        if data_iter is not None:
            return iter(data_iter)
        if self.training_dataloader is None:
            raise ValueError(f"{what}: no iterator, and initialize got no training_data; give one of them")
        if self._endless is None:
            from fds.deepspeed.data import RepeatingLoader

            self._endless = RepeatingLoader(self.training_dataloader)
        return self._endless

    _endless: Any = None

    def deepspeed_io(self, dataset: Any, **options: Any) -> Any:
        """A loader of this rank's batches of a data set (`fds.deepspeed.data.DistributedLoader`)."""
        return saving.loader(self, dataset, collate_fn=options.pop("collate_fn", self._collate), **options)

    def destroy(self) -> None:
        """Close monitors, and let go of what is held."""
        self.comms_logger.stop()
        self.monitor.close()
        self._pending = Pending()

    def __getattr__(self, name: str) -> Any:
        """The model's own attributes (``engine.config`` is DeepSpeed's), as far as they are plain values: methods want a module with weights."""
        if name.startswith("_") or "_programs" not in self.__dict__:
            raise AttributeError(name)
        module = self._programs[None].origin.core.module  # pyright: ignore[reportOptionalMemberAccess]
        found = getattr(module, name, None)
        if found is None or callable(found) or isinstance(found, Tensor):
            raise AttributeError(f"Engine has no attribute {name!r}; of the model's own: engine.module.{name}")
        return found

    def __repr__(self) -> str:
        return f"Engine(step {self.global_steps}, {self.program!r})"


class WithLowered:
    """Backward passes and updates under the products that calls are made with (`fds.lowering`)."""

    def __enter__(self) -> None:
        from fds.lowering import WideProducts, emulated

        slow = emulated()
        self.mode: Any = WideProducts(slow) if slow else nullcontext()
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)


def _section(section: Any) -> dict[str, Any]:
    """A section of the configuration as plain values: what is not given is left out."""
    found = attrs.asdict(section)
    return {k: {n: x for n, x in v.items() if x is not None} if isinstance(v, dict) else v for k, v in found.items() if v is not None}  # fmt: skip
