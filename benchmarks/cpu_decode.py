"""Decode and prefill speed on a CPU: this engine against transformers and onnxruntime-genai, in the same run.

    python benchmarks/cpu_decode.py                     # a Qwen3-0.6B shape, fp32, 2 threads: ten minutes
    python benchmarks/cpu_decode.py --shape qwen3-tiny  # a quick look
    python benchmarks/cpu_decode.py --work-dir DIR      # keep the checkpoint and the built models there

The weights are random (speed does not depend on them), written from a fixed seed; every contender gets the same
checkpoint through its own public tools, the same prompts, the same number of threads, and answers greedily. Each runs
in a process of its own; all are loaded before the first round, then take turns, in another order every round, so that
a change of the machine's speed meets all of them. Prefill is the time from the call to the first token; decode is the
mean time per token after it. Shown are medians over rounds, and the median over rounds of the ratio within a round.

A turn waits a while for a moment in which other programs leave the CPU alone, and is repeated if they did not; turns
that stayed disturbed are counted in the output.

onnxruntime-genai is a peer that nothing else needs: `pip install onnxruntime-genai`; without it its row is left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import random_checkpoint
from cpu_contenders import CONTENDERS
from random_checkpoint import FIRST_TOKEN, SHAPES, Shape

OURS = "edgellm"
DEFAULT = ("edgellm", "edgellm-step", "transformers", "onnxruntime-genai")
REQUIRED = (
    ("onnxruntime-genai", "prefill", 1.0),
    ("onnxruntime-genai", "decode", 1.0),
    ("transformers", "decode", 1.3),
)
"""Peer, measure, and the least ratio of ours to it that counts as a pass."""

QUIET = 0.04
"""Up to this share of the CPU may go to other programs in a turn that counts as undisturbed."""

PEERS = ("onnxruntime-genai", "transformers")


@dataclass(frozen=True)
class Round:
    """What one contender did in one round; speeds in tokens per second."""

    prefill: float
    decode: float
    tokens: tuple[int, ...]
    others_cpu: float
    """Share of the machine's CPU time that went to other programs meanwhile."""


@dataclass(frozen=True)
class Row:
    """A line of the result: medians over rounds, tokens per second, and memory in MB."""

    contender: str
    prompt_tokens: int
    prefill: float
    decode: float
    decode_best: float
    read_gb_s: float
    load_s: float
    peak_mb: float
    disturbed: int
    """Turns that other programs disturbed to the end."""


class Process:
    """A contender's process, loaded and waiting."""

    def __init__(self, name: str, directory: Path, threads: int, log: Path) -> None:
        self.name = name
        self._log = log
        program = Path(__file__).with_name("cpu_contenders.py")
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(program), name, str(directory), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "ORT_DISABLE_TELEMETRY": "1"},
            )
        self.load_s = float(self._read()["load_s"])
        self.peak_mb = 0.0

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def round(self, prompt: list[int], count: int) -> Round:
        """Answer one prompt with `count` tokens."""
        assert self._process.stdin is not None
        start, busy = time.perf_counter(), self._others_cpu_s()
        self._process.stdin.write(json.dumps({"prompt": prompt, "count": count}) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        times = reply["times"]
        self.peak_mb = reply["peak_mb"]
        others = (self._others_cpu_s() - busy) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        return Round(len(prompt) / times[0], (count - 1) / (times[-1] - times[0]), tuple(reply["tokens"]), others)

    def quiet_round(self, prompt: list[int], count: int, patience_s: float) -> Round:
        """A round that other programs did not disturb; after `patience_s` the least disturbed one."""
        deadline = time.perf_counter() + patience_s
        done: list[Round] = []
        while not done or (done[-1].others_cpu > QUIET and time.perf_counter() < deadline):
            while time.perf_counter() < deadline and self._others_share(0.5) > QUIET:
                time.sleep(0.5)
            done.append(self.round(prompt, count))
        return min(done, key=lambda r: r.others_cpu)

    def _others_share(self, seconds: float) -> float:
        """Share of the CPU that other programs take during the next `seconds`."""
        before = self._others_cpu_s()
        time.sleep(seconds)
        return (self._others_cpu_s() - before) / seconds / (os.cpu_count() or 1)

    def _others_cpu_s(self) -> float:
        """CPU seconds since boot that were not this process's; 0 where there is no /proc."""
        if not Path("/proc/stat").exists():
            return 0.0
        tick = os.sysconf("SC_CLK_TCK")
        # user, nice, system, idle, iowait, irq, softirq, steal
        fields = [int(x) for x in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        own = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (sum(fields) - fields[3] - fields[4] - int(own[11]) - int(own[12])) / tick

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = (self._log.read_text(encoding="utf-8").strip() or "no message").splitlines()[-1]
            raise SystemExit(f"cpu_decode: error: {self.name} ended with exit code {self._process.wait()}: {last}")
        values: dict[str, Any] = json.loads(line)
        return values


def prepare(work: Path, shape: Shape, names: Sequence[str], longest: int) -> dict[str, Path]:
    """The directory each contender runs on; makes what is not there yet, each contender's with its own tools."""
    checkpoint, engine, genai = work / "checkpoint", work / f"engine-{longest}", work / "genai"
    if not checkpoint.exists():
        print("writing the checkpoint", flush=True)
        with _whole(checkpoint) as partial:
            random_checkpoint.write(partial, shape)
    if OURS in names and not engine.exists():
        onnx = work / "onnx"
        shutil.rmtree(onnx, ignore_errors=True)
        _tool("edgellm.cli", "export", str(checkpoint), str(onnx))
        limits = {"--max-batch-size": 1, "--max-input-len": longest - 1, "--max-kv-cache-capacity": longest}
        _tool("edgellm.cli", "build", str(onnx), str(engine), *(str(x) for item in limits.items() for x in item))
        shutil.rmtree(onnx)
    if "onnxruntime-genai" in names and not genai.exists():
        with _whole(genai) as partial:
            paths = ["-i", str(checkpoint), "-o", str(partial), "-c", str(work / "cache")]
            _tool("onnxruntime_genai.models.builder", *paths, "-p", "fp32", "-e", "cpu", "-m", "qwen3")
    by_tool = {"edgellm": engine, "transformers": checkpoint, "onnxruntime": genai}
    return {name: by_tool[name.split("-")[0]] for name in names}


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name once it is complete."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(directory)


def _tool(module: str, *arguments: str) -> None:
    """Run a module's command line; its output is shown only if it fails."""
    print(f"running {module}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\ncpu_decode: error: {module} failed with exit code {done.returncode}")


def measure(
    processes: Sequence[Process], lengths: Sequence[int], count: int, rounds: int, patience_s: float, vocab_size: int
) -> dict[int, dict[str, list[Round]]]:
    """Rounds by prompt length and contender. Every contender does one round that does not count first."""
    random = np.random.default_rng(1)
    results: dict[int, dict[str, list[Round]]] = {}
    for length in lengths:
        done: dict[str, list[Round]] = {p.name: [] for p in processes}
        for i in range(-1, rounds):
            prompt = random.integers(FIRST_TOKEN, vocab_size, length).tolist()
            turn = i % len(processes)
            for process in (*processes[turn:], *processes[:turn]):
                if i < 0:
                    process.round(prompt, count)
                else:
                    done[process.name].append(process.quiet_round(prompt, count, patience_s))
            print(f"\rprompt of {length}: round {i + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        results[length] = done
    return results


def rows(results: dict[int, dict[str, list[Round]]], processes: Sequence[Process], weight_bytes: int) -> list[Row]:
    """The table: one row per prompt length and contender."""
    table = []
    for length, done in results.items():
        for process in processes:
            own = done[process.name]
            decode = statistics.median(r.decode for r in own)
            table.append(
                Row(
                    contender=process.name,
                    prompt_tokens=length,
                    prefill=statistics.median(r.prefill for r in own),
                    decode=decode,
                    decode_best=max(r.decode for r in own),
                    read_gb_s=decode * weight_bytes / 1e9,
                    load_s=process.load_s,
                    peak_mb=process.peak_mb,
                    disturbed=sum(r.others_cpu > QUIET for r in own),
                )
            )
    return table


def ratios(done: dict[str, list[Round]], peer: str, what: str) -> list[float]:
    """Ours over the peer's, round by round; the quicker one of a peer's variants in each round.

    Rounds that other programs disturbed count only if fewer than three others are left.
    """
    variants = [rounds for name, rounds in done.items() if name == peer or name.startswith(peer + "-")]
    pairs = list(zip(done[OURS], zip(*variants, strict=True), strict=True))
    quiet = [(ours, others) for ours, others in pairs if all(r.others_cpu <= QUIET for r in (ours, *others))]
    used = quiet if len(quiet) >= 3 else pairs
    return [getattr(ours, what) / max(getattr(r, what) for r in others) for ours, others in used]


def verdicts(results: dict[int, dict[str, list[Round]]]) -> list[dict[str, Any]]:
    """Each requirement at each prompt length: the median ratio, its range, and whether it passes."""
    found = []
    for length, done in results.items():
        for peer, what, least in REQUIRED:
            if OURS in done and peer in done:
                values = ratios(done, peer, what)
                ratio = statistics.median(values)
                found.append(
                    {
                        "prompt_tokens": length,
                        "measure": what,
                        "peer": peer,
                        "ratio": ratio,
                        "lowest": min(values),
                        "highest": max(values),
                        "rounds": len(values),
                        "required": least,
                        "passed": ratio >= least,
                    }
                )
    return found


def agreement(results: dict[int, dict[str, list[Round]]]) -> dict[str, float]:
    """Share of rounds in which a contender's first token is ours: they all compute the same model."""
    pairs: dict[str, list[bool]] = {}
    for done in results.values():
        for name, rounds in done.items():
            if OURS in done and name != OURS:
                same = [a.tokens[0] == b.tokens[0] for a, b in zip(done[OURS], rounds, strict=True)]
                pairs.setdefault(name, []).extend(same)
    return {name: sum(same) / len(same) for name, same in pairs.items()}


def machine(threads: int) -> dict[str, Any]:
    """Where and with what this was measured."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p.replace("-", "_"))}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0], "versions": versions}


def report(table: Sequence[Row], checks: Sequence[dict[str, Any]], same: dict[str, float]) -> None:
    """Print the tables."""
    heads = f"{'prefill':>9} {'decode':>8} {'best':>8} {'weights':>9} {'load':>7} {'peak':>8} {'disturbed':>10}"
    units = f"{'tok/s':>9} {'tok/s':>8} {'tok/s':>8} {'GB/s':>9} {'s':>7} {'MB':>8} {'turns':>10}"
    print(f"\n{'prompt':>6}  {'contender':22} {heads}\n{'tokens':>6}  {'':22} {units}")
    for r in table:
        speeds = f"{r.prefill:9.1f} {r.decode:8.2f} {r.decode_best:8.2f} {r.read_gb_s:9.1f}"
        print(f"{r.prompt_tokens:6}  {r.contender:22} {speeds} {r.load_s:7.1f} {r.peak_mb:8.0f} {r.disturbed:10}")
    print("\nfirst token as ours: " + ", ".join(f"{name} {share:.0%}" for name, share in same.items()))
    for c in checks:
        word = "pass" if c["passed"] else "FAIL"
        spread = f"({c['rounds']} rounds, {c['lowest']:.2f} to {c['highest']:.2f})"
        what = f"prompt {c['prompt_tokens']:4}: {c['measure']:7} {c['ratio']:5.2f} x {c['peer']:18} {spread}"
        print(f"{word}  {what}, required {c['required']:.1f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if a required ratio is missed."""
    parser = argparse.ArgumentParser(description="CPU decode and prefill speed, side by side.", allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="default: %(default)s")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT, metavar="NAME")
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[128, 512], metavar="N")
    parser.add_argument("--decode-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--patience", type=float, default=20.0, metavar="S", help="per turn, for a quiet machine")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="keep and reuse what is built (default: temporary)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    names = [n for n in options.contenders if _installed(n)]
    with ExitStack() as stack:
        work = options.work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpu_decode_")))
        work = work / options.shape
        work.mkdir(parents=True, exist_ok=True)
        _check_space(work, 4 * shape.num_parameters)
        longest = max(options.prompt_tokens) + options.decode_tokens
        directories = prepare(work, shape, names, longest)
        processes = []
        for name in names:
            print(f"loading {name}", flush=True)
            log = work / f"{name}.log"
            processes.append(stack.enter_context(Process(name, directories[name], options.threads, log)))
        before = machine(options.threads)
        results = measure(
            processes, options.prompt_tokens, options.decode_tokens, options.rounds, options.patience, shape.vocab_size
        )
    table, checks, same = rows(results, processes, 4 * shape.num_parameters), verdicts(results), agreement(results)
    print(f"\n{options.shape}, fp32: {before}")
    report(table, checks, same)
    if options.json is not None:
        values = {"shape": options.shape, "machine": before, "rows": [asdict(r) for r in table], "checks": checks}
        values["rounds"] = [
            {
                "contender": name,
                "prompt_tokens": length,
                "prefill": r.prefill,
                "decode": r.decode,
                "others": r.others_cpu,
            }
            for length, done in results.items()
            for name, rounds in done.items()
            for r in rounds
        ]
        options.json.write_text(json.dumps(values | {"first_token_as_ours": same}, indent=2) + "\n", encoding="utf-8")
    return 0 if all(c["passed"] for c in checks) else 1


def _installed(name: str) -> bool:
    """Whether the contender can run here; says so once if not."""
    package = name.removesuffix("-generate")
    module = package.replace("-", "_")
    if package in PEERS and importlib.util.find_spec(module) is None:
        print(f"{name} is left out: it is not installed (pip install {package})")
        return False
    return True


def _check_space(work: Path, weight_bytes: int) -> None:
    """The checkpoint, the exported and the built model and the peer's take six times the weights at most."""
    need, free = 6 * weight_bytes, shutil.disk_usage(work).free
    if free < need and not (work / "checkpoint").exists():
        raise SystemExit(
            f"cpu_decode: error: {work} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB are needed; "
            "name another place with --work-dir"
        )


if __name__ == "__main__":
    sys.exit(main())
