"""The share of a training step that each part of the models takes: attention, norms, rotation, SwiGLU, the head.

    python -m benchmarks.parts
    python -m benchmarks.parts --preset 8b --folder FOLDER_WITH_SPACE     # on a GPU

A profile of some steps is divided by the module whose forward runs, and by the kind of operation in it. What is left of
attention without its projections and its kernel is the rotation of queries and keys, with copies; what is left of an
MLP without its products is the activation times the gate. On a GPU shares are those of its kernels in the elapsed time,
so that the last row is the GPU's idle time; on a CPU they are the operations' own times. The head computes its
gradients in its forward pass.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from benchmarks.profiling import Profile
from benchmarks.report import machine, parse, publish
from benchmarks.workload import OurTraining, build_workload_parser, read_config, work_directory
from dskd.distributed.rendezvous import initialize, shutdown
from dskd.losses.head import DistillationHead

_MARK = "part: "  # begins the names of our ranges
_BACKWARD, _UPDATE, _REST, _WAITING = "backward", "update", "other operations", "no operation (waiting, Python)"
_PRODUCTS = ("aten::linear", "aten::mm", "aten::addmm", "aten::matmul", "aten::bmm")
_KERNELS = ("aten::scaled_dot_product", "aten::_scaled_dot_product", "aten::_flash", "aten::_efficient", "flex")
# {kind of module: {kind of operation: the part it is}}
_PARTS = {
    "attention": {"products": "projections of attention", "kernel": "attention itself", "": "rotation, copies"},
    "mlp": {"products": "products of the MLP", "": "SwiGLU"},
    "norm": {"": "norms"},
    "head": {"products": "products of the head", "": "losses"},
    "model": {"": "residuals, masks, embeddings"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_workload_parser(__doc__)
    parser.add_argument("--steps", type=int, default=2, help="profiled steps")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    args = parse(parser, arguments)
    at_start = machine()
    with work_directory(args) as path:
        config = read_config(path, args.overrides)
        training = OurTraining(config, initialize())
        shares = measure_parts(training, steps=args.steps, warm_up=args.warm_up)
        training.close()
        shutdown()
    rows = [[part, f"{share:.1%}"] for part, share in shares.items()]
    publish(args, "benchmarks.parts", ("", "share of a step"), rows, {"shares": shares}, at_start)


def measure_parts(training: OurTraining, *, steps: int, warm_up: int) -> dict[str, float]:
    """Returns the share of the time of `steps` steps that each part takes, largest first; their sum is 1."""
    for _ in range(warm_up):
        training.step()
    profile = Profile()
    with ExitStack() as ranges:
        if training.teacher is not None:
            ranges.enter_context(marked_modules(training.teacher.decoder, "teacher"))
        ranges.enter_context(marked_modules(training.engine.module, "student"))
        ranges.enter_context(_marked_calls(training.engine, {"backward": _BACKWARD, "step": _UPDATE}))
        profile.start()
        for _ in range(steps):
            training.step()
        profile.stop()
    return shares_of(profile)


@contextmanager
def marked_modules(root: nn.Module, model: str) -> Iterator[None]:
    """Names the forward of each module of a model that is a part, in profiles that are taken meanwhile."""
    open_ranges: list[record_function] = []
    hooks = []
    for name, module in root.named_modules():
        kind = _kind_of(module, name)
        if kind is None:
            continue

        def enter(*_: Any, label: str = f"{_MARK}{model}: {kind}") -> None:
            open_ranges.append(record_function(label))
            open_ranges[-1].__enter__()

        def leave(*_: Any) -> None:
            open_ranges.pop().__exit__(None, None, None)

        hooks += [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _kind_of(module: nn.Module, name: str) -> str | None:
    last = name.rpartition(".")[2]
    if isinstance(module, DistillationHead):
        return "head"
    if last in ("self_attn", "mlp"):
        return "attention" if last == "self_attn" else "mlp"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "model" if last == "base" else None


@contextmanager
def _marked_calls(engine: Any, labels: dict[str, str]) -> Iterator[None]:
    """Names calls of an engine's methods in profiles that are taken meanwhile."""

    def marked(method: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with record_function(f"{_MARK}{label}"):
                return method(*args, **options)

        return call

    for name, label in labels.items():
        setattr(engine, name, marked(getattr(engine, name), label))
    try:
        yield
    finally:
        for name in labels:
            delattr(engine, name)


def shares_of(profile: Profile) -> dict[str, float]:
    """Returns the share of a profile's time that each part takes, largest first, and the share without any operation.

    On a GPU the backward pass runs in a thread of its own, where no range of ours is open.
    """
    shares: Counter[str] = Counter()
    events = profile.events()
    own_threads = {event.thread for event in events if event.name.startswith(_MARK)}
    for event in events:
        if own := profile.own_share(event):
            part = part_of(event)
            if part == _REST and event.thread not in own_threads:
                part = _BACKWARD
            shares[part] += own
    shares[_WAITING] = max(0.0, 1 - sum(shares.values()))
    return dict(shares.most_common())


def part_of(event: Any) -> str:
    """Returns the part of an event of torch's profiler: that of the innermost range around it."""
    kind = ""
    while event is not None:
        name: str = event.name
        if name.startswith(_MARK):
            model, _, module = name.removeprefix(_MARK).partition(": ")
            if not module:
                return model
            parts = _PARTS[module]
            return f"{model}: {parts.get(kind, parts[''])}"
        if not kind and name in _PRODUCTS:
            kind = "products"
        if name.startswith(_KERNELS):
            kind = "kernel"  # also if the kernel is made of products
        event = event.cpu_parent
    return _REST


if __name__ == "__main__":
    main(sys.argv[1:])
