"""Language and vision-language models on robots: the library under `edgellm_ros`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.config import BuildConfig, KvCacheConfig
    from edgellm.errors import EdgeLLMError
    from edgellm.llm import LLM
    from edgellm.runtime.guided import GuidedDecodingParams
    from edgellm.runtime.request import Increment, RequestOutput
    from edgellm.runtime.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BuildConfig",
    "EdgeLLMError",
    "GuidedDecodingParams",
    "Increment",
    "KvCacheConfig",
    "RequestOutput",
    "SamplingParams",
]

_HOMES = {
    "LLM": "edgellm.llm",
    "BuildConfig": "edgellm.config",
    "KvCacheConfig": "edgellm.config",
    "SamplingParams": "edgellm.runtime.sampling",
    "GuidedDecodingParams": "edgellm.runtime.guided",
    "RequestOutput": "edgellm.runtime.request",
    "Increment": "edgellm.runtime.request",
    "EdgeLLMError": "edgellm.errors",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that `import edgellm` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgellm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
