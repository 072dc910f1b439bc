"""Time and memory of the output head, CE with KL at temperature 2, against its matrix products alone.

    python -m benchmarks.head                                        # the presets small and smollm2, float32 and bf16
    python -m benchmarks.head --presets 8b --positions 8192          # on a GPU
    python -m benchmarks.head --train-head --dtypes float32

The products are those that no head of this kind can do without: the student's logits, the teacher's logits, the
gradient of the states and, with --train-head, that of the matrix. They run over all positions at once, into memory that
exists already. All variants take turns in one process. Peak memory is measured in a separate process for each variant,
and includes the gradients, but not the states and the output matrix. What torch.compile needs to start is the time of
the first call in a new process, with an empty cache and with one that such a process has filled.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from benchmarks.report import (
    EXACT_MEMORY,
    PeakMemory,
    Spread,
    build_parser,
    default_device,
    machine,
    parse,
    print_result,
    publish,
    ratios,
    run_child,
    take_turns,
)
from benchmarks.workload import PRESETS, build_loss
from dskd.config import LossConfig

_HEADS = {"eager": False, "compiled": True}  # {variant: whether its losses are compiled}


def main(arguments: Sequence[str] | None = None) -> None:
    is_cuda = default_device().type == "cuda"
    parser = build_parser(__doc__)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["8b"] if is_cuda else ["small", "smollm2"])
    parser.add_argument("--positions", type=int, default=8192 if is_cuda else 1024)
    parser.add_argument("--chunk-size", type=int, help="train.loss_chunk_size; default: that of training")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--train-head", action="store_true", help="also compute the gradient of the output matrix")
    parser.add_argument("--only", nargs="+", choices=_HEADS, default=list(_HEADS), help="the heads to measure")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--child", nargs=4, metavar=("WHAT", "HEAD", "PRESET", "DTYPE"), help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    if args.child is not None:
        what, head, preset, dtype = args.child
        measure = {"memory": _measure_memory, "start": _measure_start}[what]
        print_result(measure(head, preset, dtype, args))
        return
    at_start = machine()
    rows, results = [], []
    for preset in args.presets:
        for dtype in args.dtypes:
            results.append(_measure(preset, dtype, args))
            rows += _rows(results[-1])
    rows.append(["goal", "", "", "", "<= 1.5", "", "", ""])
    header = (
        "preset",
        "type",
        "variant",
        "ms",
        "ratio to the products",
        "peak, MB",
        "first call, s",
        "with a cache, s",
    )
    publish(args, "benchmarks.head", header, rows, {"positions": args.positions, "cases": results}, at_start)


def _measure(preset: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    variants = {"products": _build_products(preset, dtype, args)}
    variants |= {head: _build_head(head, preset, dtype, args) for head in args.only}
    seconds = take_turns(variants, rounds=args.rounds, warm_up=2)
    variants.clear()
    heads = {
        head: {
            "ratio": ratios(seconds, head, "products").as_dict(),
            "peak_bytes": _run_child("memory", head, preset, dtype, args, EXACT_MEMORY),
        }
        for head in args.only
    }
    if "compiled" in heads:
        with TemporaryDirectory(prefix="dskd-benchmark-") as cache:
            environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
            heads["compiled"] |= {
                name: _run_child("start", "compiled", preset, dtype, args, environment)
                for name in ("first_call_s", "first_call_with_cache_s")
            }
    return {
        "preset": preset,
        "dtype": dtype,
        "seconds": {name: Spread.of(values).as_dict() for name, values in seconds.items()},
        "heads": heads,
    }


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for variant, seconds in result["seconds"].items():
        head = result["heads"].get(variant)
        row = [result["preset"], result["dtype"], variant, Spread(**seconds).text(".1f", 1000)]
        if head is not None:
            starts = [f"{head[name]:.1f}" for name in ("first_call_s", "first_call_with_cache_s") if name in head]
            row += [Spread(**head["ratio"]).text(".2f"), f"{head['peak_bytes'] / 2**20:.0f}", *starts]
        rows.append(row + [""] * (8 - len(row)))
    return rows


def _run_child(
    what: str, head: str, preset: str, dtype: str, args: argparse.Namespace, environment: dict[str, str]
) -> Any:
    options = [f"--positions={args.positions}", *["--train-head"] * args.train_head]
    options += [f"--chunk-size={args.chunk_size}"] if args.chunk_size else []
    return run_child("benchmarks.head", *options, "--child", what, head, preset, dtype, environment=environment)


def _measure_memory(head: str, preset: str, dtype: str, args: argparse.Namespace) -> int:
    run = _build_head(head, preset, dtype, args)
    run()  # so that memory allocated on first use is not counted
    with PeakMemory(default_device()) as memory:
        run()
    return memory.peak_bytes


def _measure_start(head: str, preset: str, dtype: str, args: argparse.Namespace) -> float:
    _build_head("eager", preset, dtype, args)()
    run = _build_head(head, preset, dtype, args)
    started = time.perf_counter()
    run()
    if default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _build_head(head: str, preset: str, dtype: str, args: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that computes the head's loss and gradients."""
    states, teacher_states, matrix, labels = _inputs(preset, dtype, args)
    weight = nn.Parameter(matrix, requires_grad=args.train_head)
    # Without training, teacher and student have the same matrix.
    teacher_matrix = matrix.clone() if args.train_head else None
    options = {"chunk_size": args.chunk_size} if args.chunk_size else {}
    options |= {"compile_losses": _HEADS[head]}
    loss = build_loss(weight, teacher_matrix, LossConfig(sense_weight=0), default_device(), **options)  # type: ignore[call-arg]
    states.requires_grad_()

    def run() -> None:
        states.grad = weight.grad = None
        total, _ = loss(states, teacher_states, labels)
        total.backward()

    return run


def _build_products(preset: str, dtype: str, args: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that computes the products over all positions, into memory that exists."""
    states, teacher_states, matrix, _ = _inputs(preset, dtype, args)
    logits = torch.zeros(len(states), len(matrix), dtype=states.dtype, device=states.device)
    teacher_logits, gradient = torch.zeros_like(logits), torch.zeros_like(states)
    matrix_gradient = torch.zeros_like(matrix) if args.train_head else None

    def run() -> None:
        torch.mm(states, matrix.T, out=logits)
        torch.mm(teacher_states, matrix.T, out=teacher_logits)
        torch.mm(logits, matrix, out=gradient)
        if matrix_gradient is not None:
            torch.mm(logits.T, states, out=matrix_gradient)

    return run


def _inputs(preset: str, dtype: str, args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """Draws states [N, D] of student and teacher, a matrix [V, D] and labels [N]."""
    device, shape = default_device(), PRESETS[preset].shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(getattr(torch, dtype))

    states, teacher_states = draw(args.positions, shape.hidden_size), draw(args.positions, shape.hidden_size)
    matrix = draw(shape.vocab_size, shape.hidden_size) * shape.hidden_size**-0.5
    labels = torch.randint(0, shape.vocab_size, (args.positions,), generator=generator, device=device)
    return states, teacher_states, matrix, labels


if __name__ == "__main__":
    main(sys.argv[1:])
