"""The choice of the runs that `dskd compare` compares, and what it refuses."""

import re
import shutil

import pytest
from compared_runs import DATA, EXPERIMENT, OTHER, OTHER_DATA, STEPS, examples_of

from dskd.cli.results import compare_or_explain
from dskd.compare.choosing import Selection
from dskd.compare.comparison import make_comparison
from dskd.config.reading import load_config
from dskd.evaluation.evaluations import EVALUATIONS
from dskd.evaluation.held_out_text import EXAMPLES_FILE
from dskd.evaluation.scores_by_example import save_examples
from dskd.tracking import log_results

pytestmark = pytest.mark.slow


def test_runs_evaluated_on_different_data_are_refused(tracked, dskd):
    path, ids = tracked
    both = ("compare", "--config", path, "--experiment", EXPERIMENT, "--experiment", OTHER)
    code, out, err = dskd(*both)
    assert code == 2
    assert not out
    assert re.search(rf"^  {DATA}: kd-s0 \({ids['kd-s0'][:8]}\), ", err, re.MULTILINE)
    assert re.search(rf"^  {OTHER_DATA}: far \({ids['far'][:8]}\)$", err, re.MULTILINE)
    assert "launcher/evaluate.py" in err
    assert "Traceback" not in err

    code, out, _ = dskd(*both, "--without-measures")
    assert code == 0
    assert re.search(r"^GPU hours a run +- +- +- +0\.8$", out, re.MULTILINE)
    assert "perplexity" not in out

    code, out, _ = dskd(*both, "--tag", f"evaluation_data={OTHER_DATA}")
    assert code == 0
    assert f"evaluated on {OTHER_DATA}" in out
    assert "kd-s0" not in out


def test_the_pipeline_reports_different_data_and_does_not_fail(tracked):
    config = load_config(tracked[0], [f"tracking.experiment={OTHER}", "run=far"])
    assert "far" in compare_or_explain(config)
    _log_table(config, tracked[1]["far"], DATA)  # under another digest: the one is not the other
    text = compare_or_explain(config)
    _log_table(config, tracked[1]["far"], OTHER_DATA)
    assert text.startswith("Not compared: ")
    assert DATA in text
    assert OTHER_DATA in text


def _log_table(config, run_id, data):
    table = config.path(EXAMPLES_FILE)
    save_examples(table, examples_of(0, 30, data))
    log_results(config, "far", run_id, "evaluation", {}, table, data=OTHER_DATA, step=STEPS)


def test_runs_are_chosen_by_name_id_experiment_and_tag(tracked):
    path, ids = tracked
    config = load_config(path)

    def names(**selection):
        return [run.name for run in make_comparison(config, Selection(**selection), without=list(EVALUATIONS)).runs]

    assert names(runs=["dskd-s1", "kd-s0"]) == ["dskd-s1", "kd-s0"]
    assert names(runs=[ids["far"], "margin"]) == ["far", "margin"]
    assert names(experiments=[OTHER]) == ["far"]
    assert sorted(names(tags={"evaluation_data": DATA})) == ["dskd-s0", "dskd-s1", "kd-s0", "kd-s1"]
    assert "sweep" not in names(experiments=[EXPERIMENT])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--run", "dskd-s7"],
            "--run dskd-s7: experiment senses & <b>words</b> has no run of this name; did you mean dskd-s",
        ),
        (["--run", "0" * 32], f"--run {'0' * 32}: no run has this id"),
        (["--experiment", "kdd"], "experiment 'kdd': MLflow at sqlite:"),
        (["--tag", "device=tpu"], "has the tags device=tpu; there are device=cpu"),
        (["--baseline", "kdd"], "--baseline kdd: there is no such group; the groups are: kd, dskd, margin"),
        (["--html", "/proc/report.html"], "--html /proc/report.html: cannot write there"),
        (
            ["tracking.uri=http://127.0.0.1:9"],
            "http://127.0.0.1:9 cannot be read (Connection refused); start its server",
        ),
        (["--html", ""], "--html '.': that is a folder; name a file"),
        (["--html", "/tmp"], "--html '/tmp': that is a folder; name a file"),
        (["--tag", "device=cpu", "--tag", "device=cuda"], "--tag device=cuda contradicts --tag device=cpu"),
        (["--experiment", EXPERIMENT, "--run", "FAR"], "'far' is in experiment 'other', but --experiment names only"),
    ],
)
def test_an_impossible_choice_is_refused_with_the_possible_ones(tracked, dskd, arguments, message):
    path, ids = tracked
    code, _, err = dskd("compare", "--config", path, *(ids["far"] if one == "FAR" else one for one in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_read_only_work_directory_is_compared_and_left_unchanged(dskd, tracked, tmp_path, read_only):
    work = tmp_path / "work"
    shutil.copytree(load_config(tracked[0]).path(), work)
    (work / "curves.png").unlink(missing_ok=True)
    kept = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    read_only(work)
    arguments = ("compare", "--config", tracked[0], f"workdir={work}", "--html", tmp_path / "report.html")
    code, out, err = dskd(*arguments)
    assert (code, err) == (0, "")
    _, expected, _ = dskd("compare", "--config", tracked[0])
    # Everything before the paths of the picture and of MLflow's database.
    assert expected.split("Loss curves: ")[0] in out
    assert f"No picture of the loss curves: {work / 'curves.png'}: the picture cannot be written there" in out
    assert (tmp_path / "report.html").is_file()
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == kept
