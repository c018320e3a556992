"""The custom operators of edgellm, one folder (room) per operator; installed as `edgellm_plugins`.

Importing this package registers every built-in operator with `torch.library` under the namespace `trt`. It imports
neither `edgellm` nor `edgellm_ros`.
"""

from edgellm_plugins.attention import library as _attention_on_cuda  # noqa: F401  (registers the CUDA kernel)
from edgellm_plugins.attention.op import ATTENTION
from edgellm_plugins.gather_nd.op import GATHER_ND
from edgellm_plugins.op import Op, Sample, Tolerance

OPS: dict[str, Op] = {op.name: op for op in (ATTENTION, GATHER_ND)}
"""Every built-in operator by its torch name."""

__all__ = ["OPS", "Op", "Sample", "Tolerance"]
