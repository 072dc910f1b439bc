"""Our training step against TRL, off-policy: tokens per second and peak memory.

    pip install -e ".[benchmarks]"
    python -m benchmarks.gkd

Both have the same models, tokens, batches, accumulation, trained layers, AdamW and number format. They take turns, each
in separate processes. GKD has the settings nearest to ours: lmbda=0 (no generation), beta=0 (KL of teacher to student).
Its DistillationTrainer always generates, so its chunked loss, the same KL without whole logits, is measured in a plain
loop over Hugging Face's models (`TRL's chunked loss`), and so is Liger's fused loss (LigerFusedLinearJSDLoss with
beta=0, the same KL; compiled on a GPU, as by default), if the package is there. TRL's loss has no cross-entropy, and
its temperature affects only sampling, so our step does more: CE with KL at temperature 2, without and with the sense
loss. Recomputing activations, TRL's default, is off on both sides. With bf16 models TRL runs under autocast by default;
with `--plain-bf16` it computes everything, softmax included, in bf16.

Memory is the peak over the measured steps, minus what the process held before it loaded its models. On a CPU it is
measured in separate processes in which freed memory counts as free at once, because that slows them down.
"""

import argparse
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_memory import liger_loss
from benchmarks.profiling import Profile, shares_text
from benchmarks.report import (
    EXACT_MEMORY,
    PeakMemory,
    Spread,
    default_device,
    held_bytes,
    machine,
    parse,
    print_result,
    publish,
    run_child,
)
from benchmarks.workload import OurTraining, build_workload_parser, read_config, read_tokens, work_directory
from dskd.config import Config
from dskd.distributed.rendezvous import initialize
from dskd.models.files.folder import find_teacher
from dskd.models.running.precision import compute_dtype
from dskd.models.structure.trained import choose_trained
from dskd.students.student import find_student

_OURS = {"dskd: CE + KL": "loss.sense_weight=0", "dskd: CE + KL + sense": "loss.sense_weight=1"}
_TRL, _TRL_CHUNKED, _LIGER = "TRL's GKD", "TRL's chunked loss", "Liger's fused loss"
_CONTROLS = (_TRL_CHUNKED, _LIGER, _TRL)
_SIDES = dict(zip(("plain", "sense", "chunked", "liger", "trl"), (*_OURS, *_CONTROLS), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_workload_parser(__doc__)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each process")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--rounds", type=int, default=2, help="number of processes of each side")
    parser.add_argument("--only", choices=("plain", "sense"), help="our variant to compare with TRL's; default: both")
    parser.add_argument(
        "--quick-memory",
        action="store_true",
        help="on a CPU: no separate processes for memory, which is then not exact",
    )
    parser.add_argument("--plain-bf16", action="store_true", help="TRL without autocast")
    parser.add_argument(
        "--profile", action="store_true", help="print the kinds of operations that take the time; measure nothing else"
    )
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "CONFIG"), help=argparse.SUPPRESS)
    args = parse(parser, arguments)
    if args.child is not None:
        side, path = args.child
        config = read_config(Path(path), args.overrides, *([_OURS[side]] if side in _OURS else []))
        loops = {_TRL_CHUNKED: _trl_chunked, _LIGER: _liger}
        if side in loops:
            print_result(_run_loop(config, args, loops[side]))
        else:
            print_result((_run_gkd if side == _TRL else _run_ours)(config, args))
        return
    if importlib.util.find_spec("trl") is None:
        parser.error('TRL is not installed; install it with pip install -e ".[benchmarks]"')
    at_start = machine()
    options = ["--steps", args.steps, "--warm-up", args.warm_up]
    options += ["--plain-bf16"] * args.plain_bf16 + ["--profile"] * args.profile
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    controls = [name for name in _CONTROLS if name != _LIGER or has_liger]
    sides = [name for key, name in _SIDES.items() if args.only in {None, key} or name in _CONTROLS]
    sides = [name for name in sides if name in _OURS or name in controls]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    # On a GPU the allocator's count is exact, so memory needs no separate processes.
    rounds_of_memory = 0 if args.quick_memory or default_device().type == "cuda" else 1
    memory: dict[str, dict[str, float]] = {}
    with work_directory(args) as path:
        if args.profile:
            for name in rates:
                shares = run_child("benchmarks.gkd", *options, "--child", name, path, *args.overrides)
                print(f"{name}\n{shares_text(shares)}", flush=True)
            return
        for number in range(args.rounds + rounds_of_memory):
            for name, values in rates.items():
                child = "benchmarks.gkd", *options, "--child", name, path, *args.overrides
                if number < args.rounds:
                    memory[name] = run_child(*child)
                    values.append(memory[name]["tokens_per_s"])
                else:
                    memory[name] = run_child(*child, environment=EXACT_MEMORY)
    results: dict[str, Any] = {
        name: {
            "tokens_per_s": Spread.of(values).as_dict(),
            "peak_bytes": memory[name]["peak_bytes"],
            "step_bytes": memory[name]["step_bytes"],
        }
        for name, values in rates.items()
    }
    control = results[_TRL]
    rows = [
        [
            name,
            Spread(**result["tokens_per_s"]).text(",.0f"),
            f"{result['tokens_per_s']['median'] / control['tokens_per_s']['median']:.2f}",
            f"{result['peak_bytes'] / 2**30:.2f}",
            f"{result['peak_bytes'] / control['peak_bytes']:.2f}",
            f"{result['step_bytes'] / 2**30:.2f}",
        ]
        for name, result in results.items()
    ]
    if not has_liger:
        rows.append([_LIGER, "not installed", "", "", "", ""])
    rows.append(["goal", "", ">= 1.5", "", "<= 0.5", ""])
    header = ("", "tokens/s", "ratio", "peak memory, GB", "ratio", "of it within a step")
    publish(args, "benchmarks.gkd", header, rows, results, at_start)


def _run_ours(config: Config, args: argparse.Namespace) -> dict[str, float]:
    world = initialize()
    start = held_bytes(world.device)
    training = OurTraining(config, world)
    meter = _Meter(args, world.device, start, training.tokens_per_step)
    for _ in range(args.warm_up + args.steps):
        training.step()
        meter.count()
    training.close()
    return meter.result


def _run_gkd(config: Config, args: argparse.Namespace) -> dict[str, float]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    device, train = default_device(), config.train
    dtype = compute_dtype(config.precision, device)
    meter = _meter_from_now(config, args, device)
    teacher, models = find_teacher(config), _load_models(config, dtype)
    tokens = read_tokens(config)

    class StepCounter(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.count()

    def collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([sample["input_ids"] for sample in samples])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}

    with tempfile.TemporaryDirectory() as folder:
        # The settings of our training as far as GKD has them; it saves and reports nothing.
        settings = GKDConfig(
            output_dir=folder,
            lmbda=0.0,
            beta=0.0,
            per_device_train_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=train.global_batch_size // train.micro_batch_size,
            max_steps=args.warm_up + args.steps,
            learning_rate=train.peak_learning_rate,
            weight_decay=train.weight_decay,
            max_grad_norm=train.gradient_clipping,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            optim="adamw_torch",
            bf16=dtype == torch.bfloat16 and not args.plain_bf16,
            gradient_checkpointing=False,
            dataloader_num_workers=train.num_workers,
            use_cpu=device.type == "cpu",
            disable_tqdm=True,
            logging_steps=1000,
            save_strategy="no",
            report_to=[],
        )
        trainer = GKDTrainer(
            model=models[1],
            teacher_model=models[0],
            args=settings,
            data_collator=collate,
            train_dataset=Dataset.from_dict({"input_ids": tokens}),
            processing_class=teacher.tokenizer,
            callbacks=[StepCounter()],
        )
        trainer.train()
    return meter.result


def _load_models(config: Config, dtype: torch.dtype) -> list[Any]:
    """Returns teacher and student as transformers loads them; of the student only what the config says is trained."""
    from transformers import AutoModelForCausalLM

    folders = find_teacher(config), find_student(config)
    models = [AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype) for folder in folders]
    for parameter in (parameter for model in models for parameter in model.parameters()):
        # On a CPU parameters are mapped from their files, and would not count as memory.
        parameter.data = parameter.data.clone()
    choose_trained(models[1], config.student)
    return models


# A loss of the states and matrix of the student, those of the teacher, and the labels, summed over all positions.
_Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _trl_chunked(
    states: torch.Tensor, weight: torch.Tensor, teacher_states: torch.Tensor, teacher_weight: torch.Tensor, _: Any
) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    inputs = states, weight, None, teacher_states, teacher_weight, None
    divergence, _ = ChunkedDivergenceFunction.apply(*inputs, 0.0, 1.0)
    return divergence.sum()


def _liger(
    states: torch.Tensor,
    weight: torch.Tensor,
    teacher_states: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    loss = liger_loss(temperature=1.0, ce_weight=0.0, kd_weight=1.0)
    return loss(states, weight, teacher_states, teacher_weight, labels) * len(labels)


def _run_loop(config: Config, args: argparse.Namespace, loss: _Loss) -> dict[str, float]:
    """Trains in a plain loop over Hugging Face's models, with a loss that takes states instead of logits."""
    device, train = default_device(), config.train
    dtype = compute_dtype(config.precision, device)
    meter = _meter_from_now(config, args, device)
    teacher, student = (model.to(device) for model in _load_models(config, dtype))
    teacher.requires_grad_(False)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.peak_learning_rate, weight_decay=train.weight_decay)
    micro_batches = itertools.cycle(torch.from_numpy(read_tokens(config)).long().split(train.micro_batch_size))
    targets = train.global_batch_size * (config.corpus.sequence_length - 1)
    for _ in range(args.warm_up + args.steps):
        for input_ids in itertools.islice(micro_batches, train.global_batch_size // train.micro_batch_size):
            inputs = input_ids.to(device)
            with torch.no_grad():
                teacher_states = teacher.base_model(inputs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            states = student.base_model(inputs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            labels = inputs[:, 1:].flatten()
            total = loss(states, student.lm_head.weight, teacher_states, teacher.lm_head.weight, labels)
            (total / targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        meter.count()
    return meter.result


def _meter_from_now(config: Config, args: argparse.Namespace, device: torch.device) -> "_Meter":
    """Returns a meter of steps of the config's size, on a device that holds nothing of the training yet."""
    tokens = config.train.global_batch_size * config.corpus.sequence_length
    return _Meter(args, device, held_bytes(device), tokens)


class _Meter:
    """A meter of the rate and the peak memory of all measured steps; :meth:`count` is called after each step."""

    def __init__(self, args: argparse.Namespace, device: torch.device, start: int, tokens_per_step: int) -> None:
        self._first, self._last = args.warm_up, args.warm_up + args.steps
        self._device, self._start = device, start
        self._tokens = args.steps * tokens_per_step
        self._done = 0
        self._profile = Profile() if args.profile else None
        self.result: dict[str, float] = {}  # with --profile, the share of each kind of operation

    def count(self) -> None:
        # The measurement begins after the last warm-up step, and ends after the last step.
        self._done += 1
        if self._done == self._first:
            self._memory = PeakMemory(self._device, beyond=self._start)
            self._memory.__enter__()
            self._between_steps = held_bytes(self._device)
            self._started = time.perf_counter()
            if self._profile is not None:
                self._profile.start()
        elif self._done == self._last and self._profile is not None:
            self.result = self._profile.stop()
        elif self._done == self._last:
            self._memory.__exit__()
            self.result = {
                "tokens_per_s": self._tokens / (time.perf_counter() - self._started),
                "peak_bytes": self._memory.peak_bytes,
                "step_bytes": self._memory.peak_bytes + self._start - self._between_steps,
            }


if __name__ == "__main__":
    main(sys.argv[1:])
