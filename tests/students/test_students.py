"""Students that are not cut from the teacher: what is written, from which recipe, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from config_files import write_config
from tiny_models import SHAPE, save_model, word_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dskd.artifacts.manifest import is_current, read_manifest
from dskd.config import Config, NewStudentConfig
from dskd.errors import UserError
from dskd.models.files.folder import _local_or_hub, find_teacher
from dskd.pipeline import run_pipeline
from dskd.students.new import config_values, num_parameters
from dskd.students.student import build_student, find_student, recipe, require_configured_student

WORDS = [f"w{index}" for index in range(100)]
SIZES = {"layers": 2, "hidden_size": 16, "heads": 2}


@pytest.fixture
def teacher(tmp_path):
    save_model(tmp_path / "teacher")


def _config(tmp_path, **changes):
    settings = {
        "workdir": str(tmp_path / "work"),
        "teacher": {"path": str(tmp_path / "teacher")},
        "student": {"path": str(tmp_path / "pretrained")},
        "corpus": {"sequence_length": 48},
    }
    return Config(**(settings | changes))


def _save_pretrained(folder, *, words=WORDS, **sizes):
    """Writes a tied Qwen 2 that is narrower than the teacher, and has more rows of padding."""
    torch.manual_seed(1)
    values = {**SHAPE, "hidden_size": 24, "num_hidden_layers": 3, "vocab_size": 128, "tie_word_embeddings": True}
    model = Qwen2ForCausalLM(Qwen2Config(**(values | sizes))).eval()
    model.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return model


@pytest.mark.usefixtures("teacher")
def test_a_pretrained_student_is_a_copy_that_stays_when_the_model_changes(tmp_path):
    model, config = _save_pretrained(tmp_path / "pretrained"), _config(tmp_path)
    (tmp_path / "pretrained" / "chat_template.jinja").write_text("own")
    values = json.loads((tmp_path / "pretrained" / "config.json").read_text())
    (tmp_path / "pretrained" / "config.json").write_text(json.dumps({**values, "_name_or_path": "/home/me/model"}))
    build_student(config)
    shutil.rmtree(tmp_path / "pretrained")
    student = find_student(config)
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(student.path)(ids).logits, model(ids).logits)
    assert "_name_or_path" not in json.loads((student.path / "config.json").read_text())
    assert student.tokenizer("w3 w99")["input_ids"] == word_tokenizer(WORDS)("w3 w99")["input_ids"]
    assert (student.path / "chat_template.jinja").read_text() == "own"
    manifest = read_manifest(student.path, "student")
    assert manifest.facts["origin"] == "path"
    assert manifest.facts["path"] == str(tmp_path / "pretrained")
    assert "layers" not in manifest.facts
    assert manifest.teacher == find_teacher(config).digest


@pytest.mark.usefixtures("teacher")
def test_the_recipe_follows_the_model_and_not_its_place(tmp_path):
    _save_pretrained(tmp_path / "pretrained")
    config = _config(tmp_path)
    build_student(config)
    shutil.move(tmp_path / "pretrained", tmp_path / "moved")
    moved = _config(tmp_path, student={"path": str(tmp_path / "moved"), "train_layers": 1})
    found = find_teacher(moved)
    assert is_current(moved.path("student"), recipe(moved, found))
    require_configured_student(moved, found, find_student(moved))
    _save_pretrained(tmp_path / "moved", num_hidden_layers=2)
    assert not is_current(moved.path("student"), recipe(moved, found))
    with pytest.raises(UserError, match=rf"is a copy of {tmp_path}/pretrained, but student.path is {tmp_path}/moved"):
        require_configured_student(moved, found, find_student(moved))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub in which one model has two revisions: `main` with 3 layers, and the tag `v1` with 2."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--some--model"
    (model / "refs").mkdir(parents=True)
    for revision, commit, layers in (("main", "a" * 40, 3), ("v1", "b" * 40, 2)):
        (model / "refs" / revision).write_text(commit)
        _save_pretrained(model / "snapshots" / commit, num_hidden_layers=layers)
    yield model
    _local_or_hub.cache_clear()


@pytest.mark.parametrize(("revision", "layers"), [(None, 3), ("main", 3), ("v1", 2), ("b" * 40, 2)])
@pytest.mark.usefixtures("teacher")
def test_a_student_of_the_hub_is_the_revision_that_the_config_names(tmp_path, hub, revision, layers):
    config = _config(tmp_path, student={"path": "some/model", "revision": revision})
    build_student(config)
    assert find_student(config).load_config().num_hidden_layers == layers
    facts = read_manifest(config.path("student"), "student").facts
    assert (facts["path"], facts["revision"]) == ("some/model", revision)
    assert facts["folder"] == str(hub / "snapshots" / (("a" if layers == 3 else "b") * 40))
    teacher = find_teacher(config)
    assert is_current(config.path("student"), recipe(config, teacher))
    same, other = ("main", "v1") if layers == 3 else ("v1", "main")
    same, other = (_config(tmp_path, student={"path": "some/model", "revision": name}) for name in (same, other))
    require_configured_student(same, teacher, find_student(config))
    assert not is_current(other.path("student"), recipe(other, teacher))
    copied, named = ("" if name is None else rf" \({name}\)" for name in (revision, other.student.revision))
    with pytest.raises(
        UserError, match=f"a copy of some/model{copied}, but student.path is some/model{named}, another"
    ):
        require_configured_student(other, teacher, find_student(config))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            {"path": "some/other"},
            r"student\.path: 'some/other' is not a folder here, and cannot be fetched from the Hub",
        ),
        (
            {"path": "some/model", "revision": "v2"},
            r"student\.path: 'some/model' \(student\.revision: v2\) is not a folder here, and cannot be fetched",
        ),
    ],
)
@pytest.mark.usefixtures("teacher", "hub")
def test_a_student_that_the_hub_does_not_have_is_refused(tmp_path, student, message):
    with pytest.raises(UserError, match=message):
        build_student(_config(tmp_path, student=student))
    assert not (tmp_path / "work" / "student").exists()


def _swap_words(folder):
    word_tokenizer(["w1", "w0", *WORDS[2:]]).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap_words, r"student\.path: the tokenizer in .*pretrained is not that of the teacher, .*teacher: the token "
         r"with id 2 is 'w0' in the teacher's, and 'w1' in the student's"),
        (lambda folder: _save_pretrained(folder, vocab_size=101), r"has 101 tokens .*, 0 to 100, and texts of the "
         "teacher can have 102"),
        (lambda folder: _save_pretrained(folder, max_position_embeddings=32), r"48 is more than the 32 positions"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"student\.path: .* there are no weights"),
        (shutil.rmtree, r"student\.path: there is no folder .*pretrained"),
    ],
    ids=["tokenizer", "fewer tokens", "fewer positions", "no weights", "no folder"],
)  # fmt: skip
@pytest.mark.usefixtures("teacher")
def test_an_unsuitable_student_is_refused_and_nothing_is_written(tmp_path, change, message):
    _save_pretrained(tmp_path / "pretrained")
    change(tmp_path / "pretrained")
    with pytest.raises(UserError, match=f"(?s){message}"):
        build_student(_config(tmp_path))
    assert not (tmp_path / "work" / "student").exists()
    assert not [*(tmp_path / "work").glob(".student.partial*")]


@pytest.mark.usefixtures("teacher")
def test_a_gguf_file_is_not_a_student(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"student.path: .*x.gguf is a GGUF file, which only teacher.path can name"):
        build_student(_config(tmp_path, student={"path": str(tmp_path / "x.gguf")}))


@pytest.mark.usefixtures("teacher")
def test_the_code_of_a_student_does_not_run_even_if_the_teachers_may(tmp_path):
    _save_pretrained(tmp_path / "pretrained")
    file = tmp_path / "pretrained" / "config.json"
    values = json.loads(file.read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    file.write_text(json.dumps(values))
    (file.parent / "own.py").write_text("raise SystemExit('it ran')")
    teacher = {"path": str(tmp_path / "teacher"), "trust_remote_code": True}
    with pytest.raises(UserError, match=r"student\.path: .* brings its own code, which runs for teachers only"):
        build_student(_config(tmp_path, teacher=teacher))


@pytest.mark.usefixtures("teacher")
def test_the_tokenizers_code_of_a_student_is_refused_without_naming_a_key_that_would_not_help(tmp_path):
    _save_pretrained(tmp_path / "pretrained")
    file = tmp_path / "pretrained" / "tokenizer_config.json"
    values = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    file.write_text(json.dumps(values))
    (file.parent / "own.py").write_text("raise SystemExit('it ran')")
    teacher = {"path": str(tmp_path / "teacher"), "trust_remote_code": True}
    with pytest.raises(UserError, match="it brings its own code, which runs for teachers only; name another student"):
        build_student(_config(tmp_path, teacher=teacher))


@pytest.mark.usefixtures("teacher")
def test_a_new_student_is_a_function_of_its_sizes_and_the_seed(tmp_path):
    def weights(seed, **sizes):
        config = _config(tmp_path, student={"from_config": {**SIZES, **sizes}}, seed=seed)
        before = torch.random.get_rng_state()
        build_student(config)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert is_current(config.path("student"), recipe(config, find_teacher(config)))
        return (config.path("student") / "model.safetensors").read_bytes()

    one = weights(1)
    assert weights(1) == one != weights(2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "student")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().padding_idx is None
    weights(1, kv_heads=1, intermediate_size=24, tie_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "student")
    assert model.model.layers[1].self_attn.k_proj.weight.shape == (8, 16)
    assert model.model.layers[1].mlp.up_proj.weight.shape == (24, 16)
    # The teacher's rows with their padding, and its tokenizer and positions.
    assert model.lm_head.weight.shape == (SHAPE["vocab_size"], 16)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.max_position_embeddings == SHAPE["max_position_embeddings"]
    config = _config(tmp_path, student={"from_config": SIZES})
    assert find_student(config).tokenizer_digest == find_teacher(config).tokenizer_digest


@pytest.mark.usefixtures("teacher")
def test_a_student_that_the_config_no_longer_names_is_refused(tmp_path):
    new = _config(tmp_path, student={"from_config": SIZES})
    build_student(new)
    found, student = find_teacher(new), find_student(new)
    require_configured_student(_config(tmp_path, student={"from_config": SIZES}, seed=5), found, student)
    with pytest.raises(
        UserError, match=r"student and config differ: hidden_size 16 and 32, intermediate_size 40 and 80"
    ):
        require_configured_student(
            _config(tmp_path, student={"from_config": {**SIZES, "hidden_size": 32}}), found, student
        )
    made = r"was made with random weights \(student\.from_config\), but the config wants one "
    for other, chosen in (({"layers": 2}, "cut from a teacher"), ({"path": "x"}, "copied from a pretrained model")):
        with pytest.raises(UserError, match=f"{made}{chosen}.*make it again with `dskd student"):
            require_configured_student(_config(tmp_path, student=other), found, student)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_parameters_of_a_new_student_are_counted_before_it_is_made(kv_heads, tie_embeddings):
    sizes = {"layers": 3, "hidden_size": 48, "heads": 4, "kv_heads": kv_heads, "tie_embeddings": tie_embeddings}
    values = config_values(NewStudentConfig(**sizes), 100, 64)
    model = LlamaForCausalLM(LlamaConfig(**values))
    assert num_parameters(values) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.usefixtures("teacher")
def test_a_new_student_that_has_no_room_is_refused_before_it_is_made(tmp_path, monkeypatch):
    large = _config(tmp_path, student={"from_config": {"layers": 1, "hidden_size": 4_000_000, "heads": 1}})
    message = r"work/student: not enough disk space for the [0-9,]+ parameters of the student"
    with pytest.raises(UserError, match=message):
        build_student(large)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage._replace(free=10**18))
    with pytest.raises(UserError, match=r"student\.from_config: the [0-9,]+ parameters .* need .* GB of memory, and"):
        build_student(large)
    assert not (tmp_path / "work" / "student").exists()


@pytest.mark.usefixtures("teacher")
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((999,), "the student has layers 0 to 2, so there is no [999]"),
        (4, "at most 3 can be trained, because the student has 3 layers; found 4; set it to 3"),
    ],
    ids=["a list", "a number"],
)
def test_layers_that_a_pretrained_student_lacks_are_refused_before_it_is_copied(tmp_path, layers, message):
    _save_pretrained(tmp_path / "pretrained")
    config = _config(tmp_path, student={"path": str(tmp_path / "pretrained"), "train_layers": layers})
    refusal = re.escape(f"student.train_layers: {message}")
    with pytest.raises(UserError, match=refusal):
        build_student(config)
    write_config(tmp_path / "config.yaml", config.as_dict())
    with pytest.raises(UserError, match=refusal):
        run_pipeline(tmp_path / "config.yaml", ["corpus.source=wordnet"])
    assert not [path for path in (tmp_path / "work").iterdir() if not path.name.startswith(".")]
    build_student(_config(tmp_path, student={"path": str(tmp_path / "pretrained"), "train_layers": 3}))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["student.layers=5"], "the teacher has 4 layers, so the student cannot keep 5"),
        (["student.layers=[0, 4]", "student.train_layers=1"], r"layers 0 to 3, so there is no \[4\]"),
        (["student.layers=4", "student.spacing=importance"], "keeps all of the teacher's 4"),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.usefixtures("teacher")
def test_layers_that_the_teacher_lacks_are_refused_before_work_begins(tmp_path, layers, message, trained):
    teacher = {"train_from_scratch": {"num_layers": 4}} if trained else {"path": str(tmp_path / "teacher")}
    config = {"workdir": str(tmp_path / "work"), "teacher": teacher}
    write_config(tmp_path / "config.yaml", config)
    with pytest.raises(UserError, match=message):
        run_pipeline(tmp_path / "config.yaml", layers, until="lexicon")
    assert not [path for path in (tmp_path / "work").iterdir() if not path.name.startswith(".")]


def test_the_default_inner_width_is_that_of_llama():
    values = config_values(NewStudentConfig(layers=1, hidden_size=288, heads=6), 100, 64)
    assert values["intermediate_size"] == 768
    assert config_values(NewStudentConfig(layers=1, hidden_size=2, heads=1), 100, 64)["intermediate_size"] == 8
    assert re.fullmatch("llama", values["model_type"])
