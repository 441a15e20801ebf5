"""Every configuration of every kernel, compiled ahead of time for three chips; no GPU is needed."""

import pytest

import fds.kernels
from fds.kernels.aot import SHARED, compiled

EVERY = [c for op in fds.kernels.operators().values() for c in op.kernels]
CONFIGURED = {c.label: c for c in EVERY}


def test_there_are_kernels():
    assert len(CONFIGURED) == len(EVERY), "two configurations of one label: one of them would not be compiled"
    assert len(CONFIGURED) >= len([o for o in fds.kernels.operators().values() if o.kernels]) > 0


@pytest.mark.parametrize("chip", SHARED)
@pytest.mark.parametrize("label", CONFIGURED)
def test_a_configuration(label, chip):
    assert compiled(CONFIGURED[label], chip).faults(CONFIGURED[label], chip) == []


def test_the_gate_sees_a_spill_and_a_missing_rounding():
    """A gate that cannot fail is none: too few warps for the block, and a rounding that is not there."""
    import attrs

    known = next(c for c in CONFIGURED.values() if c.kernel.__name__ == "rows_kernel")
    crowded = attrs.evolve(
        known, constants={**known.constants, "BLOCK": 8192}, warps=1, contains=("cvt.rn.no_such_thing",)
    )
    faults = compiled(crowded, 90).faults(crowded, 90)
    assert any("spilled" in f for f in faults) and any("no_such_thing" in f for f in faults)
