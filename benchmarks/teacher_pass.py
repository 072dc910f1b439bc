"""The teacher's forward pass: the attention that runs for packed documents, and what compiled layers gain.

    python -m benchmarks.teacher_pass
    python -m benchmarks.teacher_pass --preset 8b --folder FOLDER_WITH_SPACE     # on a GPU

Variants of one resident teacher take turns. Packed documents attend only to themselves; transformers says so with a
mask, for which SDPA may choose another kernel than for whole sequences. `flex_attention` and, if the package is there,
`flash_attention_2` need no mask of all pairs of positions. Compiled layers are compiled one by one, by torch.compile
with its defaults; their first pass is the time that this takes, with a cache that earlier programs may have filled.

The difference is that of the last hidden states to the first variant with the same text, relative to their norm. The
utilisation counts half of each sequence's products in attention, also if documents need fewer.
"""

import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.profiling import Profile
from benchmarks.report import Spread, machine, parse, publish, ratios, take_turns
from benchmarks.step import matrix_rate
from benchmarks.workload import (
    build_workload_parser,
    read_config,
    read_tokens,
    shape_of,
    work_directory,
)
from dskd.distributed.rendezvous import initialize, shutdown
from dskd.errors import first_line
from dskd.models.checks.reference import relative_difference
from dskd.models.files.folder import find_teacher
from dskd.models.running.frozen import FrozenModel, load_frozen
from dskd.models.running.precision import compute_dtype

_DOCUMENTS = 5  # in a packed sequence
_RECOMPILATIONS = 64  # that torch.compile may make before it falls back to eager code, one for each layer at most


@dataclass(frozen=True)
class Variant:
    """A way to run the teacher."""

    name: str
    attention: str
    packs: bool  # several documents a sequence
    compiles: bool = False
    package: str | None = None  # that it needs


VARIANTS = (
    Variant("whole sequences, sdpa", "sdpa", packs=False),
    Variant("documents, sdpa", "sdpa", packs=True),
    Variant("documents, flex_attention", "flex_attention", packs=True),
    Variant("documents, flash_attention_2", "flash_attention_2", packs=True, package="flash_attn"),
    Variant("whole sequences, sdpa, compiled layers", "sdpa", packs=False, compiles=True),
    Variant("documents, sdpa, compiled layers", "sdpa", packs=True, compiles=True),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_workload_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="sequences in a pass; default: the preset's micro-batch")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of the variants to measure, from 1")
    args = parse(parser, arguments)
    at_start = machine()
    chosen = [variant for number, variant in enumerate(VARIANTS, 1) if not args.only or number in args.only]
    with work_directory(args) as path:
        world = initialize()
        config = read_config(path, args.overrides)
        teacher = load_frozen(find_teacher(config), config, world, with_head=False)
        size = args.batch_size or config.train.micro_batch_size
        input_ids = torch.from_numpy(read_tokens(config)[:size]).long()
        measured = measure(teacher, chosen, input_ids, args.rounds)
        rate = matrix_rate(compute_dtype(config.precision, world.device), world.device)
        shape = shape_of(config)
        teacher.close()
        shutdown()
    flops = shape.teacher_layers * shape.layer_flops() * input_ids.numel()
    rows = []
    for name, result in measured.items():
        if "problem" in result:
            rows.append([name, result["problem"], "", "", "", "", ""])
            continue
        seconds = Spread(**result["seconds"])
        result["utilisation"] = flops / seconds.median / rate
        rows.append(
            [
                name,
                f"{input_ids.numel() / seconds.median:,.0f}",
                Spread(**result["speed"]).text(".2f"),
                f"{result['utilisation']:.2f}",
                f"{result['difference']:.0e}",
                f"{result['first_pass_s']:.1f}",
                ", ".join(result["kernels"][:2]),
            ]
        )
    header = ("", "tokens/s", "relative speed", "utilisation", "difference", "first pass, s", "kernels of attention")
    publish(args, "benchmarks.teacher_pass", header, rows, measured, at_start)


def measure(
    teacher: FrozenModel, variants: Sequence[Variant], input_ids: torch.Tensor, rounds: int
) -> dict[str, dict[str, Any]]:
    """Measures variants of a resident teacher on tokens [B, T]; speeds are relative to the first variant's.

    A variant that does not run here has only the `problem`.
    """
    measured: dict[str, dict[str, Any]] = {}
    passes: dict[str, Callable[[], torch.Tensor]] = {}
    expected: dict[bool, torch.Tensor] = {}
    compiled = [torch.compile(layer.forward, dynamic=False) for layer in teacher.decoder.layers]
    torch._dynamo.config.recompile_limit = max(_RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    for variant in variants:
        if variant.package and importlib.util.find_spec(variant.package) is None:
            measured[variant.name] = {"problem": f"{variant.package} is not installed"}
            continue
        positions = draw_positions(*input_ids.shape) if variant.packs else None
        run = functools.partial(_run, teacher, variant, input_ids, positions, compiled)
        try:
            started = time.perf_counter()
            states = run().float().cpu()  # waits for the GPU, too
            first_pass_s = time.perf_counter() - started
        except Exception as error:  # one that does not run here does not keep the others from running
            measured[variant.name] = {"problem": f"{type(error).__name__}: {first_line(error)}"}
            continue
        difference = relative_difference(states, expected.setdefault(variant.packs, states))
        passes[variant.name] = run
        measured[variant.name] = {
            "first_pass_s": first_pass_s,
            "difference": difference,
            "kernels": _kernels_of_attention(run),
        }
    seconds = take_turns(passes, rounds=rounds)
    first = next(iter(passes))
    for name, values in seconds.items():
        measured[name]["seconds"] = Spread.of(values).as_dict()
        measured[name]["speed"] = ratios(seconds, first, name).as_dict()
    return measured


def draw_positions(batch_size: int, length: int) -> torch.Tensor:
    """Draws the positions [B, T] of sequences of several documents, each of which starts at 0."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(batch_size):
        starts = torch.randperm(length - 1, generator=generator)[: _DOCUMENTS - 1].sort().values + 1
        lengths = torch.diff(torch.cat([torch.tensor([0]), starts, torch.tensor([length])]))
        rows.append(torch.cat([torch.arange(int(number)) for number in lengths]))
    return torch.stack(rows)


def _run(
    teacher: FrozenModel,
    variant: Variant,
    input_ids: torch.Tensor,
    positions: torch.Tensor | None,
    compiled: Sequence[Callable[..., Any]],
) -> torch.Tensor:
    """Returns the last hidden states [B, T, D], and leaves the teacher as it was."""
    base, layers = teacher.decoder.base, teacher.decoder.layers
    usual = base.config._attn_implementation  # type: ignore[union-attr]
    base.set_attn_implementation(variant.attention)  # type: ignore[operator]
    if variant.compiles:
        for layer, forward in zip(layers, compiled, strict=True):
            layer.forward = forward
    try:
        return teacher.hidden_states(input_ids, positions)
    finally:
        base.set_attn_implementation(usual)  # type: ignore[operator]
        if variant.compiles:
            for layer in layers:
                del layer.forward  # the method of its class again


def _kernels_of_attention(run: Callable[[], object]) -> list[str]:
    """Returns the names of attention's kernels on a GPU, and of its operations on a CPU, the longest first."""
    profile = Profile()
    profile.start()
    run()
    profile.stop()
    if not profile.is_cuda:
        names = {event.name for event in profile.events() if "attention" in event.name}
        return sorted(names, key=len, reverse=True)
    named = profile.kernels(_is_attention)
    return named or [name for name in profile.kernels(lambda _: True) if "flash" in name or "flex" in name]


def _is_attention(event: Any) -> bool:
    while event is not None:
        if "attention" in event.name.lower() and not event.name.startswith("part"):
            return True
        event = event.cpu_parent
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
