"""Decoders of the table: numbers are those of transformers, and docs/models.md has the findings.

Some are examined here, on one rank, as `make models` examines all of them on two; the others by what needs no ranks.
"""

import pytest
import torch
from architecture_findings import CUT, LOWEST, examine_one, find_limits, reason_of
from architectures import ARCHITECTURES, random_model
from models_page import PAGE, page, row, written_rows
from plans import check_plan
from rank_processes import ONE_RANK

from dskd.artifacts.manifest import write_json
from dskd.config import Config
from dskd.errors import UserError
from dskd.models.checks.architecture import check_architecture
from dskd.models.checks.probes import check_documents
from dskd.models.files.folder import ModelFolder
from dskd.models.running.frozen import Decoder
from dskd.models.structure.base_model import base_model
from dskd.models.structure.causal_lm import empty_model
from dskd.models.structure.cut_config import cut_config
from dskd.models.structure.layers import check_kinds

pytestmark = pytest.mark.slow

# One for each way to be different that other tests of tests/models have not: layers of several kinds, positions,
# activations with parameters of their own, forms of experts.
EXAMINED = ["phi3-longrope", "gemma3", "opt", "apertus", "qwen3-moe-sparse", "gpt-oss", "llama4"]
PLANNED = [
    "gemma3",
    "gpt2",
    "apertus",
    "deepseek-v3",
    "qwen3-moe-sparse",
    "gpt-oss",
    "llama4",
    "llama-dynamic",
    "bloom",
]
PLANNED += ["gpt-neo", "mpt", "falcon-alibi", "xglm", "lfm2", "gemma2", "phi", "dbrx"]


@pytest.mark.parametrize("name", EXAMINED)
def test_numbers_are_those_of_transformers_and_the_page_says_what_is_supported(tmp_path, world, name):
    """On one rank; test_experts.py has the mixtures on two, whose tokens choose different experts."""
    finding = examine_one(name, tmp_path, world, thorough=False)
    assert finding["faults"] == []
    assert row(name, finding) == written_rows()[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_page_says_what_is_refused(tmp_path, name):
    written = written_rows()[name]
    model_config = ARCHITECTURES[name].config()
    folder = ModelFolder(tmp_path / "teacher", "")
    model_config.save_pretrained(folder.path)
    config = Config(workdir="work", teacher={"path": "teacher"}, corpus={"packing": "stream", "sequence_length": 16})
    try:
        whole = check_architecture(folder, config.corpus)
    except UserError as error:
        assert written == row(name, {"refused": reason_of(error, tmp_path)})
        return
    teacher, cut, documents = written.split(" | ")[1:4]
    limits = find_limits(folder)
    assert teacher == ("in short sequences" if limits["stream limit"] else "yes")
    for key, limit in limits.items():
        if limit and not (key == "documents limit" and documents == "no"):
            assert limit.partition("; set corpus.")[0] in written
    refused = []
    for layers in (LOWEST, CUT):
        (tmp_path / "student").mkdir(exist_ok=True)
        try:
            values = cut_config(model_config.to_dict(), layers, folder.load_config().to_dict())
            write_json(tmp_path / "student" / "config.json", values)
            check_kinds(whole, empty_model(ModelFolder(tmp_path / "student", "")), layers)
        except UserError:
            refused.append(layers)
    assert cut == ("some layers" if refused else "yes")

    decoder = Decoder(base_model(random_model(name)))
    try:
        check_documents(decoder, decoder, folder, ONE_RANK, torch.float32)
    except UserError:
        assert documents == "no"
    else:
        assert documents == ("in short sequences" if limits["documents limit"] else "yes")


def test_the_text_of_the_page_is_the_generators():
    written = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if not line.startswith("| ")]
    assert written == [line for line in page({}).splitlines() if not line.startswith("| ")]


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_refuses_what_training_refuses_and_raises_nothing_else(tmp_path, name):
    teacher = written_rows()[name].split(" | ")[1]
    is_refused = teacher == "no"
    assert check_plan(tmp_path, name, is_refused=is_refused) is None
