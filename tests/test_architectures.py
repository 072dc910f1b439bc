"""Every decoder of the table: numbers are those of transformers, and docs/models.md says what was found."""

import json

import pytest
from architecture_findings import find
from architectures import ARCHITECTURES
from models_page import PAGE, row

from dskd.config import Config
from dskd.errors import UserError
from dskd.plan import GB
from dskd.plan.cluster import Cluster
from dskd.plan.plan import make_plan
from dskd.plan.shapes import find_architecture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def findings():
    return find(list(ARCHITECTURES), thorough=False, timeout_s=500)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_numbers_are_those_of_transformers_and_the_page_says_what_is_supported(findings, name):
    assert findings[name]["faults"] == []
    assert row(name, findings[name]) in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plan_refuses_what_training_refuses_and_raises_nothing_else(tmp_path, findings, name):
    ARCHITECTURES[name].config().save_pretrained(tmp_path)
    config = Config(
        workdir=str(tmp_path / "work"),
        teacher={"path": str(tmp_path)},
        student={"layers": 2, "train_layers": 1},
        corpus={"packing": "stream", "sequence_length": 16},
    )
    machine = Cluster(1, 1, 80 * GB, 500 * GB, "cpu", 40 * GB, 25 * GB, 5 * GB, 1e14)
    try:
        plan = make_plan(config, machine, find_architecture(config, None))
    except UserError as error:
        assert findings[name]["refused"] or "cannot be planned" in str(error) or findings[name]["cut"]
    else:
        assert plan.fits and not findings[name]["refused"]
        parameters = json.loads((tmp_path / "config.json").read_text())
        assert plan.teacher.numel > 0 and parameters
