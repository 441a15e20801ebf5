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
from fds.deepspeed.timers import Throughput, Timers
from fds.frame import Frame, scoped, with_updates
from fds.grad import NO_HOOKS
from fds.leaves import Leaves
from fds.lowering import lowered
from fds.offload import compute_device
from fds.program import Axis, Program
from fds.randomness import fold
from fds.sharding import CommsLogger
from fds.train import TrainState, TrainStep, apply_gradients, block_of, mean_over, scaled_by
from fds.tree import Stored


class Engine(Answers):
    """See `fds.initialize`.

    ``engine(batch)`` is the model's output, to be followed by autograd; ``engine.backward(loss)`` adds gradients up; ``engine.step()`` updates at the
    boundary of accumulation, and is nothing before it. ``engine.train_batch(iterator)`` is all of that for one step. An order that cannot be meant is
    a `ValueError` that says what comes before.

    * `program`, `step_function`, `state`: the functional objects. The state is that of the last step; the next one writes over it.
    * `module`: a module with the present weights.
    * `recipe`: the program that built it; ``print(engine.recipe.source())``.
    """

    def __init__(self, model: nn.Module, config: Any, built: dict[str, Any], *, recipe: Any = None, optimizer: EngineOptimizer | None = None, schedules: Any = (), lr_scheduler: Any = None, client: Any = None, loader: Any = None, collate: Any = None) -> None:  # fmt: skip
        self.config, self.recipe = config, recipe
        self.training_dataloader, self._collate = loader, collate
        self.optimizer, self.lr_scheduler, self._client = optimizer, lr_scheduler, client
        self.step_function: Any = built.get("step")
        self._built: TrainStep | None = getattr(self.step_function, "step", self.step_function)
        self._programs: dict[bool | None, Program] = {None: built["program"]}
        self._module = weakref.ref(model)
        self._modes = [m.training for m in model.modules()]
        self._training, self._switched = model.training, False
        self._hyper = Hyperparameters(optimizer, schedules) if optimizer is not None else None
        self._live: Stored | None = None
        self._backwards = 0
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
        self._forget()
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
        if self._backwards:
            raise ValueError("state: set in the middle of an accumulation, whose gradients are of the old parameters; after engine.step(), or engine.zero_grad()")  # fmt: skip
        self._state, self._live = state, None

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
        if self.config.flops_profiler.enabled and self.global_steps == self.config.flops_profiler.profile_step:
            watch.profiled(self, self._called(), args, kwargs)
        with self._timed("fwd"):
            program, grad = self._called(), torch.is_grad_enabled() and self._built is not None
            stored = self._leaves() if grad else self._present()
            frame = scoped(Frame(), **self._frame(program))
            hooks = torch.autograd.graph.disable_saved_tensors_hooks(NO_HOOKS) if grad else nullcontext()
            with frame, hooks:
                out, updates = with_updates(lowered(program.apply))(stored, *args, **kwargs)
            self._calls += 1
            self._since += int(grad)
            for s, part in updates.items():
                self._updates.setdefault(s, {}).update({k: v.detach() for k, v in part.items()})
                if self._live is not None:
                    self._live[s] = {**self._live[s], **self._updates[s]}
        return out

    def _frame(self, program: Program) -> dict[str, Any]:
        """Where the call's gradients are reduced, and the seed of its dropout: that of a `train_step` over the same rows."""
        deferred = self._built.deferred if self._built is not None else ()
        if not self.training:
            return {"deferred": deferred}
        seed = fold(self.state.rng, self.state.step)
        seed = fold(seed, self._calls) if self._calls else seed
        gas = self.gradient_accumulation_steps()
        return {"deferred": deferred, "seed": seed, "block": block_of(self.axes) * gas + self.micro_steps % gas}

    def _leaves(self) -> Stored:
        """The stored parameters of the calls until the next step: leaves of autograd's, which add their gradients up."""
        if self._live is None:
            spec, stored = self.program.spec, self._present()
            self._live = {s: {k: x.detach().requires_grad_(spec[s][k].requires_grad) for k, x in part.items()} for s, part in stored.items()}  # fmt: skip
        return self._live

    def _present(self) -> Stored:
        """The state's parameters, with the buffers as the calls since the last step left them."""
        return {s: {**part, **self._updates.get(s, {})} for s, part in self.state.params.items()}

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
        if not any(x.grad is not None for x in tree.flat(self._live) if x.requires_grad):
            raise ValueError(
                "backward: the loss depends on no parameter of this engine as it is now; compute it from engine(batch) of this step (calls before the last engine.step() are of other parameters)"
            )
        self._carry()
        self._losses.append(value.detach())
        self._backwards += 1
        return value.detach()

    def scale(self, loss: Tensor) -> Tensor:
        """A loss to call `backward` on yourself, ``engine.scale(loss).backward()``: times the loss scale of fp16, divided by the number of microbatches."""
        step = self._trained("scale")
        value = self._checked(loss, "scale") / self.gradient_accumulation_steps()
        self._losses.append(value.detach())
        self._backwards += 1
        scale = step.scale(self.state)
        return value if scale is None else scaled_by(value, scale)

    def _checked(self, loss: Any, what: str) -> Tensor:
        if not self._since:
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

    def _carry(self) -> None:
        """What lenses keep from step to step (error feedback) goes on after each backward pass, as in `train_step`."""
        carried = {s: p.carries for s, p in self.program.sites.items() if p.carries}
        if not carried or self._live is None:
            return
        if self._since > 1 + self._backwards:
            raise ValueError("backward: zeropp_loco_param keeps an error from each pass to the next: one engine(batch), then one backward")  # fmt: skip
        grads = {s: {k: _gradient(self._live[s][k]) for k in names} for s, names in carried.items()}
        for s, part in self.program.carry({**self._present()}, grads).items():
            self._updates.setdefault(s, {}).update(part)
            self._live[s] = {**self._live[s], **{k: x.detach().requires_grad_() for k, x in part.items()}}

    def step(self, lr_kwargs: Any = None) -> None:
        """Update, if this microbatch is the last of a step; in any case the next one begins. `lr_kwargs` go to the client's scheduler."""
        self._trained("step")
        if self._inside_no_sync:
            raise ValueError("step: inside of no_sync(); leave the block first")
        if not self._backwards:
            raise ValueError("step: no engine.backward(loss) since the last engine.step(); the order is loss = engine(batch), engine.backward(loss), engine.step()")  # fmt: skip
        boundary = self.is_gradient_accumulation_boundary()
        self.micro_steps += 1
        self._backwards = self._calls = 0
        self._applied = False
        if boundary:
            with self._timed("step"):
                self._update()
            self._after(lr_kwargs)

    def _update(self) -> None:
        step = self._trained("step")
        assert self._live is not None
        live, self._live = self._live, None
        spec = self.program.spec
        grads = {s: {k: _gradient(x) for k, x in part.items() if spec[s][k].requires_grad and k not in self.program.sites[s].carries} for s, part in live.items()}  # fmt: skip
        del live
        state = self._pushed()
        with torch.no_grad(), WithLowered():
            value = mean_over(sum((x.float() for x in self._losses), torch.zeros(())), self.axes)
            buffers = {s: {k: v for k, v in part.items() if k not in self.program.sites[s].carries} for s, part in self._updates.items()}  # fmt: skip
            carried = {s: {k: v for k, v in part.items() if k in self.program.sites[s].carries} for s, part in self._updates.items()}  # fmt: skip
            meant = mean_over(buffers, self.axes)
            updates = {s: {**meant[s], **carried[s]} for s in meant}
            self._state, self.metrics = apply_gradients(step, state, value, grads, updates, {}, donated=True)
        self._forget()

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
        elif self._client is not None and self.lr_scheduler is not None:
            self._client._opt_called = True  # torch's scheduler asks whether the optimizer was stepped
            self.lr_scheduler.step(**(lr_kwargs or {}))
        self._show()
        watch.reported(self)

    def _show(self) -> None:
        if self._hyper is not None:
            self._hyper.show(self.global_steps - self.skipped_steps)

    def zero_grad(self) -> None:
        """Drop the gradients since the last step."""
        self._forget()

    def _forget(self) -> None:
        self._live = None
        self._updates: Stored = {}
        self._losses: list[Tensor] = []
        self._since = self._calls = self._backwards = 0

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
        if self.micro_steps % self.gradient_accumulation_steps() or self._backwards or self._inside_no_sync:
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
        self._forget()
        with self._timed("step"):
            self.state, self.metrics = self.step_function(self._pushed(), whole)
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

    # --- weights ---

    @property
    def module(self) -> nn.Module:
        """The client's module with the present weights, or, if the client has dropped it, one like it.

        Where parameters are in shards (stage 3, tensor parallelism) or in a store, no rank has them whole: then it is the module on the meta device, for
        its class, configuration and attributes. `module_state_dict` gathers weights, on all ranks at once.
        """
        origin: Any = self.program.origin.core
        if any(p.axes or p.handles for p in self.program.sites.values()):
            return origin.module
        module = self._module()
        if module is None:
            module = self._own = saving.materialized(self.program, self.state.params).train(self._training)
            self._module, self._modes = (
                weakref.ref(module),
                [m.training for m in module.modules()] if not self._switched else [],
            )
            self._fresh = self.state
        if self._fresh is not self.state:
            saving.write_into(module, self.program, self.state.params)
            self._fresh = self.state
        return module

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """All weights by name, whole, in host memory, on rank 0; on the other ranks nothing. Every rank has to call it."""
        return saving.state_dict(self, exclude_frozen_parameters=exclude_frozen_parameters)

    def save_checkpoint(self, save_dir: Any, tag: Any = None, client_state: Any = None, save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:  # fmt: skip
        """See `saving.save_checkpoint`."""
        return saving.save_checkpoint(self, save_dir, tag, client_state, save_latest, exclude_frozen_parameters)

    def load_checkpoint(self, load_dir: Any, tag: Any = None, load_module_strict: bool = True, load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True, load_module_only: bool = False, custom_load_fn: Any = None) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
        """See `saving.load_checkpoint`."""
        return saving.load_checkpoint(self, load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only, custom_load_fn)  # fmt: skip

    def save_16bit_model(self, save_dir: Any, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False) -> bool:  # fmt: skip
        """See `saving.save_16bit_model`."""
        return saving.save_16bit_model(self, save_dir, save_filename, exclude_frozen_parameters)

    save_fp16_model = save_16bit_model

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Token ids, prompts in front: `inference.hybrid`, with the settings of ``hybrid_engine`` where that is enabled.

        `options`: those of `fds.generate`, and ``max_length``, ``do_sample``, ``pad_token_id``, ``eos_token_id`` as transformers calls them.
        """
        from fds.deepspeed.generation import generate

        return generate(self, input_ids, attention_mask, **options)

    def destroy(self) -> None:
        """Close monitors, and let go of what is held."""
        self.comms_logger.stop()
        self.monitor.close()
        self._forget()

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


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad
