"""The computations of benchmarks against independent truths. No test checks a speed."""

import importlib
import json
import mmap
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_jobs import run_main
from rank_processes import finish, fork_ranks
from small_dictionaries import all_vectors
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Shape, step_flops
from benchmarks.published import Lexicon, logit_losses, sense_loss
from benchmarks.report import (
    PeakMemory,
    Spread,
    build_parser,
    machine,
    parse_result,
    publish,
    ratios,
    run_child,
    take_turns,
)
from benchmarks.synthetic import draw_annotation, draw_tokens, llama_config, write_dictionary
from benchmarks.workload import Preset, build_loss, write_work_directory
from dskd.config import LossConfig
from dskd.losses.terms import SUMS
from dskd.shards.search import Searcher

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"
PARTS = ("__init__", "flops", "gpu_report", "profiling", "report", "synthetic", "workload")
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in PARTS)


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_explains_its_use(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m benchmarks.{name}" in printed and "--output" in printed
    assert f"python -m benchmarks.{name}" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_without_trl_its_benchmark_explains_how_to_install_it(monkeypatch, capsys):
    from benchmarks import gkd

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        gkd.main([])
    assert ended.value.code == 2
    assert 'pip install -e ".[benchmarks]"' in capsys.readouterr().err


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_flops_of_a_step_are_those_that_torch_counts(shared_trunk):
    from transformers import LlamaForCausalLM

    shape = Shape(120, 32, 48, 4, 2, teacher_layers=4, student_layers=3, trained_layers=2, sequence_length=16)

    def llama(layers):
        config = llama_config(shape, layers)
        config._attn_implementation = "eager"  # plain matrix products, which the counter knows on every device
        return LlamaForCausalLM(config)

    teacher, student = llama(4).requires_grad_(False), llama(2 if shared_trunk else 3).requires_grad_(False)
    for layer in student.model.layers[-2:]:
        layer.requires_grad_(True)
    ids = torch.arange(2 * 16).view(2, 16)
    with FlopCounterMode(display=False) as counter:
        of_teacher = teacher(ids, output_hidden_states=True)
        inputs = {"inputs_embeds": of_teacher.hidden_states[1]} if shared_trunk else {"input_ids": ids}
        (student(**inputs).logits - of_teacher.logits).square().sum().backward()
    rotary = (
        2 * 2 * len(ids[0]) * (shape.hidden_size // shape.num_heads // 2)
    )  # the rotary angles of both models are a product, too
    expected = sum(step_flops(shape, shared_trunk=shared_trunk, causal=False).values())
    assert counter.get_total_flops() == expected * ids.numel() + rotary


def test_the_published_algorithm_has_our_losses(tmp_path):
    vocab_size, hidden_size, length, kappa = 40, 12, 30, 3
    dictionary = write_dictionary(tmp_path / "senses.safetensors", vocab_size, hidden_size, k=4, synonyms=6)
    generator = torch.Generator().manual_seed(1)
    hidden, teacher_hidden = torch.randn(2, length, hidden_size, generator=generator)
    weight, teacher_weight = torch.randn(2, vocab_size, hidden_size, generator=generator)
    targets = torch.randint(0, vocab_size, (length,), generator=generator)
    loss = LossConfig(temperature=2.0, margin=2.5, antonym_weight=0.5)

    lexicon = Lexicon.of(dictionary, set(range(vocab_size)), torch.device("cpu"))
    related = [i for i, y in enumerate(targets.tolist()) if y in lexicon.synonyms]
    relation, own = related[:4], list(range(3, 12))
    assert len(relation) == 4
    ce, kl = logit_losses(hidden @ weight.T, teacher_hidden @ teacher_weight.T, targets, loss.temperature)
    sense = sense_loss(hidden, teacher_hidden, targets.tolist(), relation, own, lexicon, loss, kappa)

    nearest = Searcher(dictionary, kappa, torch.device("cpu")).search(teacher_hidden, targets)
    senses = {
        "sense_rows": all_vectors(dictionary),
        "relation_positions": torch.tensor(relation),
        "synonym_rows": nearest.synonym_rows[relation].long(),
        "antonym_rows": nearest.antonym_rows[relation].long(),
        "own_positions": torch.tensor(own),
        "own_rows": nearest.own_rows[own].long(),
    }
    ours = build_loss(torch.nn.Parameter(weight), teacher_weight, loss, torch.device("cpu"), chunk_size=7)
    total, sums = ours(hidden, teacher_hidden, targets, senses)
    terms = dict(zip(SUMS, sums.tolist(), strict=True))
    assert terms["ce"] / length == pytest.approx(float(ce), rel=1e-5)
    assert terms["kl"] / length == pytest.approx(float(kl), rel=1e-4)
    assert terms["sense"] / (len(relation) + len(own)) == pytest.approx(float(sense), rel=1e-5)
    assert terms["active_hinges"] > 0
    weighted = loss.ce_weight * ce + loss.kd_weight * loss.temperature**2 * kl + loss.sense_weight * sense
    assert total.item() == pytest.approx(weighted.item(), rel=1e-5)


def test_synthetic_rows_are_of_the_right_entries(tmp_path):
    dictionary = write_dictionary(tmp_path / "senses.safetensors", 50, 4, k=3, synonyms=2)
    tokens = draw_tokens(20, 16, 50)
    columns = draw_annotation(tokens, dictionary, kappa=5)
    entries = dictionary.entries
    for sample, position in ((s, p) for s in range(20) for p in range(15)):
        target = int(tokens[sample, position + 1])
        assert set(columns["sense_ids"][sample, position] // 3) == {target}
        for kind in ("synonym", "antonym"):
            offsets, of = getattr(entries, f"{kind}_offsets"), getattr(entries, f"{kind}_entries")
            neighbours = set(of[offsets[target] : offsets[target + 1]].tolist())
            assert bool(neighbours) == (target % 5 == 4)
            rows = columns[f"{kind}_ids"][sample, position]
            assert set((rows // 3).tolist()) <= (neighbours or {-1})
    assert all((column[:, -1] == -1).all() for column in columns.values())


def test_variants_take_turns_and_ratios_are_round_by_round():
    ran = []
    seconds = take_turns({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, rounds=2)
    assert ran == ["a", "b", "b", "a", "a", "b"] and [len(values) for values in seconds.values()] == [2, 2]
    assert ratios({"a": [1, 4, 9], "b": [2, 4, 3]}, "a", "b") == Spread(1.0, 0.75, 2.0)


def test_peak_memory_includes_memory_that_was_freed():
    with PeakMemory(torch.device("cpu")) as memory:
        # Not from memory that an earlier test freed and the process kept.
        held = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        time.sleep(0.2)  # long enough for a sample on a busy machine
        held.close()
    assert 60 * 2**20 < memory.peak_bytes < 90 * 2**20


def test_a_child_does_not_take_over_the_port_of_the_process_that_starts_it(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(
        "import os\n"
        "from benchmarks.report import print_result\n"
        "print_result([name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'SOME') if name in os.environ])\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER.parent}:{tmp_path}")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert run_child("child", environment={"SOME": "1"}) == ["SOME"]


def test_a_result_has_its_command_and_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "2"])
    given = build_parser("").parse_args(["--output", str(tmp_path / "new" / "x.json")])
    publish(given, "benchmarks.x", ("", "figure"), [["speed", "3"]], {"speed": 3.0}, machine())
    written = json.loads((tmp_path / "new" / "x.json").read_text())
    assert written["command"] == "python -m benchmarks.x --rounds 2" and written["results"] == {"speed": 3.0}
    assert {"date", "device", "cores", "threads", "load", "torch"} <= written["machine"].keys()
    assert "speed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_step_benchmark_trains_and_reports_its_measurements(tmp_path):
    preset = Preset(Shape(300, 32, 48, 4, 2, 4, 3, 1, 32), global_batch_size=4, micro_batch_size=2)
    write_work_directory(tmp_path / "small", preset, steps=6)
    options = [
        "--folder",
        tmp_path,
        "--preset",
        "small",
        "--rounds",
        2,
        "--warm-up",
        1,
        "--output",
        tmp_path / "x.json",
    ]
    options += ["--only", "trunk", "use"]  # `sense` is another pair, measured like `trunk`
    finish(fork_ranks(run_main, "benchmarks.step", list(map(str, options))))
    results = json.loads((tmp_path / "x.json").read_text())["results"]
    use, shape = results["use"], preset.shape
    assert use["flops_per_token"] == step_flops(shape, shared_trunk=True)
    assert use["flops_per_s"] == pytest.approx(sum(use["flops_per_token"].values()) * use["tokens_per_s"])
    assert use["utilisation"] == pytest.approx(use["flops_per_s"] / use["matrix_flops_per_s"])
    assert use["tokens_per_s"] == pytest.approx(4 * 32 / use["step_s"]["median"], rel=0.5)
    assert 0 < use["data_wait_share"] < 1
    expected = [sum(step_flops(shape, shared_trunk=shared).values()) for shared in (True, False)]
    assert results["trunk"]["flops_ratio"] == pytest.approx(expected[0] / expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["whole logits", "dskd"])
def test_the_memory_of_a_loss_is_measured(side):
    arguments = ["--vocab-size=512", "--hidden-size=64", "--dtype=bfloat16", "--child", side, "64"]
    finished = finish(fork_ranks(run_main, "benchmarks.loss_memory", arguments))
    assert parse_result(arguments, 0, finished.output) >= 0
