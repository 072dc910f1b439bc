"""Lexical measures of the models of a work directory, on one rank and on two."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from artifact_folders import open_dataset, replace_at_loading, update_manifest
from plain_reading import run_apart
from rank_processes import ONE_RANK, run_program
from safetensors.torch import load_file
from test_lexical_items import GLOSSES, SYNSETS
from test_wic import LINES
from tiny_wordnet import write_wordnet
from tiny_work import BEFORE_TRAINING, RESIDENT, copy_work
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.config.reading import load_config
from dskd.errors import OutageError, UserError
from dskd.evaluation.lexical.items import build_items
from dskd.evaluation.lexical.results import load_summary
from dskd.evaluation.lexical.run import run_lexical
from dskd.evaluation.scores_by_example import read_examples
from dskd.tracking import Start, read_artifact, read_history, read_run, start_tracking

MODELS = ("teacher", "student", "dskd")
MORE = {"shore": GLOSSES["shore"] + '; "a walk along the bank"', "torrid": GLOSSES["torrid"] + '; "what torrid hours"'}


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """A copy of the work directory with a tracked run of its own, a small WordNet and a file of Words in Context."""
    folder = tmp_path_factory.mktemp("lexical")
    write_wordnet(folder / "dict", SYNSETS, GLOSSES | MORE)
    (folder / "dev.data.txt").write_text("".join(f"{line}\n" for line in LINES))
    (folder / "dev.gold.txt").write_text("T\nF\nF\n")
    path = copy_work(
        tiny,
        folder,
        *BEFORE_TRAINING,
        "export",
        teacher=RESIDENT,
        wordnet={"path": str(folder / "dict")},
        evaluation={"batch_size": 4, "samples": 0, "wic": str(folder / "dev.data.txt")},
    )
    loaded = load_config(path)
    tracker = start_tracking(loaded, ONE_RANK, tags={}, start=Start())
    tracker.finish("FINISHED")
    facts = json.loads((loaded.path("export", "dskd", "manifest.json")).read_text())["facts"]
    update_manifest(loaded.path("export", "dskd"), facts=facts | {"mlflow_run_id": tracker.run_id})
    return path


@pytest.fixture(scope="module")
def measured(config, world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(config.parent / "cache"))
        run_lexical(load_config(config), world)
    return load_config(config)


def test_every_model_has_every_measure_and_its_chance(measured):
    for name in MODELS:
        summary = load_summary(measured, name)
        assert {"sense_separation", "sense_separation_pooled", "sense_retrieval_rank_target", "wic_auc"} < set(summary)
        assert {"row_agreement", "sense_alignment", "lexical_perplexity"} < set(summary)
        for one in summary.values():
            assert one["items"] >= one["clusters"] > 0
            assert one["chance"] > 0
        table = read_examples(measured.path("lexical", name, "examples.parquet").read_bytes())
        values = table.values()
        assert values == {measure: pytest.approx(summary[measure]["value"]) for measure in values}
        items = pq.read_table(measured.path("lexical", name, "items.parquet")).to_pylist()
        assert len({(item["measure"], item["item"]) for item in items}) == len(items)
    assert load_summary(measured, "teacher")["row_agreement"]["value"] > 0.999


@pytest.mark.parametrize(("name", "folder"), [("student", "student"), ("dskd", "export/dskd")])
def test_row_agreement_is_that_of_brute_force(measured, tmp_path, name, folder):
    tensors = load_file(measured.path("senses", "senses.safetensors"))
    vectors, offsets = tensors["vectors"].double(), tensors["entry_offsets"]
    models = [
        AutoModelForCausalLM.from_pretrained(measured.path(place), dtype=torch.float32) for place in ("teacher", folder)
    ]
    end = AutoTokenizer.from_pretrained(measured.path("teacher")).eos_token_id
    agree, chances = [], []
    for sample in open_dataset(measured.path("shards", "validation"), tmp_path / "cache"):
        ids = torch.tensor(sample["input_ids"]).long()
        with torch.no_grad():
            (_, teacher, has_target), (_, student, _) = (run_apart(model, ids.unsqueeze(0), end) for model in models)
        for position in has_target.nonzero().squeeze(-1).tolist():
            start, stop = offsets[ids[position + 1]], offsets[ids[position + 1] + 1]
            if stop - start > 1:
                nearest = [
                    int((vectors[start:stop] - s[position].double()).norm(dim=-1).argmin()) for s in (teacher, student)
                ]
                agree.append(nearest[0] == nearest[1])
                chances.append(1 / int(stop - start))
    found = load_summary(measured, name)["row_agreement"]
    assert found["items"] == len(agree) > 300
    assert found["chance"] == pytest.approx(np.mean(chances))
    assert found["value"] == pytest.approx(np.mean(agree), abs=0.01)  # near ties may turn
    assert 0.4 < found["value"] < 1
    evaluated = json.loads(measured.path("evaluation", name, "measures.json").read_text())
    assert load_summary(measured, name)["sense_alignment"]["value"] == pytest.approx(evaluated["sense_alignment"])
    assert load_summary(measured, name)["lexical_perplexity"]["value"] == evaluated["lexical_perplexity"]


def test_lexical_measures_are_logged_to_the_tracked_run(measured):
    manifest = json.loads(measured.path("export", "dskd", "manifest.json").read_text())
    run_id, step = manifest["facts"]["mlflow_run_id"], manifest["facts"]["step"]
    run, summary = read_run(measured, run_id), load_summary(measured, "dskd")
    assert {name: run.metrics[f"lexical/{name}"] for name in summary} == {n: one["value"] for n, one in summary.items()}
    assert read_history(measured, run_id, "lexical/row_agreement") == [(step, summary["row_agreement"]["value"])]
    content = read_artifact(measured, run_id, "lexical/examples.parquet")
    assert content == measured.path("lexical", "dskd", "examples.parquet").read_bytes()
    assert run.tags["lexical_data"] == read_examples(content).data


def test_results_that_are_up_to_date_are_kept_and_unknown_models_are_refused(config, measured, world, capsys):
    run_lexical(load_config(config, ["evaluation.batch_size=7"]), world, ["student", "teacher"])
    printed = capsys.readouterr().err
    assert printed.count("up to date: ") == 2  # the evaluation too
    assert "== lexical" not in printed
    header, *rows = printed[printed.index("measure ") :].splitlines()
    assert header.split() == ["measure", "items", "chance", "surface", "student", "teacher"]
    assert any(row.startswith("sense separation ") and "0.500" in row for row in rows)
    with pytest.raises(UserError, match="--models nobody: there is no such model here, only teacher, student, dskd"):
        run_lexical(load_config(config), world, ["nobody"])


def test_a_threshold_file_with_the_measured_pairs_is_refused(config, measured, world):
    data = config.parent / "dev.data.txt"
    other = config.parent / "train.data.txt"
    other.write_bytes(data.read_bytes().replace(b"\n", b"\r\n"))
    shutil.copyfile(config.parent / "dev.gold.txt", config.parent / "train.gold.txt")
    with pytest.raises(UserError, match=r"evaluation.wic_threshold: .*train.data.txt has the pairs of evaluation.wic"):
        run_lexical(load_config(config, [f"evaluation.wic_threshold={other}"]), world)


def test_models_and_items_that_another_job_replaced_are_not_measured(config, measured, world, tmp_path, monkeypatch):
    work = shutil.copytree(measured.path(), tmp_path / "work", ignore=shutil.ignore_patterns("mlflow*", "mlart*"))
    loaded = load_config(config, [f"workdir={work}", "tracking.enabled=false"])
    with pytest.MonkeyPatch.context() as patch:
        replace_at_loading(patch, work / "student")
        with pytest.raises(OutageError, match="student: the model was replaced after the evaluation began"):
            run_lexical(loaded, world, ["student"], force=True)

    def build_then_lose(*arguments):
        manifest = build_items(*arguments)
        items = json.loads((work / "lexical_items" / "items.json").read_text())
        (work / "lexical_items" / "items.json").write_text(json.dumps({**items, "choices": []}))
        update_manifest(work / "lexical_items")
        return manifest

    monkeypatch.setattr("dskd.evaluation.lexical.run.build_items", build_then_lose)
    with pytest.raises(OutageError, match=r"items\.json: these are not the items that were made for this config"):
        run_lexical(loaded, world, ["teacher"], force=True)


@pytest.mark.slow
def test_two_ranks_with_a_sharded_model_and_other_batches_get_the_same_results(config, measured, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(
        measured.path(), work, ignore=shutil.ignore_patterns("lexical", "lexical_items", "mlflow*", "mlart*")
    )
    overrides = (f"workdir={work}", "teacher.mode=zero3", "evaluation.batch_size=3", "tracking.enabled=false")
    finished = run_program("evaluate.py", config, *overrides, "--lexical", "--models", "teacher", "dskd", ranks=2)
    assert finished.output.count("== lexical knowledge: teacher") == 1
    for name in ("teacher", "dskd"):
        one, two = load_summary(measured, name), load_summary(load_config(config, overrides), name)
        assert one.keys() == two.keys()
        for measure in one:
            for key in ("items", "clusters", "chance"):
                assert one[measure][key] == pytest.approx(two[measure][key]), (name, measure, key)
            assert one[measure]["value"] == pytest.approx(two[measure]["value"], rel=1e-3), (name, measure)
