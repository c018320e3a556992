"""Every operator, every sample: schema, fake function and in-place twin agree with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from edgellm_plugins import OPS, Op, Sample


def _samples(dtype: torch.dtype) -> list[tuple[Op, Sample]]:
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    return [(op, sample) for op in OPS.values() for sample in op.samples(generator, dtype)]


def _outputs(op: Op, tensors: Sequence[torch.Tensor | None], sample: Sample) -> tuple[torch.Tensor, ...]:
    outputs = op.functional()(*tensors, **sample.attributes)
    return outputs if isinstance(outputs, tuple) else (outputs,)


CASES = _samples(torch.float32)
IDS = [f"{op.name}-{sample.label}" for op, sample in CASES]


@pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)
def test_fake_gives_the_references_shapes_and_dtypes(op: Op, sample: Sample) -> None:
    outputs = _outputs(op, sample.tensors, sample)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in sample.tensors]
        expected = _outputs(op, fakes, sample)
    assert [(o.shape, o.dtype) for o in outputs] == [(e.shape, e.dtype) for e in expected]


IN_PLACE = [(op, sample) for op, sample in CASES if op.updates]


@pytest.mark.parametrize(("op", "sample"), IN_PLACE, ids=[f"{op.name}-{sample.label}" for op, sample in IN_PLACE])
def test_in_place_twin_updates_its_argument(op: Op, sample: Sample) -> None:
    outputs = _outputs(op, sample.tensors, sample)
    twins = [None if t is None else t.clone() for t in sample.tensors]
    kept = getattr(torch.ops.trt, f"{op.name}_")(*twins, **sample.attributes)
    kept = kept if isinstance(kept, tuple) else (kept,)
    names = op.tensor_names()
    for index, output in enumerate(outputs):
        actual = twins[names.index(op.updates[index])] if index in op.updates else kept[0]
        torch.testing.assert_close(actual, output, rtol=0, atol=0)
    torch.library.opcheck(op.functional(), sample.tensors, dict(sample.attributes), test_utils=("test_schema",))
