"""The one door for operators: `define`.

An operator is a formula with two implementations, an aten reference (the CPU path) and a kernel (CUDA), under one name. `define` gives it
what it needs to work under every transformation: shapes for the compiler, a vmap rule, first and second derivatives, forward and reverse.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fds import tree
from fds._torch import operator

_OPERATORS: dict[str, "Operator"] = {}
Backward = Callable[[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], list[bool]], Any]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, one program after the other


@attrs.frozen(eq=False, repr=False)
class Operator:
    """An operator: called like a function of its positional arguments; `reference` is the same in aten, on any device.

    >>> import torch, fds.kernels
    >>> op = fds.kernels.operators()["linear_cross_entropy"]
    >>> arguments = op.example(0, torch.float32)
    >>> torch.allclose(op(*arguments)[0], op.reference(*arguments)[0])
    True
    """

    name: str
    formula: str
    why: str  # why a kernel, where a compiler makes kernels
    reference: Callable[..., Any]
    example: Callable[[int, torch.dtype], tuple[Any, ...]]  # (seed, dtype) -> arguments
    supports: Callable[..., None]  # raises ValueError for what no implementation takes
    run: Callable[..., Any]  # the operator of torch
    differentiable: tuple[int, ...] = ()  # places of the arguments that take gradients
    kernels: tuple["Configured", ...] = ()

    def __call__(self, *args: Any) -> Any:
        self.supports(*args)
        return self.run(*args)

    def __repr__(self) -> str:
        return f"fds.kernels.{self.name}: {self.formula}"


@attrs.frozen
class Configured:
    """A Triton kernel with one choice of its compile-time constants, as it is launched: what the ahead-of-time gate compiles."""

    kernel: Any  # a @triton.jit function
    types: dict[str, str]  # argument -> "*bf16", "*fp32", "i32", "fp32", ...
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    wide_loads: bool = True  # whether 128-bit loads have to be there
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16: strides of rows
    contains: tuple[str, ...] = ()  # what the PTX has to contain: the rounding that the numerics promise

    @property
    def label(self) -> str:
        settings = {k: v for k, v in self.types.items() if v.startswith("*")} | self.constants
        settings |= {"warps": self.warps, "stages": self.stages}
        return f"{self.kernel.__name__}({', '.join(f'{k}={v}' for k, v in settings.items())})"


def define(
    name: str,
    schema: str,
    *,
    formula: str,
    why: str,
    reference: Callable[..., Any],
    example: Callable[[int, torch.dtype], tuple[Any, ...]],
    kernel: Callable[..., Any] | None = None,
    backward: Backward | None = None,
    backward_kernel: Backward | None = None,
    first_order: Sequence[int] | None = None,
    differentiable: Sequence[str] = (),
    supports: Callable[..., None] = lambda *_: None,
    fake: Callable[..., Any] | None = None,
    batch: Callable[..., Any] | None = None,
    kernels: Sequence[Configured] = (),
    forgets: Sequence[str] = (),
    inline: bool = True,
) -> Operator:
    """Define an operator and everything that transformations ask of it.

    Args:
        schema: torch's, without the name: ``"(Tensor x, float eps) -> Tensor"``.
        reference: the formula in aten; takes any device and every floating dtype, and returns new contiguous tensors.
        example: ``(seed, dtype) -> arguments``, small, all floating ones of `dtype`.
        kernel: the same on CUDA, with contiguous operands. Without it CUDA takes the reference.
        backward: in aten, ``(cotangents, inputs, outputs, needs) -> gradients`` of the `differentiable` arguments. A cotangent is None where
            it is zero; a gradient may be None where `needs` says no. Differentiated itself for second derivatives.
        backward_kernel: the same on CUDA. Without it CUDA takes `backward`.
        first_order: the outputs for whose cotangents `backward` holds, if not for all: for others the reference is differentiated.
        differentiable: names of the tensor arguments that take gradients. Derivatives by others are errors.
        supports: raises `ValueError` for arguments that the operator does not take, naming what it does.
        fake: shapes and dtypes of the result. Default: the reference on abstract tensors.
        batch: a vmap rule ``(info, dims, *args) -> (out, out_dims)`` that is faster than one call for each element of the batch.
        inline: whether a compiler sees what the operator does, and fuses it. False for a reference so long that every call of it is compiled
            for seconds.
        forgets: tensor arguments whose values `backward` does not read. It gets one element in their shape, and their memory is free.
    """
    if name in _OPERATORS:
        raise ValueError(f"operator {name!r} is defined already; give the new one another name")

    def primitive(*args: Any) -> Any:
        return reference(*args) if kernel is None or not on_device(*args) else kernel(*_contiguous(args))

    if bool(differentiable) != (backward is not None):
        raise ValueError(f"operator {name!r}: backward and differentiable belong together; give both, or neither")
    rules = None if backward is None else _Rules(name, reference, backward, backward_kernel, first_order, forgets)
    derivative = {"save": rules.save, "backward": rules.backward, "composite": reference} if rules else _refusal(name)
    run = operator(
        name,
        schema,
        primitive=primitive,
        fake=fake or reference,
        batch=batch or one_by_one(name),
        inline=inline,
        **derivative,
    )
    if rules:
        rules.define_backward(run, differentiable)
    places = tuple(rules.places) if rules else ()
    _OPERATORS[name] = Operator(name, formula, why, reference, example, supports, run, places, tuple(kernels))
    return _OPERATORS[name]


def on_device(*args: Any) -> bool:
    """Whether kernels take these arguments: one is on a GPU, or kernels are interpreted."""
    return any(isinstance(a, Tensor) and (a.is_cuda or INTERPRETED) for a in args)


def _contiguous(args: Sequence[Any]) -> list[Any]:
    """vmap hands over views with stride 0, which a kernel reads as if they were whole."""
    return [a.contiguous() if isinstance(a, Tensor) else a for a in args]


def operators() -> dict[str, Operator]:
    """All operators by name: callable, with `reference` and `example(seed, dtype)`."""
    return dict(_OPERATORS)


def find(name: str) -> Operator:
    """The operator of this name. `ValueError` with a near one otherwise."""
    if name not in _OPERATORS:
        raise ValueError(f"kernels: no operator {name!r}; {tree.suggest(name, _OPERATORS)}")
    return _OPERATORS[name]


# --- derivatives ---


class _Rules:
    """First and second derivatives of an operator.

    The backward pass is an operator of its own, whose derivative is that of its aten form. In forward mode the aten forms take the
    operators' places.
    """

    def __init__(self, name: str, reference: Callable[..., Any], backward: Backward, kernel: Backward | None, first: Sequence[int] | None, forgets: Sequence[str]) -> None:  # fmt: skip
        self.name, self.reference, self.aten, self.kernel, self.first = name, reference, backward, kernel, first
        self.forgets = forgets
        self.op: Any = None
        self.places: list[int] = []
        self.forgotten: set[int] = set()
        self.inputs = self.outputs = 0

    def define_backward(self, run: Any, differentiable: Sequence[str]) -> None:
        """Define ``name_backward(cotangents, inputs, outputs, needs) -> gradients``."""
        arguments, returns = run._schema.arguments, run._schema.returns
        names = [a.name for a in arguments]
        for n in (*differentiable, *self.forgets):
            if n not in names:
                raise ValueError(
                    f"{self.name}: differentiable or forgets names {n!r}, no argument; {tree.suggest(n, names)}"
                )
        self.forgotten = {names.index(n) for n in self.forgets}
        self.places = [names.index(n) for n in differentiable]
        self.inputs, self.outputs = len(arguments), len(returns)
        cotangents = [f"Tensor? cotangent{i}" for i in range(self.outputs)]
        declared = [f"{_declared(a.type)} {a.name}" for a in arguments]
        results = [f"Tensor output{i}" for i in range(self.outputs)]
        gradients = ", ".join(["Tensor"] * len(self.places))
        self.op = operator(
            f"{self.name}_backward",
            f"({', '.join([*cotangents, *declared, *results, 'bool[] needed'])}) -> ({gradients})",
            primitive=self.primitive,
            fake=self.shapes,
            batch=one_by_one(f"{self.name}_backward"),
            inline=True,
            save=_save,
            backward=self.second,
            composite=self.composite,
        )

    def split(self, args: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """Cotangents, inputs, outputs, needs of a call of the backward operator."""
        a, b = self.outputs, self.outputs + self.inputs
        return tuple(args[:a]), tuple(args[a:b]), tuple(args[b:-1]), list(args[-1])

    def primitive(self, *args: Any) -> Any:
        form = self.aten if self.kernel is None or not on_device(*args) else self.kernel
        parts = self.split(args)
        if form is not self.aten:  # what is forgotten would become as large as it was
            kept = [
                x if i in self.forgotten else y
                for i, (x, y) in enumerate(zip(parts[1], _contiguous(parts[1]), strict=True))
            ]
            parts = (tuple(_contiguous(parts[0])), tuple(kept), tuple(_contiguous(parts[2])), parts[3])
        return self.shaped(form(*parts), parts)

    def composite(self, *args: Any) -> Any:
        parts = self.split(args)
        return self.shaped(self.aten(*parts), parts)

    def shaped(self, found: Sequence[Tensor | None], parts: tuple[Any, Any, Any, Any]) -> Any:
        """Gradients as an operator returns them: fresh, and an empty tensor for each that nobody needs."""
        cotangents, inputs, outputs, needs = parts
        taken: list[Any] = [*cotangents, *inputs, *outputs]
        out: list[Tensor] = []
        for i, g, n in zip(self.places, found, needs, strict=True):
            x = inputs[i]
            new = (
                _nothing(outputs[0])
                if not n or x is None
                else torch.zeros_like(x)
                if g is None
                else _fresh(g, x, taken)
            )
            out.append(new)
            taken.append(g)
        return tuple(out) if len(out) > 1 else out[0]

    def shapes(self, *args: Any) -> Any:
        parts = self.split(args)
        like = [parts[1][i] for i in self.places]
        return self.shaped(
            [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in like], parts
        )

    # rules of the operator

    def save(self, ctx: Any, args: tuple[Any, ...], out: Any) -> None:
        outs = out if isinstance(out, tuple) else (out,)
        ctx.mark_non_differentiable(*[o for o in outs if not o.is_floating_point()])
        ctx.set_materialize_grads(False)
        kept = [_shape_of(a) if i in self.forgotten and isinstance(a, Tensor) else a for i, a in enumerate(args)]
        _save(ctx, (*kept, *outs), None)

    def backward(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = _saved(ctx)
        inputs = saved[: self.inputs]
        for i, x in enumerate(inputs):
            if i not in self.places and isinstance(x, Tensor) and ctx.needs_input_grad[i]:
                names = [self.op._schema.arguments[self.outputs + j].name for j in (i, *self.places)]
                raise ValueError(
                    f"{self.name}: {names[0]} takes no gradient (only {', '.join(names[1:])} do); detach it"
                )
        needs = [bool(ctx.needs_input_grad[i]) and inputs[i] is not None for i in self.places]
        if self.first is not None and any(c is not None for i, c in enumerate(cotangents) if i not in self.first):
            found = self.by_reference(cotangents, inputs)
        else:
            found = self.op(*cotangents, *saved, needs)
        found = found if isinstance(found, tuple | list) else (found,)
        grads = {i: g for i, g, n in zip(self.places, found, needs, strict=True) if n}
        return tuple(grads.get(i) for i in range(self.inputs))

    def by_reference(self, cotangents: Sequence[Tensor | None], inputs: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """The transpose of the reference's derivative at `inputs`, by torch."""
        places = [i for i in self.places if inputs[i] is not None]

        def f(*tensors: Tensor) -> tuple[Tensor, ...]:
            full = list(inputs)
            for i, t in zip(places, tensors, strict=True):
                full[i] = t
            out = self.reference(*full)
            return out if isinstance(out, tuple) else (out,)

        grads = dict(zip(places, _pulled(f, [inputs[i] for i in places], cotangents), strict=True))
        return tuple(grads.get(i) for i in self.places)

    # the rule of the backward operator

    def second(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        args = _saved(ctx)
        where = [
            i
            for i, a in enumerate(args[:-1])
            if isinstance(a, Tensor) and a.is_floating_point() and ctx.needs_input_grad[i]
        ]

        def f(*tensors: Tensor) -> tuple[Tensor, ...]:
            full = list(args)
            for i, t in zip(where, tensors, strict=True):
                full[i] = t
            out = self.composite(*full)
            return out if isinstance(out, tuple) else (out,)

        grads = dict(zip(where, _pulled(f, [args[i] for i in where], cotangents), strict=True))
        return tuple(grads.get(i) for i in range(len(args)))


def _pulled(f: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:  # fmt: skip
    with torch.enable_grad():
        pulled = torch.func.vjp(f, *primals)
        out, vjp = pulled[0], pulled[1]
        return vjp(tuple(torch.zeros_like(o) if c is None else c for c, o in zip(cotangents, out, strict=True)))


def _save(ctx: Any, args: tuple[Any, ...], out: Any) -> None:
    ctx.places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    ctx.plain = [None if isinstance(a, Tensor) else a for a in args]
    ctx.save_for_backward(*[args[i] for i in ctx.places])


def _saved(ctx: Any) -> list[Any]:
    full = list(ctx.plain)
    for i, t in zip(ctx.places, ctx.saved_tensors, strict=True):
        full[i] = t
    return full


def _shape_of(x: Tensor) -> Tensor:
    """One element, in the shape of `x`."""
    return x.new_zeros(()).expand(x.shape)


def _refusal(name: str) -> dict[str, Any]:
    """The rule of an operator without a derivative: nothing is saved, and a gradient that comes back is an error, not zero."""

    def save(ctx: Any, args: tuple[Any, ...], out: Any) -> None:
        outs = out if isinstance(out, tuple) else (out,)
        ctx.mark_non_differentiable(*[o for o in outs if not o.is_floating_point()])

    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        raise ValueError(f"{name}: has no derivative; call it on detached tensors, or under torch.no_grad()")

    return {"save": save, "backward": backward}


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _fresh(g: Tensor, like: Tensor, taken: Sequence[Any]) -> Tensor:
    """A gradient in the argument's dtype, contiguous, sharing no memory with what is there already."""
    g = g.to(like.dtype)
    shared = g._is_view() or not g.is_contiguous() or any(g is t for t in taken)
    return g.clone(memory_format=torch.contiguous_format) if shared else g


def _declared(t: Any) -> str:
    """A schema's type as it is written."""
    optional = re.sub(r"Optional\[(.+)\]", r"\1?", str(t))
    return re.sub(r"List\[(\w+)\]", r"\1[]", optional)


# --- vmap ---


def one_by_one(name: str) -> Callable[..., Any]:
    """The vmap rule that always holds: one call for each element of the batch."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        op = getattr(torch.ops.fds, name).default
        outs = [
            op(*[a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, dims, strict=True)])
            for i in range(info.batch_size)
        ]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(parts) for parts in zip(*outs, strict=True)), (0,) * len(outs[0])

    return rule
