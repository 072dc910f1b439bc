"""Peak memory and time of CE with KL, forward and backward, against the same loss on whole logits.

    python -m benchmarks.loss_memory                                              # V = 128 256, D = 256 on a CPU
    python -m benchmarks.loss_memory --positions 8192 --hidden-size 4096          # on a GPU, and its default there
    python -m benchmarks.loss_memory --dtype float32 --train-head

The control is `F.linear`, `F.cross_entropy` and `F.kl_div` with autograd. If TRL is installed (`pip install -e
".[benchmarks]"`), the chunked loss of its DistillationTrainer is measured, too: the KL alone, without the CE; and if
Liger is, its fused loss (LigerFusedLinearJSDLoss with beta=0), which is CE and KL, compiled on a GPU. The control's
memory grows with the number of positions times V, so on a CPU fewer positions are measured. Ours hardly grows, so the
ratio falls with more positions. Memory is measured in a separate process for each side; it includes the gradients, but
not the states and output matrices. Time is measured in one process, in which both sides take turns.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.report import (
    EXACT_MEMORY,
    PeakMemory,
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
from benchmarks.workload import build_loss
from dskd.config import LossConfig

_WHOLE, _OURS, _TRL, _LIGER = "whole logits", "dskd", "TRL's chunked loss", "Liger's fused loss"
_PACKAGES = {_TRL: "trl", _LIGER: "liger_kernel"}
_SIDES = (_WHOLE, _OURS, *(side for side, package in _PACKAGES.items() if importlib.util.find_spec(package)))


def main(arguments: Sequence[str] | None = None) -> None:
    is_cuda = default_device().type == "cuda"
    parser = build_parser(__doc__)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--hidden-size", type=int, default=4096 if is_cuda else 256)
    parser.add_argument("--positions", type=int, nargs="+", default=[2048, 8192] if is_cuda else [256, 512, 1024])
    parser.add_argument("--chunk-size", type=int, help="train.loss_chunk_size; default: that of training")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--train-head", action="store_true", help="also compute the gradient of the output matrix")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which times are measured")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "POSITIONS"), help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    if args.child is not None:
        side, positions = args.child
        print_result(_measure_memory(side, int(positions), args))
        return
    at_start = machine()
    settings = {
        name: getattr(args, name) for name in ("vocab_size", "hidden_size", "chunk_size", "dtype", "train_head")
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value and value is not True]
    options += ["--train-head"] * args.train_head
    rows, results = [], []
    for positions in args.positions:
        memory = {
            side: run_child("benchmarks.loss_memory", *options, "--child", side, positions, environment=EXACT_MEMORY)
            for side in _SIDES
        }
        losses = {side: _build(side, positions, args) for side in _SIDES}
        seconds = take_turns(losses, rounds=args.rounds)
        losses.clear()
        others = [side for side in _SIDES if side != _OURS]
        results.append(
            {
                "positions": positions,
                "bytes": memory,
                "ratios": {side: memory[_OURS] / memory[side] for side in others},
                "time_ratios": {side: ratios(seconds, _OURS, side).as_dict() for side in others},
            }
        )
        for side in others:
            rows.append(
                [
                    f"{positions:,}",
                    side,
                    f"{memory[side] / 2**30:.2f}",
                    f"{memory[_OURS] / 2**30:.3f}",
                    f"{memory[_OURS] / memory[side]:.3f}",
                    ratios(seconds, _OURS, side).text(),
                ]
            )
    rows += [["", side, "not installed", "", "", ""] for side in _PACKAGES if side not in _SIDES]
    rows.append(["goal at 8,192", _WHOLE, "", "", "<= 0.10", ""])
    rows.append(["goal", "the others", "", "", "<= 1", ""])
    header = ("positions", "control", "its GB", "dskd, GB", "ratio", "ratio of times")
    publish(args, "benchmarks.loss_memory", header, rows, {"settings": settings, "sizes": results}, at_start)


def _measure_memory(side: str, positions: int, args: argparse.Namespace) -> int:
    _build(side, 8, args)()  # so that memory allocated on first use is not counted
    run = _build(side, positions, args)
    with PeakMemory(default_device()) as memory:
        run()
    return memory.peak_bytes


def _build(side: str, positions: int, args: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that runs forward and backward of one side, on random states, matrices and labels."""
    device, dtype = default_device(), getattr(torch, args.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    hidden, teacher_hidden = draw(positions, args.hidden_size).requires_grad_(), draw(positions, args.hidden_size)
    scale = args.hidden_size**-0.5
    weight = nn.Parameter(draw(args.vocab_size, args.hidden_size) * scale, requires_grad=args.train_head)
    teacher_weight = draw(args.vocab_size, args.hidden_size) * scale
    labels = torch.randint(0, args.vocab_size, (positions,), generator=generator, device=device)
    loss = LossConfig(sense_weight=0)  # type: ignore[call-arg]
    options = {"chunk_size": args.chunk_size} if args.chunk_size else {}
    ours = build_loss(weight, teacher_weight, loss, device, **options)
    kd_weight = loss.kd_weight * loss.temperature**2
    fused = liger_loss(loss.temperature, loss.ce_weight, kd_weight) if side == _LIGER else None

    def run() -> None:
        hidden.grad = weight.grad = None
        if side == _OURS:
            total, _ = ours(hidden, teacher_hidden, labels)
        elif side == _TRL:
            total = _trl(hidden, weight, teacher_hidden, teacher_weight, loss)
        elif side == _LIGER:
            total = fused(hidden, weight, teacher_hidden, teacher_weight, labels)
        else:
            total = _whole(hidden, weight, teacher_hidden, teacher_weight, labels, loss)
        total.backward()

    return run


def _whole(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    loss: LossConfig,
) -> torch.Tensor:
    """Computes the control: mean CE and KL in their obvious form, in float32 after the matrix products.

    `hidden` and `teacher_hidden` are [N, D], the weights [V, D], `labels` [N].
    """
    logits = F.linear(hidden, weight).float()
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float() / loss.temperature, dim=-1)
    ce = F.cross_entropy(logits, labels)
    student = F.log_softmax(logits / loss.temperature, dim=-1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return loss.ce_weight * ce + loss.kd_weight * loss.temperature**2 * kl


def _trl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    loss: LossConfig,
) -> torch.Tensor:
    """Computes the mean forward KL with TRL's function."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    inputs = (hidden, weight, None, teacher_hidden, teacher_weight, None)
    divergence, _ = ChunkedDivergenceFunction.apply(*inputs, 0.0, loss.temperature)
    return loss.kd_weight * loss.temperature**2 * divergence.mean()


def liger_loss(temperature: float, ce_weight: float, kd_weight: float) -> Any:
    """Returns Liger's loss, the mean of CE and forward KL with these weights, as a function.

    It takes the student's states [N, D] and matrix [V, D], those of the teacher, and labels [N]. Liger compiles it by
    default, for which a CPU would need minutes.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(
        weight_hard_loss=ce_weight,
        weight_soft_loss=kd_weight,
        beta=0.0,
        temperature=temperature,
        compiled=default_device().type == "cuda",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
