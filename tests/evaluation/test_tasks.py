"""Benchmarks on ranks: answers are what transformers generates, and the measures follow from them."""

import json
import runpy
import shutil
import sys

import pyarrow.parquet as pq
import pytest
import torch
from artifact_folders import replace_at_loading
from config_files import write_config
from rank_processes import run_program
from repository import REPOSITORY
from task_files import DATA, PLACES
from tiny_models import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.artifacts.building import build_artifact
from dskd.artifacts.manifest import Recipe, read_manifest
from dskd.config import TASKS, Config
from dskd.config.reading import load_config
from dskd.corpus.tasks.benchmarks import BENCHMARKS
from dskd.corpus.tasks.prompts import Prompter
from dskd.errors import OutageError, UserError
from dskd.evaluation.models import EvaluatedModel
from dskd.evaluation.task_questions import load_task
from dskd.evaluation.tasks import check_prompts, run_tasks
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.students.student import build_student
from dskd.tracking import Start, read_artifact, read_history, read_run, start_tracking

ANSWER_WORDS = ["A", "B", "C", "D", "E", "0", "1", "seven", "lake", "the", "No", "answer"]
MODELS = ("teacher", "student")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The config of a teacher that answers with letters, and of its student."""
    folder = tmp_path_factory.mktemp("tasks")
    files = [path.read_text() for path in sorted(DATA.rglob("*")) if path.is_file()]
    marks = ["Question:", "Answer:", "Goal:", "Passage:", "A.", "B.", "C.", "D.", "E.", "0.", "1."]
    words = list(dict.fromkeys([*ANSWER_WORDS, *marks, *"".join(files).split()]))
    model = save_model(folder / "model", words=words[:98])
    known = [2 + words.index(word) for word in ANSWER_WORDS]
    with torch.no_grad():  # its answers can be right, and some end early
        model.lm_head.weight.mul_(0.3)
        model.lm_head.weight[known] *= 8
        model.lm_head.weight[0] *= 6
    model.save_pretrained(folder / "model")
    _change_model(folder / "model", max_position_embeddings=160)
    path = folder / "config.yaml"
    settings = {
        "workdir": str(folder / "work"),
        "precision": "fp32",
        "teacher": {"path": str(folder / "model"), "mode": "resident"},
        "student": {"layers": 2, "train_layers": 1},
        "tasks": {**PLACES, "choice_shots": 2, "batch_size": 2},
    }
    write_config(path, settings)
    build_student(load_config(path))
    return path


def _change_model(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def results(config, world):
    """{(model, task): rows of the table, measures}, from one rank."""
    run_tasks(load_config(config), world, ["all"])
    return _results(load_config(config))


def _results(config):
    results = {}
    for model in MODELS:
        for task in BENCHMARKS:
            folder = config.path("tasks", model, task)
            rows = pq.read_table(folder / "examples.parquet").to_pylist()
            results[model, task] = rows, json.loads((folder / "measures.json").read_text())
    return results


def test_answers_are_what_transformers_generates_for_each_prompt_alone(config, results):
    loaded = load_config(config)
    for model, task in results:
        folder = loaded.path("student") if model == "student" else loaded.teacher.path
        causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        questions = load_task(loaded, BENCHMARKS[task]).questions
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompter = Prompter(tokenizer)
        new_tokens = 10 if task == "squad_v2" else 2
        rows, _ = results[model, task]
        assert len(rows) == len(questions)
        for row, question in zip(rows, questions, strict=True):
            prompt = prompter.prompt(question, 160 - new_tokens)
            ids = torch.tensor([prompt.input_ids])
            output = causal_lm.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=0, pad_token_id=0)
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert (row["example"], row["generated"]) == (question.example.name, text)
            assert (row["prompt_sha256"], row["prompt_tokens"]) == (prompt.sha256, len(prompt.input_ids))
            assert (row["shots"], row["is_cut"], row["gold"]) == (
                prompt.num_shots,
                False,
                list(question.example.answers),
            )


def test_measures_follow_from_the_table_of_examples(results):
    scores = []
    for (_, task), (rows, measures) in results.items():
        scores += [row["score"] for row in rows]
        if task == "squad_v2":
            assert measures["metric"] == "f1"
        else:
            assert [row["score"] for row in rows] == [float(row["answer"] in row["gold"]) for row in rows]
        by_subject = {}
        for row in rows:
            by_subject.setdefault(row["subject"], []).append(row["score"])
        assert len(by_subject) == (2 if task == "mmlu" else 1)
        expected = sum(sum(each) / len(each) for each in by_subject.values()) / len(by_subject)
        assert measures["score"] == pytest.approx(expected)
        weighted = sum(row["weighted_score"] for row in rows) / sum(row["weight"] for row in rows)
        assert weighted == pytest.approx(expected)
        assert measures["n"] == len(rows)
    assert 0 < sum(scores) < len(scores)  # some are right and some are wrong


def test_the_table_describes_how_its_columns_make_the_measure(config, results):
    loaded = load_config(config)
    file = loaded.path("tasks", "teacher", "mmlu", "examples.parquet")
    about = json.loads(pq.read_schema(file).metadata[b"dskd"])
    assert about["measures"][0]["name"] == "accuracy"
    assert (about["measures"][0]["total"], about["measures"][0]["count"]) == ("weighted_score", "weight")
    assert about["data"] == load_task(loaded, BENCHMARKS["mmlu"]).digest
    manifest = read_manifest(file.parent, "task", made_by="-")
    assert manifest.inputs["questions"] == about["data"]
    assert manifest.facts["questions"] == 5


def test_results_that_are_up_to_date_are_not_computed_again(config, results, world, tmp_path, capsys):
    shutil.copytree(load_config(config).path(), tmp_path / "work")
    work = [f"workdir={tmp_path / 'work'}"]

    def stages_run(*overrides, tasks=("piqa",), **options):
        capsys.readouterr()
        run_tasks(load_config(config, [*work, *overrides]), world, tasks, **options)
        return [line.removeprefix("== ") for line in capsys.readouterr().err.splitlines() if line.startswith("== ")]

    both = ["piqa: teacher", "piqa: student"]
    assert stages_run(tasks=["all"]) == []
    assert stages_run(model_names=["student"], force=True) == ["piqa: student"]
    assert stages_run("tasks.batch_size=1") == []
    assert stages_run(force=True) == both
    assert stages_run("tasks.seed=1") == both
    assert stages_run("tasks.limit=2") == both
    assert stages_run("tasks.limit=2", "tasks.choice_tokens=1") == both
    data = shutil.copytree(DATA / "piqa", tmp_path / "piqa")
    assert stages_run("tasks.limit=2", "tasks.choice_tokens=1", f"tasks.piqa={data}") == []
    (data / "valid-labels.lst").write_text("1\n1\n1\n1\n")
    assert stages_run("tasks.limit=2", "tasks.choice_tokens=1", f"tasks.piqa={data}") == both
    rows = pq.read_table(tmp_path / "work" / "tasks" / "teacher" / "piqa" / "examples.parquet").to_pylist()
    assert [row["gold"] for row in rows] == [["1"], ["1"]]


def test_a_model_replaced_before_its_turn_gets_no_benchmark_results(config, results, world, tmp_path, monkeypatch):
    shutil.copytree(load_config(config).path(), tmp_path / "work")
    replace_at_loading(monkeypatch, tmp_path / "work" / "student")
    with pytest.raises(OutageError, match="student: the model was replaced after the evaluation began"):
        run_tasks(load_config(config, [f"workdir={tmp_path / 'work'}"]), world, ["piqa"], force=True)


def test_scores_are_logged_to_the_tracked_run(config, results, world, tmp_path, no_runs):
    """The export of a run is evaluated too; here it has the student's weights, so its answers are the same."""
    shutil.copytree(load_config(config).path(), tmp_path / "work")
    shutil.copyfile(no_runs, tmp_path / "work" / "mlflow.db")
    loaded = load_config(config, [f"workdir={tmp_path / 'work'}"])
    tracker = start_tracking(loaded, world, tags={}, start=Start())
    tracker.finish("FINISHED")
    with build_artifact(
        loaded.path("export", "dskd"), Recipe("export", teacher=find_teacher(loaded).digest)
    ) as building:
        for file in loaded.path("student").iterdir():
            if file.name != "manifest.json":
                shutil.copyfile(file, building.folder / file.name)
        building.facts.update(mlflow_run_id=tracker.run_id, step=7, run="dskd")
    run_tasks(loaded, world, ["piqa"])
    measures = json.loads(loaded.path("tasks", "dskd", "piqa", "measures.json").read_text())
    assert measures == results["student", "piqa"][1]
    run = read_run(loaded, tracker.run_id)
    assert {name: value for name, value in run.metrics.items() if name.startswith("tasks/")} == {
        "tasks/piqa/accuracy": measures["score"],
        "tasks/piqa/standard_error": measures["standard_error"],
        "tasks/piqa/chance": 0.5,
    }
    assert read_history(loaded, tracker.run_id, "tasks/piqa/accuracy") == [(7, measures["score"])]
    assert run.tags["tasks_piqa_data"] == load_task(loaded, BENCHMARKS["piqa"]).digest
    content = read_artifact(loaded, tracker.run_id, "tasks/piqa/examples.parquet")
    assert content == loaded.path("tasks", "dskd", "piqa", "examples.parquet").read_bytes()


def test_a_limit_draws_examples_of_each_subject(config):
    whole = load_task(load_config(config), BENCHMARKS["mmlu"]).questions
    drawn = [
        load_task(load_config(config, ["tasks.limit=2", f"tasks.seed={seed}"]), BENCHMARKS["mmlu"]) for seed in range(9)
    ]
    names = [[question.example.name for question in task.questions] for task in drawn]
    for each in names:
        assert each == [question.example.name for question in whole if question.example.name in each]
        assert [name.split(":")[0] for name in each] == ["old towns"] * 2 + ["plain sums"] * 2
    assert len(set(map(tuple, names))) == 3  # 2 of 3 of the second subject


def test_prompts_that_do_not_fit_are_counted(config, results, world, tmp_path, capsys):
    shutil.copytree(load_config(config).path(), tmp_path / "work")
    shutil.copytree(load_config(config).teacher.path, tmp_path / "model")
    _change_model(tmp_path / "model", max_position_embeddings=48)
    overrides = [f"workdir={tmp_path / 'work'}", f"teacher.path={tmp_path / 'model'}", "corpus.sequence_length=32"]
    loaded = load_config(config, overrides)
    build_student(loaded)
    run_tasks(loaded, world, ["arc_challenge", "squad_v2"])
    assert "prompts show fewer examples than they should" in capsys.readouterr().err
    for model, task in ((m, t) for m in MODELS for t in ("arc_challenge", "squad_v2")):
        rows = pq.read_table(loaded.path("tasks", model, task, "examples.parquet")).to_pylist()
        new_tokens = 10 if task == "squad_v2" else 2
        assert max(row["prompt_tokens"] for row in rows) + new_tokens <= 48
        facts = read_manifest(loaded.path("tasks", model, task), "task", made_by="-").facts
        assert facts["fewer_shots"] == sum(row["shots"] < (1 if task == "squad_v2" else 2) for row in rows) > 0
        assert facts["cut"] == sum(row["is_cut"] for row in rows)


def test_data_that_is_missing_is_named_before_a_model_is_loaded(config, world, monkeypatch):
    monkeypatch.setattr("dskd.evaluation.suite.load_candidate", None)
    with pytest.raises(UserError, match=r"tasks.mmlu: .*arc has neither test/\*_test.csv, as published"):
        run_tasks(load_config(config, [f"tasks.mmlu={DATA / 'arc'}"]), world, ["all"])
    with pytest.raises(
        UserError, match=r"--models dskd: there is no such model here, only .*, student; .* `dskd export --config"
    ):
        run_tasks(load_config(config), world, ["piqa"], ["dskd"])


def test_a_prompt_with_a_token_that_the_model_lacks_is_refused(tmp_path):
    save_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    size = ModelFolder(tmp_path, "").load_config().vocab_size
    tokenizer.add_tokens([f"more{number}" for number in range(size - len(tokenizer))])
    loaded = Config(workdir=str(tmp_path), teacher={"path": "x"}, tasks={**PLACES, "choice_shots": 2})
    task = load_task(loaded, BENCHMARKS["piqa"])
    candidate = EvaluatedModel("teacher", ModelFolder(tmp_path, ""))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <|im_end|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    check_prompts(loaded, candidate, Prompter(tokenizer), [task])
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"tasks.piqa: the prompt of .*has the token '<\|im_end\|>', whose id is {size},"
    ):
        check_prompts(loaded, candidate, Prompter(tokenizer), [task])


@pytest.mark.slow
def test_two_ranks_with_a_sharded_model_and_other_batches_get_the_same_results(config, results, tmp_path):
    """With 7 batches, one of 2 ranks has no questions in the last turn, and must take part all the same."""
    shutil.copytree(load_config(config).path("student"), tmp_path / "work" / "student")
    overrides = (f"workdir={tmp_path / 'work'}", "teacher.mode=zero3", "tasks.batch_size=3")
    finished = run_program("evaluate.py", config, "--tasks", "all", *overrides, ranks=2)
    assert (
        finished.output.count("left out, because there is no export yet: dskd; when dskd is trained, export it with")
        == 1
    )
    assert finished.output.count("== arc_challenge: teacher") == 1
    assert "tokens/s" in finished.output
    assert _results(load_config(config, overrides)) == results
    # The benchmarks that the config names: all of them, and their results are up to date.
    evaluate = f"tasks.evaluate=[{', '.join(TASKS)}]"
    again = run_program("evaluate.py", config, "--tasks", *overrides, evaluate, ranks=1)
    assert again.output.count("up to date: ") == 1
    refused = run_program("evaluate.py", config, "--tasks", "piqa", "run=nosuch", *overrides, ranks=2, check=False)
    assert refused.exit_code == 2
    assert refused.output.count("error: run=nosuch: ") == 1
    assert "`dskd export --config FILE run=nosuch`" in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc"], "invalid choice: 'arc' (choose from arc_challenge, "),
        (["--tasks", "piqa", "--models"], "argument --models: expected at least one argument"),
        (["--tasks", "--models", "seed=2"], "argument --models: expected at least one name, found only overrides"),
        (["--tasks", "piqa", "--lexical"], "not allowed with argument --tasks"),
        (["--models", "teacher"], "--models needs --lexical or --tasks"),
    ],
)
def test_contradictory_arguments_are_refused_before_work_begins(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", "no-such-file.yaml", *arguments])
    with pytest.raises(SystemExit) as exit_of_program:
        runpy.run_path(str(REPOSITORY / "launcher" / "evaluate.py"), run_name="__main__")
    assert exit_of_program.value.code == 2
    assert message in capsys.readouterr().err
