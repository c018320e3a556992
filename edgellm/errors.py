"""The errors that users meet: each message is one line that says what, where, and what to do."""


class EdgeLLMError(Exception):
    """Base of every error raised at a user boundary."""


class ConfigError(EdgeLLMError):
    """A configuration value is unknown, missing or out of range."""


class CheckpointError(EdgeLLMError):
    """A checkpoint is missing, incomplete or of an unknown kind."""


class ExportError(EdgeLLMError):
    """A checkpoint cannot be exported."""


class BuildError(EdgeLLMError):
    """An ONNX directory cannot be built into an engine."""


class EngineDirError(EdgeLLMError):
    """An engine directory is missing, changed or of another version."""


class EngineError(EdgeLLMError):
    """An engine failed while running."""


class LoraError(EdgeLLMError):
    """A LoRA adapter cannot be used: files, features, shapes or rank."""


class RequestError(EdgeLLMError):
    """A request cannot be accepted: bad prompt, image or sampling parameters."""


class QueueFullError(RequestError):
    """The request queue is full; try again later."""
