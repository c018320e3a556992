"""The parameters of `vlm_node`: names, defaults, ranges, descriptions, in one table.

Read-only ones are read when the node starts; the others may change at any time and count from the next request on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter

from edgellm.errors import ConfigError


@dataclass(frozen=True)
class Declared:
    """One parameter; `valid` is a (lowest, highest) pair for numbers, the allowed values for strings."""

    default: Any
    description: str
    valid: tuple[Any, ...] = ()
    read_only: bool = False


PARAMETERS: dict[str, Declared] = {
    "engine_dir": Declared("", "Engine directory, made by `edgellm build`; loaded by configure.", read_only=True),
    "autostart": Declared(False, "Configure and activate without being asked by a lifecycle manager.", read_only=True),
    "num_threads": Declared(0, "CPU threads of the engine; 0: the library's choice.", (0, 1024), read_only=True),
    "prompt_cache_mb": Declared(
        64, "MiB for the keys and values of earlier prompts and turns; 0: keep none.", (0, 1_000_000), read_only=True
    ),
    "max_queue": Declared(
        16, "Requests that may wait while others run; one more is rejected.", (0, 10000), read_only=True
    ),
    "drain_timeout": Declared(
        10.0, "Seconds that deactivate waits for accepted requests before it cancels them.", (0.0, 3600.0)
    ),
    "system_prompt": Declared("", "System message for conversations that bring none; empty: no system message."),
    "prompt_image": Declared(
        "latest", "What a text on the `prompt` topic is asked about: latest (camera frame) or none.", ("latest", "none")
    ),
    "image.max_age": Declared(
        2.0, "Seconds; a newest camera frame older than this is an error, not an answer. 0: no limit.", (0.0, 86400.0)
    ),
    "sampling.max_tokens": Declared(256, "Tokens to generate at most, where a request does not say.", (1, 1000000)),
    "sampling.temperature": Declared(0.0, "0: greedy. Where a request does not say.", (0.0, 10.0)),
    "sampling.top_k": Declared(0, "0: off. Where a request does not say.", (0, 1000000)),
    "sampling.top_p": Declared(1.0, "Above 0; 1: off. Where a request does not say.", (0.0, 1.0)),
    "sampling.min_p": Declared(0.0, "0: off. Where a request does not say.", (0.0, 1.0)),
}


def declare(node: Node) -> None:
    """Declare every parameter of the table on `node`. Raises ConfigError for a start value that is not allowed."""
    for name, declared in PARAMETERS.items():
        try:
            value = node.declare_parameter(name, declared.default, _descriptor(declared)).value
        except (InvalidParameterValueException, InvalidParameterTypeException) as error:
            raise ConfigError(f"parameter {name}: {' '.join(str(error).split())}") from error
        problem = _problem(name, value)
        if problem:
            raise ConfigError(problem)
    node.add_on_set_parameters_callback(_check_change)


def _descriptor(declared: Declared) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(description=declared.description, read_only=declared.read_only)
    if isinstance(declared.default, float):
        low, high = declared.valid
        descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
    elif isinstance(declared.default, int) and not isinstance(declared.default, bool):
        low, high = declared.valid
        descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
    elif declared.valid:
        descriptor.additional_constraints = f"one of: {', '.join(declared.valid)}"
    return descriptor


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with a value; types and ranges of numbers are rclpy's business."""
    declared = PARAMETERS.get(name)
    if declared and isinstance(declared.default, str) and declared.valid and value not in declared.valid:
        return f"parameter {name} is {value!r}; expected one of: {', '.join(declared.valid)}"
    if name == "sampling.top_p" and value == 0.0:
        return "parameter sampling.top_p is 0.0; expected more than 0 and at most 1"
    return None


def _check_change(parameters: list[Parameter]) -> SetParametersResult:
    problems = [problem for p in parameters if (problem := _problem(p.name, p.value))]
    return SetParametersResult(successful=not problems, reason="; ".join(problems))
