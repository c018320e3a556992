"""The command `edgellm`: one thin function per verb. An error of ours is one line on stderr and exit code 1."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgellm.config import BuildConfig, OnnxConfig
from edgellm.errors import EdgeLLMError, RequestError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.verb(options))
    except EdgeLLMError as e:
        print(f"edgellm: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def export(options: argparse.Namespace) -> int:
    """Checkpoint → ONNX directory."""
    from edgellm.export.exporter import export as run_export

    start = time.perf_counter()
    run_export(options.model, options.onnx_dir, max_lora_rank=options.max_lora_rank)
    print(f"exported {options.model} to {options.onnx_dir} in {time.perf_counter() - start:.1f} s")
    return 0


def build(options: argparse.Namespace) -> int:
    """ONNX directory, or checkpoint, → engine directory."""
    from edgellm.build.builder import build as run_build

    start = time.perf_counter()
    limits = BuildConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(BuildConfig)})
    run_build(options.source, options.engine_dir, options.backend, limits, dict(options.option))
    print(f"built {options.engine_dir} for {options.backend} in {time.perf_counter() - start:.1f} s")
    return 0


def run(options: argparse.Namespace) -> int:
    """Answer a prompt in the terminal, or a batch file into another file."""
    from edgellm.runtime import batch_file
    from edgellm.runtime.llm import LLM

    if (options.input_file is None) != (options.output_file is None):
        raise RequestError("--input-file and --output-file go together")
    if options.input_file is not None:
        batch = batch_file.read(options.input_file)
        with LLM(options.engine_dir, num_threads=options.num_threads) as llm:
            outcomes = batch_file.answer(llm, batch, options.output_file)
        failed = [o for o in outcomes if isinstance(o, EdgeLLMError)]
        print(f"answered {len(outcomes) - len(failed)} of {len(outcomes)} requests into {options.output_file}")
        return 1 if failed else 0
    with LLM(options.engine_dir, num_threads=options.num_threads) as llm:
        return _stream(llm, options)


def _stream(llm: Any, options: argparse.Namespace) -> int:
    from edgellm.runtime.sampling import SamplingParams

    images = [{"type": "image", "image": str(path)} for path in options.image]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": options.prompt}]}]
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingParams) if hasattr(options, f.name)}
    handle = llm.generate_async(messages, SamplingParams(**given))
    try:
        for increment in handle:
            print(increment.text, end="", flush=True)
    except KeyboardInterrupt:
        handle.cancel()
    output = handle.result()
    usage, timing = output.usage, output.timing
    print(
        f"\n[{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} completion tokens, "
        f"first token after {1000 * timing.ttft_s:.0f} ms, {timing.tokens_per_s:.1f} tokens/s]"
    )
    return 0


def _option(text: str) -> tuple[str, Any]:
    """KEY=VALUE; a number where the value is one."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgellm", description="Language and vision-language models on robots.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("export", help="Hugging Face checkpoint → ONNX directory")
    verb.add_argument("model", metavar="MODEL", type=Path, help="checkpoint directory")
    verb.add_argument("onnx_dir", metavar="ONNX_DIR", type=Path, help="directory to write")
    rank = "take LoRA adapters of up to this rank, a batch's different ones together (default: %(default)s, none)"
    verb.add_argument("--max-lora-rank", type=int, default=OnnxConfig.max_lora_rank, metavar="R", help=rank)
    verb.set_defaults(verb=export)

    verb = verbs.add_parser("build", help="ONNX directory → engine directory")
    source = "output of `edgellm export`; for backend torch the checkpoint itself"
    verb.add_argument("source", metavar="ONNX_DIR", type=Path, help=source)
    verb.add_argument("engine_dir", metavar="ENGINE_DIR", type=Path, help="directory to write")
    verb.add_argument("--backend", default="onnxruntime", help="what runs the engine (default: %(default)s)")
    verb.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the backend: torch has device and dtype, null has times in seconds",
    )
    for field in dataclasses.fields(BuildConfig):
        flag = "--" + field.name.replace("_", "-")
        unit = {"max_batch_size": "requests", "max_lora_rank": "rank"}.get(field.name, "tokens")
        default = "as exported" if field.default is None else "%(default)s"
        verb.add_argument(flag, type=int, default=field.default, metavar="N", help=f"{unit} (default: {default})")
    verb.set_defaults(verb=build)

    verb = verbs.add_parser("run", help="answer a prompt, or a batch file")
    verb.add_argument("engine_dir", metavar="ENGINE_DIR", type=Path, help="output of `edgellm build`")
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="what to ask")
    what.add_argument("--input-file", type=Path, metavar="FILE", help="batch file, JSON")
    verb.add_argument("--output-file", type=Path, metavar="FILE", help="where a batch file's answers go, JSON")
    verb.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="image to ask about")
    sampling = verb.add_argument_group("sampling", "what is not given is as in edgellm.SamplingParams")
    sampling.add_argument("--max-tokens", type=int, default=argparse.SUPPRESS, metavar="N", help="longest answer")
    sampling.add_argument("--temperature", type=float, default=argparse.SUPPRESS, help="0 is greedy, the default")
    sampling.add_argument("--top-p", type=float, default=argparse.SUPPRESS, help="nucleus sampling")
    sampling.add_argument("--top-k", type=int, default=argparse.SUPPRESS, metavar="N", help="0 is off")
    sampling.add_argument("--seed", type=int, default=argparse.SUPPRESS, metavar="N", help="repeats a sampled answer")
    verb.add_argument("--num-threads", type=int, metavar="N", help="CPU threads (default: all)")
    verb.set_defaults(verb=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
