"""Kernels compiled ahead of time, on a machine without a GPU: what every configuration costs on a chip, read from the compiled code."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import attrs

from fds.kernels.registry import Configured
from fds.kernels.triton_or_not import triton

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory that one block may have


_WIDE = r"ld\.global[\w.:]*\.(?:v[48]\.[bf]32|v2\.[bf]64)|cp\.async[\w.]*\.global[^;]*, (?:0x10|16)\b"


@attrs.frozen
class Compiled:
    """One configuration on one chip."""

    registers: int
    spilled: int  # bytes of stack: registers that did not fit
    shared: int  # bytes
    wide_loads: int  # 128-bit loads from global memory
    products: int  # instructions of the matrix units
    ptx: str = attrs.field(repr=False)

    def faults(self, configured: Configured, chip: int) -> list[str]:
        """What is wrong with it; nothing, for a kernel that may be launched."""
        missing = [t for t in configured.contains if t not in self.ptx]
        return [
            *([f"{self.spilled} bytes spilled"] if self.spilled else []),
            *([f"{self.shared} bytes of shared memory, {SHARED[chip]} allowed"] if self.shared > SHARED[chip] else []),
            *(["no 128-bit load"] if configured.wide_loads and not self.wide_loads else []),
            *[f"no {t} in the PTX" for t in missing],
        ]


def compiled(configured: Configured, chip: int = 90) -> Compiled:
    """Compile for compute capability `chip` (80: A100, 90: H100 and H200, 100: B200), as for operands aligned to 16 bytes.

    Raises `ValueError` without Triton.
    """
    if triton is None:
        raise ValueError("ahead-of-time compile: triton is not installed (it is on Linux: pip install triton)")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = configured.kernel, configured.constants
    names: list[str] = kernel.arg_names
    aligned = [
        i
        for i, n in enumerate(names)
        if n not in constants and (configured.types[n].startswith("*") or n in configured.aligned)
    ]
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else configured.types[n] for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options: dict[str, Any] = {"num_warps": configured.warps, "num_stages": configured.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    ptx: str = binary.asm["ptx"]
    use = _resources(binary.asm["cubin"])
    return Compiled(
        registers=use["REG"],
        spilled=use["STACK"],
        shared=binary.metadata.shared,
        wide_loads=len(re.findall(_WIDE, ptx)),
        products=len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
        ptx=ptx,
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a compiled kernel, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    return {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", said)}
