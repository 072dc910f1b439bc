"""The training step: what the sense loss costs, what the shared trunk saves, and how well the hardware is used.

    python -m benchmarks.step                    # the preset small on a CPU, Llama-3-8B's shape on a GPU
    python -m benchmarks.step --preset smollm2 --states --only states
    python -m benchmarks.step --profile          # the time of each kind of operation
    python -m benchmarks.step --only use train.micro_batch_size=2

Measurements. All but the last have their control in the same process, and both take turns step by step:

    sense  the step with the sense loss against the same step without it (loss.sense_weight=0)
    trunk  student.shared_trunk on against off, with the ratio that the FLOPs of both predict
    states the step that reads stored states from the shards against the step that runs the teacher; needs --states
    share  the step from stored states at 35 % of the positions (loss.position_share) against all; needs --states
    small  tokens per second of steps of one sequence against those of the preset's batch
    use    tokens per second, FLOPs utilisation (the model's FLOPs, see benchmarks/flops.py, against a matrix product
           of the same type measured before and after) and the share of a step spent waiting for data; it runs alone, so
           that the loader gets no more time than in training
    use-states  the same with stored states, whatever the config's teacher.mode; needs --states
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.flops import step_flops
from benchmarks.profiling import profile_steps, shares_text
from benchmarks.report import PeakMemory, Spread, machine, parse, publish, ratios, take_turns
from benchmarks.workload import (
    OurTraining,
    build_workload_parser,
    load_teacher,
    read_config,
    shape_of,
    work_directory,
)
from dskd.config import Config
from dskd.distributed.rendezvous import initialize, shutdown
from dskd.distributed.world import World
from dskd.models.running.precision import compute_dtype

_MATRIX = {"cpu": 1024, "cuda": 8192}
_USES = {"use": "", "use-states": "teacher.mode=cached"}
_NEED_STATES = ("states", "share", "use-states")
_PAIRS = {
    "sense": ("loss.sense_weight=1", "loss.sense_weight=0"),
    "trunk": ("student.shared_trunk='on'", "student.shared_trunk='off'"),  # without quotes YAML reads true or false
    "states": ("teacher.mode=cached", "teacher.mode=resident"),
    "share": ("teacher.mode=cached loss.position_share=0.35", "teacher.mode=cached"),
    "small": ("train.global_batch_size=1 train.micro_batch_size=1", ""),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_workload_parser(__doc__)
    names = [*_PAIRS, *_USES]
    parser.add_argument("--only", choices=names, nargs="+", help="default: sense, trunk, use, and states with --states")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each variant")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each variant before the measured ones")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="time the pairs by the seconds of this process on a core, for a machine with other work; the loader's "
        "workers count only with train.num_workers=0",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print the operations that take the time of two steps; measure nothing else",
    )
    args = parse(parser, arguments)
    if args.only is None:
        args.only = ["sense", "trunk", *["states"] * args.states, "use"]
    if not args.states and (needing := [name for name in args.only if name in _NEED_STATES]):
        parser.error(f"--only {needing[0]} needs --states")
    at_start = machine()
    rows: list[list[str]] = []
    results: dict[str, Any] = {}
    with work_directory(args) as path:
        world = initialize()
        config = read_config(path, args.overrides)
        if args.profile:
            _profile(config, world)
            shutdown()
            return
        teacher = load_teacher(config, world)
        for name in (pair for pair in _PAIRS if pair in args.only):
            variants = {keys: read_config(path, args.overrides, *keys.split()) for keys in _PAIRS[name]}
            clock = time.process_time if args.cpu_time else time.perf_counter
            results[name] = _pair(variants, teacher, world, args.rounds, args.warm_up, clock)
            rows += _pair_rows(name, results[name])
        for name in (use for use in _USES if use in args.only):
            used = read_config(path, args.overrides, *_USES[name].split())
            results[name] = _use(used, teacher, world, args.rounds, args.warm_up)
            rows += _use_rows(results[name], "stored states: " if _USES[name] else "")
        teacher.close()
        shutdown()
    publish(args, "benchmarks.step", ("", "figure", "goal"), rows, results, at_start)


def _pair(
    variants: dict[str, Config], teacher: Any, world: World, rounds: int, warm_up: int, clock: Callable[[], float]
) -> dict[str, Any]:
    trainings = {name: OurTraining(config, world, teacher=teacher) for name, config in variants.items()}
    numerator, denominator = trainings
    steps = {name: training.step for name, training in trainings.items()}
    seconds = take_turns(steps, rounds=rounds, warm_up=warm_up, clock=clock)
    per_token = {
        name: [value / trainings[name].tokens_per_step for value in values] for name, values in seconds.items()
    }
    flops = {name: sum(_flops(config).values()) for name, config in variants.items()}
    for training in trainings.values():
        training.close(keep_teacher=True)
    return {
        "step_s": {name: Spread.of(values).as_dict() for name, values in seconds.items()},
        "time_ratio": ratios(per_token, numerator, denominator).as_dict(),
        "flops_ratio": flops[numerator] / flops[denominator],
    }


def _pair_rows(name: str, result: dict[str, Any]) -> list[list[str]]:
    goal = {
        "sense": "<= 1.01 on a GPU, <= 1.05 on a CPU",
        "trunk": "what the FLOPs predict",
        "states": "<= 0.33 on a CPU at smollm2, <= 0.5 at small, <= 0.29 on a GPU at 8b",
        "share": "what the FLOPs predict",
        "small": "<= 1.25",
    }[name]
    numerator, denominator = _PAIRS[name]
    rows = [
        [f"{key or 'the preset'}, seconds a step", Spread(**result["step_s"][key]).text(), ""]
        for key in (numerator, denominator)
    ]
    per_token = ", time per token" if name == "small" else ""
    rows.append(
        [f"{numerator} / {denominator or 'the preset'}{per_token}", Spread(**result["time_ratio"]).text(), goal]
    )
    if name not in ("sense", "small"):
        rows.append(["the same ratio, FLOPs", f"{result['flops_ratio']:.3f}", ""])
    return rows


def _use(config: Config, teacher: Any, world: World, rounds: int, warm_up: int) -> dict[str, Any]:
    dtype = compute_dtype(config.precision, world.device)
    before = matrix_rate(dtype, world.device)
    training = OurTraining(config, world, teacher=teacher)
    for _ in range(warm_up):
        training.step()
    training.waited_s = 0.0
    started = time.perf_counter()
    with PeakMemory(world.device) as memory:
        seconds = take_turns({"step": training.step}, rounds=rounds, warm_up=0)["step"]
    elapsed = time.perf_counter() - started
    rate = max(before, matrix_rate(dtype, world.device))
    parts = _flops(config)
    tokens_per_s = rounds * training.tokens_per_step / elapsed
    flops_per_s = sum(parts.values()) * tokens_per_s
    result = {
        "dtype": str(dtype).removeprefix("torch."),
        "step_s": Spread.of(seconds).as_dict(),
        "tokens_per_s": tokens_per_s,
        "flops_per_token": parts,
        "flops_per_s": flops_per_s,
        "matrix_flops_per_s": rate,
        "utilisation": flops_per_s / rate,
        "data_wait_share": training.waited_s / elapsed,
        "step_memory_bytes": memory.peak_bytes,
    }
    training.close(keep_teacher=True)
    return result


def _use_rows(result: dict[str, Any], where: str) -> list[list[str]]:
    parts = result["flops_per_token"]
    rows = [
        [f"tokens per second, {result['dtype']}", f"{result['tokens_per_s']:,.0f}", ""],
        ["GFLOPs a token", f"{sum(parts.values()) / 1e9:.3f}", ""],
        ["  of these in the head", f"{parts['head'] / sum(parts.values()):.2f}", ""],
        ["TFLOP/s of a matrix product", f"{result['matrix_flops_per_s'] / 1e12:.3f}", ""],
        ["model FLOPs utilisation", f"{result['utilisation']:.3f}", ">= 0.45 on a GPU at 8b"],
        ["share of a step waiting for data", f"{result['data_wait_share']:.4f}", "< 0.01"],
        ["memory of a step beyond models, GB", f"{result['step_memory_bytes'] / 2**30:.2f}", ""],
    ]
    return [[f"{where}{name}", *cells] for name, *cells in rows]


def _flops(config: Config) -> dict[str, float]:
    is_cached = config.teacher.mode == "cached"
    return step_flops(
        shape_of(config),
        shared_trunk=shares_trunk(config),
        stored_states=is_cached,
        position_share=config.loss.position_share,
    )


def shares_trunk(config: Config) -> bool:
    """Returns True if the teacher computes the student's frozen layers; with Llama models, `auto` does that."""
    return config.student.shared_trunk != "off"


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Returns the FLOPs per second of a product of two large square matrices, the fastest of 20."""
    size = _MATRIX[device.type]
    one, other = torch.randn(2, size, size, device=device).to(dtype)
    seconds = take_turns({"product": lambda: one @ other}, rounds=20, warm_up=3, device=device)["product"]
    return 2 * size**3 / min(seconds)


def _profile(config: Config, world: World) -> None:
    training = OurTraining(config, world)
    shares, operations = profile_steps(training.step)
    print(f"{operations}\n{shares_text(shares)}")
    training.close()


if __name__ == "__main__":
    main(sys.argv[1:])
