"""What an engine says while it runs: lines on rank 0, events for monitors, the profile of one step."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fds.accelerator import get_accelerator
from fds.deepspeed.batches import arguments, loss_in, named
from fds.deepspeed.logging import log_dist
from fds.deepspeed.timers import breakdown_events, breakdown_line, due, progress_line, step_events
from fds.files import rank
from fds.frame import scoped
from fds.grad import value_and_grad
from fds.program import Program

if TYPE_CHECKING:
    from fds.deepspeed.engine import Engine


def reported(engine: "Engine") -> None:
    """After a step: the lines of ``steps_per_print``, ``memory_breakdown`` and ``wall_clock_breakdown``, and the monitors' events."""
    config, rate = engine.config, engine.throughput.step() if engine.throughput is not None else None
    if due(engine.global_steps, config.steps_per_print):
        line = progress_line(engine.global_steps, engine.skipped_steps, engine.get_lr(), engine.get_mom())
        log_dist(line + ("" if rate is None else f", samples/s={rate:.2f}"), ranks=[0])
    if config.memory_breakdown:
        log_dist(memory_line(), ranks=[0])
    times = engine.timers.milliseconds() if engine.timers is not None else {}
    if times:
        log_dist(breakdown_line(times), ranks=[0])
    if engine.monitor.enabled:
        scale = float(engine.metrics["loss_scale"]) if "loss_scale" in engine.metrics else None
        events = step_events(float(engine.metrics["loss"]), engine.get_lr()[0], engine.global_samples, scale)
        engine.monitor.write_events([*events, *breakdown_events(times, engine.global_samples)])


def memory_line() -> str:
    """What ``memory_breakdown`` says after a step."""
    a = get_accelerator()
    return f"memory now {a.memory_allocated() / 2**30:.2f} GiB, most {a.max_memory_allocated() / 2**30:.2f} GiB"


def skipped_line(engine: "Engine") -> str:
    """What is said of a step that was skipped: which leaves were not finite, and at which loss scale."""
    bad = [k for k, x in engine.metrics["nonfinite"].items() if bool(x)]
    scale = f", loss scale {float(engine.metrics['loss_scale']):g}" if "loss_scale" in engine.metrics else ""
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"step {engine.global_steps} was skipped: not finite: {', '.join(bad[:3]) or 'the loss'}{more}{scale}"


def profiled_once(engine: "Engine", program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Print the profile of the first call at the step that ``flops_profiler`` names, backward included where the model computes a loss, on rank 0:
    counted without computing."""
    due_now = engine.training and engine.global_steps == engine.config.flops_profiler.profile_step
    if not due_now or engine._profiled:
        return
    engine._profiled = True
    if rank() != 0:
        return
    from fds.deepspeed import profiler, profiles

    section, batch = engine.config.flops_profiler, named(args, kwargs)

    def loss(stored: Any, batch: Any) -> Any:
        more, options = arguments(batch)
        return loss_in(program(stored, *more, **options))

    def forward(stored: Any, batch: Any) -> Any:
        more, options = arguments(batch)
        return program(stored, *more, **options)

    stored = engine.state.params
    with scoped(seed=engine.state.rng):
        try:
            found = profiler.profile(value_and_grad(loss, wrt=program), stored, batch, of=program)
        except ValueError:  # no loss in the output: forward alone
            found = profiler.profile(forward, stored, batch, of=program)
    text = profiles.lines(found, module_depth=section.module_depth, top_modules=section.top_modules, detailed=section.detailed)  # fmt: skip
    profiles.write(text, section.output_file)


__all__ = ["memory_line", "profiled_once", "reported", "skipped_line"]
