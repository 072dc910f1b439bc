"""The sections of a configuration: which values they take, and which keys fit together."""

import pytest
from config_files import MINIMAL, write_config

from dskd.config import Config
from dskd.config.reading import load_config
from dskd.errors import UserError
from dskd.training.models.teacher_source import TeacherSource

NEW = {"layers": 2, "hidden_size": 32, "heads": 4}
TRAINED_PARTS = ("train_embeddings", "train_final_norm", "train_lm_head")


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=.inf",
        "student.layers=[]",
        "student.layers=0",
        "student.train_layers=-1",
        "student.layers=[3, 1, 1]",
        "student.train_layers=17",
        "student.train_layers=[16]",
        "student.train_layers=every",
        "student.train_layers=0",
        "seeds=[0, 1, 0]",
        "loss.temperature=.nan",
    ],
)
def test_values_out_of_range_are_refused(tmp_path, override):
    with pytest.raises(UserError, match="1 problem"):
        load_config(write_config(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize(
    ("corpus", "messages"),
    [
        (
            {"train": ["a.txt"], "dataset": "a/b", "validation_split": "test"},
            ["corpus.train needs source: files", "corpus.dataset and corpus.validation_split need source: huggingface"],
        ),
        (
            {"source": "huggingface", "validation": ["a.txt"]},
            ["source: huggingface needs corpus.dataset", "corpus.validation needs source: files"],
        ),
        (
            {"source": "files", "dataset_config": "x"},
            ["source: files needs corpus.train", "corpus.dataset_config needs source: huggingface"],
        ),
        ({"packing": "concat"}, ["'documents', 'stream' or 'none'"]),
    ],
)
def test_keys_of_another_corpus_source_are_all_reported(tmp_path, corpus, messages):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path, {**MINIMAL, "corpus": corpus}))
    for message in messages:
        assert message in str(error.value)


def test_layers_and_trained_layers_must_fit_together(tmp_path):
    path = write_config(tmp_path, {**MINIMAL, "student": {"layers": [5, 1, 5], "train_layers": [1, 2]}})
    with pytest.raises(UserError) as error:
        load_config(path)
    assert "student: layers: expected different layers in ascending order, such as [1, 5], found [5, 1, 5]" in str(
        error.value
    )
    assert "train_layers: the student has layers 0 to 1, so there is no [2]" in str(error.value)
    assert load_config(path, ["student.layers=[1, 5, 7]"]).student.train_layers == (1, 2)


@pytest.mark.parametrize(
    "student",
    [
        {"train_layers": 0},
        {"from_config": NEW, "train_layers": 0, **dict.fromkeys(TRAINED_PARTS, False)},
        {"path": "a/b", "train_layers": 0, **dict.fromkeys(TRAINED_PARTS, False)},
    ],
)
def test_a_student_of_which_nothing_is_trained_is_refused(tmp_path, student):
    path = write_config(tmp_path, {**MINIMAL, "student": student})
    with pytest.raises(UserError, match="student: nothing would be trained; set train_layers to 1 or more"):
        load_config(path)
    for part in TRAINED_PARTS:
        load_config(path, [f"student.{part}=true"])


@pytest.mark.parametrize("student", [{"layers": 4}, {"path": "a/b"}, {"from_config": {**NEW, "layers": 4}}])
def test_a_trained_layer_is_named_once(tmp_path, student):
    path = write_config(tmp_path, {**MINIMAL, "student": student})
    message = r"student: train_layers: expected different layers, such as \[1, 3\], found \[3, 1, 3\]"
    with pytest.raises(UserError, match=message):
        load_config(path, ["student.train_layers=[3, 1, 3]"])
    assert load_config(path, ["student.train_layers=[3, 1]"]).student.train_layers == (3, 1)


@pytest.mark.parametrize("samples", [[], ["student.importance_samples=9"]])
def test_importance_chooses_layers_so_a_list_of_them_is_refused(tmp_path, samples):
    path = write_config(tmp_path, {**MINIMAL, "student": {"layers": [0, 1], "spacing": "importance"}})
    with pytest.raises(UserError, match=r"spacing: importance chooses layers, and `layers` is already a list of them"):
        load_config(path, samples)
    assert load_config(path, ["student.layers=2", *samples]).student.is_measured


def test_a_config_cannot_be_changed():
    config = Config(**MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_all_conflicts_between_sections_are_reported(tmp_path):
    path = write_config(
        tmp_path,
        {
            **MINIMAL,
            "teacher": {"path": "a/b", "mode": "cached"},
            "loss": {"hidden_weight": 1.0, "sense_form": "distribution"},
            "student": {"shared_trunk": "on"},
            "annotation": {"continuation_tokens": 3},
        },
    )
    with pytest.raises(UserError, match=r"continuation_tokens needs corpus\.packing: none"):
        load_config(path)
    with pytest.raises(UserError) as error:  # not when it is read: training looks at the shards that exist
        load_config(path, ["corpus.packing=none"]).require_stored()
    config = load_config(path, ["annotation.store=[trunk_states, teacher_states]", "corpus.packing=none"])
    config.require_stored()
    assert config.annotation.store == ("teacher_states", "trunk_states")  # in one order, so that it is one recipe
    assert TeacherSource.planned(config).kind == "states"
    for part in (
        "teacher.mode: cached needs annotation.store: [teacher_states], or annotation.teacher_top_n",
        "loss.hidden_weight 1 needs the teacher's states",
        "loss.sense_form: distribution needs the teacher's states, which teacher.mode: cached reads from",
        "student.shared_trunk: on needs a teacher in training",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("student", "reason"),
    [
        ({"shared_trunk": "off"}, "student.shared_trunk is off"),
        ({"train_embeddings": True}, "the student's embeddings are trained"),
        ({"layers": 2, "train_layers": 2}, "the student's lowest layer is trained"),
        ({"layers": 2, "train_layers": "all"}, "the student's lowest layer is trained"),
        ({"layers": [0, 3], "train_layers": [0]}, "the student's lowest layer is trained"),
        ({"layers": [1, 3], "train_layers": 1}, "the student's lowest layer is the teacher's layer 1"),
        ({"layers": 1, "train_layers": 0, "train_lm_head": True}, "the student has only one layer"),
    ],
)
def test_a_trunk_that_the_config_rules_out_is_not_stored(tmp_path, student, reason):
    path = write_config(tmp_path, {**MINIMAL, "student": student})
    with pytest.raises(UserError, match=rf"annotation\.store: trunk_states .* there are none: {reason}; remove trunk_"):
        load_config(path, ["annotation.store=[trunk_states]"])
    load_config(path, ["annotation.store=[teacher_states]"])


def test_a_required_trunk_needs_its_states_if_training_reads_the_teachers(tmp_path):
    path = write_config(tmp_path, {**MINIMAL, "student": {"shared_trunk": "on"}})
    with pytest.raises(
        UserError, match=r"shared_trunk: on needs the trunk's states, .* \[teacher_states, trunk_states\]"
    ):
        load_config(path, ["annotation.store=[teacher_states]"])
    for other in ("annotation.store=[teacher_states, trunk_states]", "teacher.mode=zero3", "loss.kd_weight=0"):
        load_config(path, ["annotation.store=[teacher_states]", other])


@pytest.mark.parametrize(
    ("loss", "messages"),
    [
        (
            {"sense_temperature": 0.2, "sense_candidates": ["own"]},
            [
                "loss.sense_temperature and loss.sense_candidates need sense_form: distribution, and it is distance",
                "leave them at their defaults",
            ],
        ),
        ({"sense_form": "distribution", "margin": 2.0}, ["loss.margin needs sense_form: distance, and it is distr"]),
        (
            {"sense_form": "distribution", "sense_candidates": ["own"], "sense_random_candidates": 9},
            ["loss.sense_random_candidates needs random in loss.sense_candidates"],
        ),
        (
            {"lexical_weight": 1.2, "ce_weight": 0.0, "kd_weight": 0.0},
            ["loss.lexical_weight 1.2 applies to the terms with the weights loss.ce_weight, loss.kd_weight, which"],
        ),
        ({"sense_candidates": []}, ["loss.sense_candidates"]),
        ({"lexical_weight": 0.0}, ["loss.lexical_weight"]),
        (
            {"position_share": 0.5, "ce_weight": 0.0, "kd_weight": 0.0},
            ["loss.position_share 0.5 applies", "loss.ce_weight, loss.kd_weight, loss.hidden_weight, which are all 0"],
        ),
        ({"position_share": 0.0}, ["loss.position_share"]),
        ({"position_share": 1.1}, ["loss.position_share"]),
    ],
)
def test_keys_of_the_loss_without_effect_are_refused(tmp_path, loss, messages):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path, {**MINIMAL, "loss": loss}))
    for message in messages:
        assert message in str(error.value)


def test_a_run_can_have_another_form_of_the_sense_loss(tmp_path):
    forms = {"a": {}, "b": {"loss": {"sense_form": "distribution", "sense_candidates": ["own", "random"]}}}
    path = write_config(tmp_path, {**MINIMAL, "loss": {"kd_weight": 0.0}, "run": "a", "runs": forms})
    assert TeacherSource.planned(load_config(path)).kind == "none"
    config = load_config(path, ["run=b"])
    assert config.loss.sense_candidates == ("own", "random")
    assert TeacherSource.planned(config).kind == "loaded"
    assert TeacherSource.planned(load_config(path, ["run=b", "loss.sense_weight=0"])).kind == "none"


@pytest.mark.parametrize(
    ("teacher", "message"),
    [({"offload": "nvme"}, "offload: nvme needs nvme_path"), ({"nvme_path": "/x"}, "nvme_path needs offload: nvme")],
)
def test_nvme_offload_needs_both_of_its_keys(tmp_path, teacher, message):
    with pytest.raises(UserError, match=message):
        load_config(write_config(tmp_path, {**MINIMAL, "teacher": {"path": "a/b", **teacher}}))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            {"path": "a/b", "layers": 4, "spacing": "first"},
            "path names a whole model, and student.layers and student.spacing would cut one from the teacher; remove "
            "student.layers and student.spacing, or student.path",
        ),
        ({"from_config": NEW, "spacing": "even"}, "from_config describes a whole model, and student.spacing would cut"),
        ({"path": "a/b", "from_config": NEW}, "remove student.path or student.from_config"),
        ({"path": "a/b", "shared_trunk": "on"}, "shared_trunk: on needs a student that is cut from the teacher"),
        ({"revision": "main"}, "revision needs student.path, a model on the Hub"),
        ({"from_config": NEW, "train_layers": 3}, "at most 2 can be trained, because from_config.layers is 2"),
        ({"from_config": {**NEW, "heads": 5}}, "hidden_size 32 must be heads (5) times an even number"),
        ({"from_config": {**NEW, "kv_heads": 3}}, "kv_heads 3 must divide heads (4)"),
        ({"from_config": {"layers": 2, "hidden_size": 32}}, "student.from_config.heads: is missing"),
    ],
)
def test_keys_for_another_student_are_refused_once(tmp_path, student, message):
    with pytest.raises(UserError, match="1 problem") as error:
        load_config(write_config(tmp_path, {**MINIMAL, "student": student}))
    assert message in str(error.value)


@pytest.mark.parametrize("student", [{"path": "a/b"}, {"from_config": NEW}])
def test_a_student_that_is_not_cut_is_trained_whole_by_default_and_can_be_printed_and_read_again(tmp_path, student):
    config = load_config(write_config(tmp_path, {**MINIMAL, "student": student}))
    printed = config.as_dict()["student"]
    trained = {"train_layers": "all", "train_embeddings": True, "train_final_norm": True, "train_lm_head": True}
    assert trained.items() <= printed.items()
    assert load_config(write_config(tmp_path, config.as_dict())) == config
    chosen = {**student, "train_layers": [0, 1], "train_embeddings": False}
    section = load_config(write_config(tmp_path, {**MINIMAL, "student": chosen})).student
    assert (section.train_layers, section.train_embeddings, section.train_lm_head) == ((0, 1), False, True)
    with pytest.raises(UserError, match=r"there are none: student\..* is not cut from the teacher"):
        load_config(write_config(tmp_path, {**MINIMAL, "student": student}), ["annotation.store=[trunk_states]"])


def test_a_cut_student_has_the_defaults_that_it_always_had():
    printed = Config(**MINIMAL).as_dict()["student"]
    assert {"layers": 16, "train_layers": 2, "train_embeddings": False}.items() <= printed.items()


@pytest.mark.parametrize(
    "section",
    [{"student": {"path": ""}}, {"teacher": {"path": "model.gguf", "tokenizer": ""}}, {"teacher": {"path": " "}}],
)
def test_an_empty_path_is_refused(tmp_path, section):
    with pytest.raises(UserError, match="a path cannot be empty"):
        load_config(write_config(tmp_path, {**MINIMAL, **section}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"corpus": {"temperature": 0.5, "max_senses": 3}},
            "corpus.max_senses and corpus.temperature need source: teacher, and it is wordnet",
        ),
        ({"corpus": {"server": "http://localhost:8000"}}, "corpus.server needs source: teacher"),
        ({"corpus": {"source": "teacher", "train": ["a.txt"]}}, "corpus.train needs source: files or chat"),
        ({"corpus": {"source": "teacher", "server_model": "m"}}, "corpus.server_model: there is no corpus.server"),
        (
            {"corpus": {"source": "teacher", "server": "http://localhost:8000", "batch_size": 4}},
            "corpus.batch_size is for a teacher that writes here",
        ),
        ({"corpus": {"source": "teacher", "server": "localhost:8000"}}, "is not a server URL"),
        ({"corpus": {"source": "teacher", "server": "http://me:pw@host/v1"}}, "DSKD_SERVER_KEY"),
        ({"corpus": {"source": "teacher", "server": "http://host/v1?key=1"}}, "expected the address alone"),
        ({"corpus": {"source": "teacher", "temperature": 0}}, "corpus.temperature"),
        ({"corpus": {"source": "teacher", "top_p": 1.1}}, "corpus.top_p"),
        ({"corpus": {"source": "teacher", "batch_size": 257}}, "corpus.batch_size"),
        (
            {"corpus": {"source": "teacher"}, "teacher": {"train_from_scratch": {}}},
            "corpus.source: teacher needs teacher.path",
        ),
    ],
)
def test_what_a_teacher_that_writes_cannot_use_is_refused(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path, {**MINIMAL, **content}))
    assert message in str(error.value)
    assert "me:pw" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:sekret@host/v1", "has a user or a password"),
        ("ftp://me:sekret@host/v1", "has a user or a password"),
        ("http://host/v1?api_key=sekret", "has a ? or a #"),
        ("sekret", "is not a server URL"),
        ("http://sekret:99999", "the port in the URL is not a number from 1 to 65535"),
        ("http://sekret:abc", "the port in the URL is not a number from 1 to 65535"),
        ("http://ho sekret", "has a space"),
        ("http://[::sekret", "a [ or ] that does not enclose an IPv6 address"),
        ("http://sekret:8000/v1/chat/completions", "write the URL without it: "),
    ],
)
@pytest.mark.parametrize("override", ["corpus.server={!r}", "corpus={{source: teacher, server: {!r}}}"])
def test_the_refusal_of_a_servers_url_does_not_repeat_it(tmp_path, url, message, override):
    with pytest.raises(UserError) as in_file:
        load_config(write_config(tmp_path, {**MINIMAL, "corpus": {"source": "teacher", "server": url}}))
    with pytest.raises(UserError) as in_override:
        load_config(write_config(tmp_path, {**MINIMAL, "corpus": {"source": "teacher"}}), [override.format(url)])
    for error in (in_file, in_override):
        assert "corpus.server: " in str(error.value)
        assert message in str(error.value)
        assert "sekret" not in str(error.value) or url.endswith("completions")
    assert "override 'corpus" in str(in_override.value)


def test_an_override_that_is_not_yaml_is_not_repeated_if_it_may_hold_a_key(tmp_path):
    for override in ("corpus.server=http://me:sekret@[", "corpus.server=[sekret", "http://me:sekret@host"):
        with pytest.raises(UserError) as error:
            load_config(write_config(tmp_path, MINIMAL), [override])
        assert "sekret" not in str(error.value)
    (tmp_path / "bad.yaml").write_text("corpus:\n  server: http://me:sekret@host: 8000\n")
    with pytest.raises(UserError, match=r"mapping values are not allowed here\n  line 2, column 32") as error:
        load_config(tmp_path / "bad.yaml")
    assert "sekret" not in str(error.value)
    with pytest.raises(UserError, match="found another value") as error:
        load_config(write_config(tmp_path, {**MINIMAL, "corpus": {"source": "teacher", "server": ["sekret"]}}))
    assert "sekret" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["http://localhost:8000", "https://api.example.org/openai/v1", "http://[::1]:80/v1", "http://10.0.0.1/v1beta"],
)
def test_the_common_url_of_a_server_is_kept_as_it_is(tmp_path, url):
    config = load_config(write_config(tmp_path, {**MINIMAL, "corpus": {"source": "teacher", "server": f"{url}/"}}))
    assert (config.corpus.server, config.corpus.as_dict()["server"]) == (url, url)


def test_a_path_that_may_hold_a_key_is_in_no_record(tmp_path):
    """Records are made of `as_dict`. Another path has another record, since it may be another server."""
    shown = []
    for key in ("sekret1", "sekret2"):
        corpus = {"source": "teacher", "server": f"http://host:8000/{key}/v1"}
        config = load_config(write_config(tmp_path, {**MINIMAL, "corpus": corpus}))
        assert config.corpus.server == corpus["server"]
        shown.append(config.corpus.as_dict()["server"])
        assert shown[-1].startswith("http://host:8000/path-")
    assert shown[0] != shown[1]
