"""The cost of DeepSpeed's engine in a training step on one rank, against the same student as plain modules.

    python -m benchmarks.engine --preset smollm2 --threads 1
    python -m benchmarks.engine --preset smollm2 --threads 1 --tokens 128 --profile engine

The step is that of training (`dskd.training.step.train_step`) with stored states: `engine` runs it as
`launcher/train.py` does, under ZeRO-3, and `plain` with ordinary modules of torch, torch's clipping and torch's AdamW.
Both start from the same weights, and read the same batches, which are drawn before. They take turns step by step; on a
CPU a step's time is that of the processor, which other work on the machine hardly changes. Sequences have 128 tokens.
"""

import cProfile
import itertools
import pstats
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.report import Spread, default_device, machine, parse, publish, ratios, take_turns
from benchmarks.workload import OurTraining, build_workload_parser, read_config, work_directory
from dskd.config import Config
from dskd.distributed.rendezvous import initialize, shutdown
from dskd.distributed.world import World
from dskd.models.running.precision import compute_dtype
from dskd.models.structure.causal_lm import load_resident
from dskd.training.data.packed_step import StepBatches
from dskd.training.inputs import load_inputs
from dskd.training.models.pair import ModelPair
from dskd.training.models.student import assemble, build_optimizer
from dskd.training.models.teacher_source import reads_logits
from dskd.training.step import train_step

_SEQUENCE_LENGTH, _MICRO_BATCH = 128, 1024  # tokens
_VARIANTS = ("engine", "plain")
_PROFILED = 6  # steps
_BATCHES = 4  # different ones, read again and again


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_workload_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048], help="of a step")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each variant")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each variant before the measured ones")
    parser.add_argument(
        "--profile", choices=_VARIANTS, help="print where the time of this variant goes; measure nothing else"
    )
    args = parse(parser, arguments)
    args.states = True
    args.sequence_length = args.sequence_length or _SEQUENCE_LENGTH
    if unfit := [tokens for tokens in args.tokens if tokens % args.sequence_length or tokens < 1]:
        parser.error(f"--tokens {unfit[0]} is not a multiple of the sequences' {args.sequence_length} tokens")
    at_start = machine()
    rows, results = [], []
    with work_directory(args) as path:
        world = initialize()
        for tokens in args.tokens:
            steps = Variants.load(read_config(path, args.overrides, *_sizes(tokens, args.sequence_length)), world)
            if args.profile:
                _profile(steps.step_of(args.profile))
            else:
                results.append({"tokens": tokens} | _measure(steps, args.rounds, args.warm_up))
                rows.append(_row(results[-1]))
            steps.training.close()
        shutdown()
    if rows:
        header = ("tokens a step", "engine, s", "plain, s", "engine / plain", "their weights differ by")
        publish(args, "benchmarks.engine", header, rows, {"steps": results}, at_start)


def _sizes(tokens: int, length: int) -> list[str]:
    sequences = tokens // length
    micro_batch = min(sequences, max(1, _MICRO_BATCH // length))
    return [
        "teacher.mode=cached",
        f"train.global_batch_size={sequences}",
        f"train.micro_batch_size={micro_batch}",
    ]


class PlainEngine:
    """The part of the interface of DeepSpeed's engine that a training step calls, for ordinary modules."""

    def __init__(self, module: nn.Module, trained: Sequence[nn.Parameter], config: Config, accumulation: int) -> None:
        train = config.train
        self.module, self._trained, self._accumulation = module, trained, accumulation
        self._clipping = train.gradient_clipping
        self.optimizer = build_optimizer(trained, config)
        self._done = 0
        self._norm = torch.zeros(())

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Runs the module."""
        return self.module(*args, **options)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a micro-batch."""
        (loss / self._accumulation).backward()

    def step(self) -> None:
        """Updates the weights after a step's last micro-batch."""
        self._done += 1
        if self._done % self._accumulation:
            return
        self._norm = nn.utils.clip_grad_norm_(self._trained, self._clipping or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> torch.Tensor:
        """Returns the gradients' norm before clipping."""
        return self._norm


@dataclass
class Variants:
    """The same training under the engine and with plain modules, and the batches that both read."""

    training: OurTraining
    plain: ModelPair
    batches: list[StepBatches]
    config: Config
    world: World

    @classmethod
    def load(cls, config: Config, world: World) -> "Variants":
        """Loads both students, and draws the batches."""
        training = OurTraining(config, world)
        pair = training.pair
        inputs = load_inputs(config)
        dtype = compute_dtype(config.precision, world.device)
        causal_lm = load_resident(inputs.student, dtype, world, first_layer=pair.trunk_depth)
        module, trained = assemble(
            causal_lm,
            inputs.student,
            config,
            world,
            teacher=inputs.teacher if reads_logits(inputs.source.kind, config.loss) else None,
            margin=config.loss.margin,
            trunk_depth=pair.trunk_depth,
        )
        accumulation = config.train.global_batch_size // config.train.micro_batch_size
        plain = replace(pair, engine=PlainEngine(module, trained, config, accumulation))
        drawn = [_copied(training.take_batches()) for _ in range(_BATCHES)]
        training.close_loader()
        return cls(training, plain, drawn, config, world)

    def step_of(self, variant: str) -> Callable[[], None]:
        """Returns a function that trains one step."""
        pair = self.training.pair if variant == "engine" else self.plain
        batches = itertools.cycle(self.batches)

        def step() -> None:
            train_step(pair, next(batches), self.config.loss, self.world, step=1)

        return step

    def difference(self) -> float:
        """Returns the largest difference of a trained weight, divided by the largest weight of its tensor."""
        import deepspeed

        plain = dict(self.plain.engine.module.named_parameters())
        largest = 0.0
        for name, parameter in self.training.engine.module.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter]):
                    difference = (parameter - plain[name]).abs().max() / parameter.abs().max()
                largest = max(largest, float(difference))
        return largest


def _copied(batches: StepBatches) -> StepBatches:
    return replace(batches, micro_batches=[_copy(batch) for batch in batches.micro_batches])


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(of_name) for name, of_name in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def _profile(step: Callable[[], None]) -> None:
    """Prints a step's time of the processor, and the functions of Python that take it."""
    for _ in range(_PROFILED):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(_PROFILED):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = (getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    faults = (after.ru_minflt - before.ru_minflt) // _PROFILED
    print(f"a step: user {user / _PROFILED:.3f} s, system {system / _PROFILED:.3f} s, {faults:,} page faults")
    profile = cProfile.Profile(time.process_time)
    for _ in range(_PROFILED):
        profile.runcall(step)
    print(f"{_PROFILED} steps:")
    pstats.Stats(profile).sort_stats("cumulative").print_stats(100).sort_stats("tottime").print_stats(20)


def _measure(variants: Variants, rounds: int, warm_up: int) -> dict[str, Any]:
    clock = time.process_time if default_device().type == "cpu" else time.perf_counter
    work = {name: variants.step_of(name) for name in _VARIANTS}
    seconds = take_turns(work, rounds=rounds, warm_up=warm_up, clock=clock)
    return {
        "step_s": {name: Spread.of(values).as_dict() for name, values in seconds.items()},
        "ratio": ratios(seconds, "engine", "plain").as_dict(),
        "difference": variants.difference(),
    }


def _row(result: dict[str, Any]) -> list[str]:
    seconds = [Spread(**result["step_s"][name]).text() for name in _VARIANTS]
    return [f"{result['tokens']:,}", *seconds, Spread(**result["ratio"]).text(), f"{result['difference']:.1e}"]


if __name__ == "__main__":
    main(sys.argv[1:])
