"""The verb `dskd plan`: predicts memory, time and disk space."""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

from dskd.cli.program import add_config_arguments, add_verb, whole_number
from dskd.config import Config
from dskd.config.reading import load_config
from dskd.console import say
from dskd.errors import UNFIT_EXIT_CODE
from dskd.plan import GB
from dskd.plan.cluster import BANDWIDTH, DISK_BANDWIDTH, HOST_BANDWIDTH, MEMORY_BANDWIDTH, TFLOPS, Cluster
from dskd.plan.known_models import KNOWN_MODELS

HELP = "predict what a job needs: memory, time and disk; exit code 3 if it will not fit"
DESCRIPTION = """
Predicts what training needs on the given machines: memory of each GPU and node, tokens/s, hours, and disk. It reads
only the teacher's config.json and your configuration, no weights. 1 GB is 2^30 bytes. Tokens/s and hours are those of
training.

If the job will not fit, in training or in an earlier stage that has not run yet, the exit code is 3, and the smallest
change that makes it fit is printed. Memory is counted, and was compared with real training (benchmarks/README.md).
Speed is an estimate from the rates below.
"""
EPILOG = f"""
The shapes of these models are built in: {", ".join(sorted(KNOWN_MODELS))}.
Those of any other are read from its folder or the Hub, or from the file of --teacher-config.

examples:
  dskd plan --config configs/llama3-8b-16layers.yaml --nodes 1 --gpus-per-node 8 --gpu-memory 80 --host-memory 1000
  dskd plan --config configs/llama3-70b-to-8b.yaml --nodes 4 --gpus-per-node 8 --gpu-memory 80 --host-memory 1000 \\
      --bandwidth 40 --samples 1000000
  dskd plan --config mine.yaml --nodes 2 --gpus-per-node 4 --gpu-memory 40 --host-memory 500 teacher.mode=resident
  dskd plan --config configs/quickstart.yaml --device cpu --nodes 1 --gpus-per-node 2 --gpu-memory 8 --host-memory 16
"""


def add_parser(verbs: argparse._SubParsersAction) -> None:
    """Adds the parser of `plan`."""
    parser = add_verb(verbs, "plan", run_plan, text=HELP, description=DESCRIPTION, epilog=EPILOG)
    add_config_arguments(parser)
    _add_machines(parser.add_argument_group("machines"))
    _add_rates(parser.add_argument_group("rates (for the speed)"))
    parser.add_argument(
        "--teacher-config",
        type=Path,
        metavar="FILE",
        help="config.json of the teacher, instead of that of teacher.path",
    )
    parser.add_argument(
        "--samples",
        type=whole_number(1),
        metavar="N",
        help="number of training sequences [that of WORKDIR/shards, if there, or corpus.max_sequences]",
    )
    parser.add_argument(
        "--relations",
        type=_share,
        metavar="SHARE",
        help="share of the targets that have a synonym or antonym; `dskd inspect senses` prints it [0.2]",
    )


def _add_machines(machines: argparse._ArgumentGroup) -> None:
    machines.add_argument("--nodes", type=whole_number(1), required=True, metavar="N", help="number of nodes")
    machines.add_argument(
        "--gpus-per-node",
        type=whole_number(1),
        required=True,
        metavar="G",
        help="number of GPUs (without GPUs: of ranks) of each node",
    )
    machines.add_argument("--gpu-memory", type=_positive, required=True, metavar="GB", help="memory of each GPU")
    machines.add_argument("--host-memory", type=_positive, required=True, metavar="GB", help="memory of each node")
    machines.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: ranks have no GPU; --gpus-per-node is the number of ranks of a node, and --gpu-memory the share of "
        "its memory that each may use [cuda]",
    )


def _add_rates(rates: argparse._ArgumentGroup) -> None:
    rates.add_argument(
        "--bandwidth",
        type=_positive,
        metavar="GB/s",
        help=f"rate at which a GPU receives from the others [{BANDWIDTH['one node']:.0f} on one node: NVLink; "
        f"{BANDWIDTH['nodes']:.0f} on several: a 400 Gbit/s adapter each; {BANDWIDTH['cpu']:.0f} without GPUs]",
    )
    rates.add_argument(
        "--tflops",
        type=_positive,
        metavar="TFLOP/s",
        help=f"sustained rate of a GPU [{TFLOPS['cuda']:.0f}: 40 %% of an H100's dense bf16; "
        f"{TFLOPS['cpu']:g} without]",
    )
    rates.add_argument(
        "--memory-bandwidth",
        type=_positive,
        metavar="GB/s",
        help="rate at which a GPU reads its own memory, for corpus.source: teacher "
        f"[{MEMORY_BANDWIDTH['cuda']:.0f}: 60 %% of an H100's; {MEMORY_BANDWIDTH['cpu']:.0f} without]",
    )
    rates.add_argument(
        "--host-bandwidth",
        type=_positive,
        default=HOST_BANDWIDTH,
        metavar="GB/s",
        help=f"rate from the host's memory to each GPU, for teacher.offload [{HOST_BANDWIDTH:.0f}: PCIe 4.0 x16]",
    )
    rates.add_argument(
        "--disk-bandwidth",
        type=_positive,
        default=DISK_BANDWIDTH,
        metavar="GB/s",
        help="rate at which a node reads the teacher's shares (teacher.offload: nvme), and shards with stored states "
        f"[{DISK_BANDWIDTH:.0f}]",
    )


def run_plan(args: argparse.Namespace) -> int:
    """Prints the plan, and the smallest change that makes the job fit if it does not; returns the exit code."""
    from dskd.plan.architecture import find_architecture
    from dskd.plan.changes import Change, smallest_change
    from dskd.plan.plan import RELATIONS, Plan, make_plan
    from dskd.plan.report import format_offload, format_plan, format_refusal
    from dskd.plan.stored import loads_teacher

    config = load_config(args.config, args.overrides)
    architecture = find_architecture(config, args.teacher_config)
    cluster = _cluster(args, args.nodes)
    relations = RELATIONS if args.relations is None else args.relations

    def plan_of(config: Config, cluster: Cluster) -> Plan:
        return make_plan(config, cluster, architecture, samples=args.samples, relations=relations)

    def replan(change: Change) -> Plan:
        changed = load_config(args.config, [*args.overrides, *change.overrides])
        return plan_of(changed, cluster if change.nodes is None else _cluster(args, change.nodes))

    plan = plan_of(config, cluster)
    print(format_plan(plan))
    without = None
    if loads_teacher(config) and cluster.device == "cuda":
        nvme = () if config.teacher.nvme_path is None else ("teacher.nvme_path=null",)
        without = replan(Change(("teacher.mode=zero3", "teacher.offload=none", *nvme)))
    if loads_teacher(config) == (without is not None):
        print(f"\n{format_offload(plan, without)}")
    if plan.fits:
        print("\nfits")
        return 0
    print(flush=True)
    say("looking for the smallest change that fits …")
    print(format_refusal(plan, smallest_change(plan, replan)))
    return UNFIT_EXIT_CODE


def _cluster(args: argparse.Namespace, nodes: int) -> Cluster:
    default = BANDWIDTH["cpu" if args.device == "cpu" else "one node" if nodes == 1 else "nodes"]
    return Cluster(
        nodes,
        args.gpus_per_node,
        round(args.gpu_memory * GB),
        round(args.host_memory * GB),
        args.device,
        (args.bandwidth or default) * GB,
        args.host_bandwidth * GB,
        args.disk_bandwidth * GB,
        (args.tflops or TFLOPS[args.device]) * 1e12,
        (args.memory_bandwidth or MEMORY_BANDWIDTH[args.device]) * GB,
    )


def _positive(text: str) -> float:
    # Between these limits, no product or quotient of the rates and sizes is infinite, or too long to print.
    return _number(text, "a number above 0 (1e-12 to 1e12) without a unit", lambda value: 1e-12 <= value <= 1e12)


def _share(text: str) -> float:
    return _number(text, "a share from 0 to 1", lambda value: 0 <= value <= 1)


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    with contextlib.suppress(ValueError):
        if fits(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
