"""What an engine hands out and takes in: weights, checkpoints, text."""

import weakref
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from fds.deepspeed import saving
from fds.program import Program
from fds.train import TrainState

if TYPE_CHECKING:
    from fds.deepspeed.engine import Engine


class Weights:
    """The part of `Engine` about its weights."""

    _module: Any  # a weak reference to the client's module
    _modes: list[bool]
    _training: bool
    _switched: bool
    _fresh: TrainState | None  # the state that the module's weights are of

    @property
    def program(self) -> Program:
        raise NotImplementedError

    @property
    def state(self) -> TrainState:
        raise NotImplementedError

    @property
    def _engine(self) -> "Engine":
        return cast("Engine", self)

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
        return saving.state_dict(self._engine, exclude_frozen_parameters=exclude_frozen_parameters)

    def save_checkpoint(self, save_dir: Any, tag: Any = None, client_state: Any = None, save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:  # fmt: skip
        """See `saving.save_checkpoint`."""
        return saving.save_checkpoint(self._engine, save_dir, tag, client_state, save_latest, exclude_frozen_parameters)

    def load_checkpoint(self, load_dir: Any, tag: Any = None, load_module_strict: bool = True, load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True, load_module_only: bool = False, custom_load_fn: Any = None) -> tuple[str | None, dict[str, Any] | None]:  # fmt: skip
        """See `saving.load_checkpoint`."""
        return saving.load_checkpoint(self._engine, load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only, custom_load_fn)  # fmt: skip

    def save_16bit_model(self, save_dir: Any, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False) -> bool:  # fmt: skip
        """See `saving.save_16bit_model`."""
        return saving.save_16bit_model(self._engine, save_dir, save_filename, exclude_frozen_parameters)

    save_fp16_model = save_16bit_model

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Token ids, prompts in front: `inference.hybrid`, with the settings of ``hybrid_engine`` where that is enabled.

        `options`: those of `fds.generate`, and ``max_length``, ``do_sample``, ``pad_token_id``, ``eos_token_id`` as transformers calls them.
        """
        from fds.deepspeed.generation import generate

        return generate(self._engine, input_ids, attention_mask, **options)


__all__ = ["Weights"]
