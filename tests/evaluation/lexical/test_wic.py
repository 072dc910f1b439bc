"""Words in Context: files, thresholds and areas."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dskd.config import EvaluationConfig
from dskd.errors import UserError
from dskd.evaluation.lexical.scores import area
from dskd.evaluation.lexical.wic import accuracy, best_threshold, read_wic, similarities

LINES = [
    "board\tN\t2-2\tRoom and board .\tHe nailed boards across the windows .",
    "circulate\tV\t0-1\tCirculate a rumor .\tThis circulates ' 's letter .",
    "hook\tV\t3-0\tto catch or hook it\tHook a fish",
]


def _write(folder, lines, gold):
    (folder / "dev.data.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "dev.gold.txt").write_text("".join(f"{answer}\n" for answer in gold))
    return str(folder / "dev.data.txt")


def test_pairs_are_read_as_they_are_published(tmp_path):
    pairs = read_wic(_write(tmp_path, LINES, "FTF"), "evaluation.wic")
    assert [m.text[m.start : m.stop] for pair in pairs for m in (pair.one, pair.other)] == [
        "board",
        "boards",
        "Circulate",
        "circulates",
        "hook",
        "Hook",
    ]
    assert [pair.is_same for pair in pairs] == [False, True, False]
    assert (pairs[1].word, pairs[1].name) == ("circulate", "dev.data.txt:2")


@pytest.mark.parametrize(
    ("line", "gold", "message"),
    [
        ("board\tN\t2-2\tRoom and board .", "T", r"dev.data.txt:2: expected word<TAB>N\|V.*it has 4 fields"),
        ("board\tX\t2-2\ta b c\ta b c", "T", r"dev.data.txt:2: .* the part of speech is 'X'"),
        ("board\tN\t2\ta b c\ta b c", "T", r"dev.data.txt:2: .* are '2' and should look like 2-5"),
        ("board\tN\t2-x\ta b c\ta b c", "T", r"dev.data.txt:2: .* are '2-x'"),
        ("board\tN\t2-3\ta b c\ta b c", "T", r"dev.data.txt:2: .*'a b c' has no word 3"),
        ("board\tN\t2-2\ta b c\ta b c", "yes", r"dev.gold.txt:2: expected T or F, found 'yes'"),
    ],
)
def test_a_line_in_another_format_is_refused_with_its_number(tmp_path, line, gold, message):
    file = _write(tmp_path, [LINES[0], line], ["T", gold])
    with pytest.raises(UserError, match=message):
        read_wic(file, "evaluation.wic")


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    file = _write(tmp_path, LINES, "TF")
    with pytest.raises(UserError, match=r"dev.gold.txt: it has 2 lines, but dev.data.txt has 3"):
        read_wic(file, "evaluation.wic")
    (tmp_path / "dev.gold.txt").unlink()
    with pytest.raises(UserError, match=r"evaluation.wic: .*dev.gold.txt cannot be read"):
        read_wic(file, "evaluation.wic")
    with pytest.raises(UserError, match=r"evaluation.wic: expected .* called NAME.data.txt, found .*pairs.tsv"):
        read_wic(str(tmp_path / "pairs.tsv"), "evaluation.wic")
    (tmp_path / "dev.data.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"dev.data.txt: this is not UTF-8"):
        read_wic(file, "evaluation.wic")
    with pytest.raises(UserError, match="is empty"):
        read_wic(_write(tmp_path, [], ""), "evaluation.wic")


def test_a_line_separator_in_a_sentence_does_not_end_the_line(tmp_path):
    line = "hook\tV\t3-0\tto catch or hook it\tHook a\u2028fish"
    pairs = read_wic(_write(tmp_path, [*LINES, line], "TFTF"), "evaluation.wic")
    assert pairs[3].other.text == "Hook a\u2028fish"


def test_indices_that_count_from_one_are_refused(tmp_path):
    """Otherwise every score would be that of a wrong word."""
    lines = ["board\tN\t3-3\tRoom and board .\tHe nailed boards across the windows ."]
    with pytest.raises(UserError, match=r"in 2 of 2 sentences .* such as '.' instead of 'board'; an index .* from 0"):
        read_wic(_write(tmp_path, lines, "T"), "evaluation.wic")


def test_a_threshold_without_pairs_is_refused():
    with pytest.raises(ValueError, match="wic_threshold needs evaluation"):
        EvaluationConfig(wic_threshold="train.data.txt")


def test_a_threshold_from_the_measured_file_is_refused(tmp_path):
    file = _write(tmp_path, LINES, "FTF")
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (file, str(tmp_path / "link" / "dev.data.txt"), str(tmp_path / "x" / ".." / "dev.data.txt")):
        with pytest.raises(ValueError, match=r"wic_threshold is evaluation.wic itself, /.*dev.data.txt"):
            EvaluationConfig(wic=file, wic_threshold=other)
    assert EvaluationConfig(wic=file, wic_threshold=str(tmp_path / "train.data.txt")).wic == file


def test_the_threshold_is_the_best_of_all():
    assert best_threshold(np.array([0.1, 0.4, 0.6, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.5)
    assert best_threshold(np.array([0.1, 0.9]), np.array([True, True])) == -np.inf
    random = np.random.default_rng(0)
    for _ in range(20):
        labels = random.random(30) < 0.5
        scores = random.normal(size=30).round(1) + labels
        best = max(np.mean((scores >= t) == labels) for t in (*scores, np.inf))
        assert np.mean((scores >= best_threshold(scores, labels)) == labels) == pytest.approx(best)


def test_scores_are_cosines_and_chance_is_the_larger_class(tmp_path):
    pairs = read_wic(_write(tmp_path, LINES, "FTF"), "evaluation.wic")
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    scores = similarities(states)
    assert scores == pytest.approx([0.0, 1.0, 0.5**0.5])
    items = accuracy(pairs, scores, 0.5)
    assert [(item.total, item.chance, item.cluster) for item in items] == [
        (1.0, pytest.approx(2 / 3), "wic:board"),
        (1.0, pytest.approx(2 / 3), "wic:circulate"),
        (0.0, pytest.approx(2 / 3), "wic:hook"),
    ]
    found = area(scores.tolist(), [pair.is_same for pair in pairs], [pair.word for pair in pairs])
    assert found["value"] == roc_auc_score([pair.is_same for pair in pairs], scores) == 1.0
