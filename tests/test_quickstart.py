"""The quickstart's configuration with its real model, on a few sequences."""

import contextlib
import functools
import io
import re
import shutil

import pytest
import torch
from real_model import find_real_model, needs_real_model
from repository import REPOSITORY
from safetensors.torch import load_file
from tiny_work import NO_RUNS, launch_forked
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd import pipeline
from dskd.artifacts.lock import release_lock

CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
RUNS = ("kd", "kd-tuned", "dskd")


@pytest.mark.slow
@needs_real_model
def test_the_quickstart_distils_a_real_model(tmp_path, no_runs, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    shutil.copyfile(no_runs, work / NO_RUNS)
    monkeypatch.setattr(pipeline, "launch", functools.partial(launch_forked, ranks=1))
    monkeypatch.setattr("dskd.distributed.stopping.listen", lambda: None)  # pytest handles signals to this process
    overrides = [
        f"workdir={work}",
        f"teacher.path={find_real_model()}",
        "corpus.max_sequences=32",
        "corpus.max_validation_sequences=4",
        "evaluation.samples=1",
        "evaluation.sample_tokens=4",
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        pipeline.run_pipeline(CONFIG, overrides)
    release_lock(work / pipeline.LOCK)

    perplexity = {
        name: float(re.search(rf"^{name}  +([\d,.]+)", printed.getvalue(), re.MULTILINE)[1].replace(",", ""))
        for name in ("teacher", "student before training", *RUNS)
    }
    assert perplexity["teacher"] < 2000  # on text that is foreign to it; chance is 49,152
    assert all(perplexity[run] < perplexity["student before training"] / 50 for run in RUNS)
    teacher = load_file(work / "teacher" / "model.safetensors")
    for run in RUNS:
        folder = work / "export" / run
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for name, tensor in student.items():
            layer = re.search(r"layers\.(\d+)", name)
            is_trained = layer is not None and int(layer[1]) >= 12
            if is_trained:  # the last three of 30
                name = name.replace(layer[0], f"layers.{int(layer[1]) + 15}")
            if name in teacher:  # which has no head of its own: it is tied to the embeddings
                assert torch.equal(tensor, teacher[name]) != is_trained, name
        assert AutoTokenizer.from_pretrained(folder).chat_template
    with contextlib.redirect_stderr(io.StringIO()) as said:
        pipeline.run_pipeline(CONFIG, overrides)
    release_lock(work / pipeline.LOCK)
    assert "== " not in said.getvalue()
    assert "up to date: teacher, lexicon, corpus" in said.getvalue()
