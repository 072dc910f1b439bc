"""The stages of several ranks on the work directory that the pipeline made on two: one rank gives the same."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from artifact_folders import open_dataset, update_manifest
from plain_reading import run_apart
from safetensors.torch import load_file
from stages import build_sequences_of
from tiny_work import TINY
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.artifacts.hashing import sha256_of_file
from dskd.artifacts.manifest import read_manifest
from dskd.config.reading import load_config
from dskd.corpus.build import SPLITS
from dskd.evaluation.held_out_text import evaluate
from dskd.evaluation.scores_by_example import read_examples
from dskd.senses.build import build_senses
from dskd.shards import COLUMNS, TEACHER_COLUMNS
from dskd.shards.annotate import annotate
from dskd.tracking import read_artifact, read_runs

pytestmark = pytest.mark.slow
T, KAPPA, TOP_N = 32, 2, 4


@pytest.fixture(scope="module")
def work(tiny):
    return Path(yaml.safe_load(tiny.read_text())["workdir"])


def _samples(folder, cache):
    dataset = open_dataset(folder, cache)
    return [dataset[index] for index in range(len(dataset))]


def test_one_rank_builds_the_same_sense_dictionary_as_two(work, copy_of_tiny, world):
    config = load_config(copy_of_tiny("corpus", "lexicon", "teacher", "sequences"), ["senses.batch_size=5"])
    build_senses(config, world)
    one = load_file(config.path("senses", "senses.safetensors"))
    two = load_file(work / "senses" / "senses.safetensors")
    assert one.keys() == two.keys()
    for name in one.keys() - {"vectors", "counts"}:
        assert torch.equal(one[name], two[name]), name
    torch.testing.assert_close(one["vectors"].float(), two["vectors"].float(), rtol=2e-2, atol=2e-2)
    assert (one["counts"] != two["counts"]).float().mean() < 0.01


def test_one_rank_writes_the_same_shards_as_two_byte_for_byte(work, copy_of_tiny, world):
    config = load_config(copy_of_tiny("corpus", "lexicon", "teacher", "sequences", "senses"))
    annotate(config, world)
    for split in ("train", "validation"):
        one, two = config.path("shards", split), work / "shards" / split
        names = sorted(file.name for file in two.iterdir())
        assert sorted(file.name for file in one.iterdir()) == names
        assert len(names) > 10
        for name in set(names) - {"manifest.json"}:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_the_sense_dictionary_is_as_documented(work):
    tensors = load_file(work / "senses" / "senses.safetensors")
    vocab_size = len(AutoTokenizer.from_pretrained(work / "teacher"))
    rows, entries = len(tensors["vectors"]), len(tensors["entry_offsets"]) - 1
    assert tensors["vectors"].dtype == torch.bfloat16
    assert tensors["vectors"].shape == (rows, 64)
    assert tensors["counts"].dtype == torch.int64
    assert tensors["counts"].shape == (rows,)
    assert tensors["counts"].min() >= 1
    assert tensors["entry_offsets"].dtype == torch.int64
    assert tensors["entry_offsets"][-1] == rows
    assert tensors["span_tokens"].dtype == torch.int32
    assert tensors["span_tokens"].shape == (entries - vocab_size, 3)
    for relation in ("synonym", "antonym"):
        assert tensors[f"{relation}_offsets"].dtype == torch.int64
        assert tensors[f"{relation}_offsets"].shape == (vocab_size + 1,)
        assert tensors[f"{relation}_entries"].dtype == torch.int32
        assert tensors[f"{relation}_entries"].max() < entries
    assert tensors["entry_offsets"].diff().max() <= 3  # k


def test_relations_of_the_users_list_are_in_the_dictionary(work):
    tensors = load_file(work / "senses" / "senses.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(work / "teacher")

    def token(word):
        (single,) = tokenizer(f" {word}")["input_ids"]
        return single

    def neighbours(relation, word):
        start, stop = tensors[f"{relation}_offsets"][token(word) : token(word) + 2].tolist()
        return tensors[f"{relation}_entries"][start:stop].tolist()

    assert token("small") in neighbours("antonym", "large")
    assert token("large") in neighbours("antonym", "small")


def test_the_shards_are_as_documented(work, tmp_path):
    rows = len(load_file(work / "senses" / "senses.safetensors")["vectors"])
    sequences = load_file(work / "sequences" / "train.safetensors")["input_ids"]
    end = AutoTokenizer.from_pretrained(work / "teacher").eos_token_id
    samples = _samples(work / "shards" / "train", tmp_path / "cache")
    assert len(samples) == len(sequences) == 96
    boundaries = 0
    for sample, ids in zip(samples, sequences, strict=True):
        assert set(sample) == set(COLUMNS) | set(TEACHER_COLUMNS)
        assert sample["input_ids"].dtype == np.int32
        assert np.array_equal(sample["input_ids"], ids.numpy())
        assert sample["loss_mask"].dtype == np.uint8
        # An end of text ends its document: it has no target, nor has the last position, and the next token is a start.
        ended = ids.numpy() == end
        assert sample["loss_mask"].tolist() == [*(~ended[:-1]).astype(int), 0]
        assert sample["document_starts"].dtype == np.uint8
        assert sample["document_starts"].tolist() == [1, *ended[:-1].astype(int)]
        boundaries += int(ended[:-1].sum())
        for name in ("sense_ids", "synonym_ids", "antonym_ids"):
            assert sample[name].dtype == np.int32
            assert sample[name].shape == (T, KAPPA)
            assert sample[name].max() < rows
            assert (sample[name][sample["loss_mask"] == 0] == -1).all()
            # Padding follows the rows.
            assert ((sample[name][:, 0] >= 0) | (sample[name][:, 1] < 0)).all()
        pulled = np.concatenate([sample["sense_ids"], sample["synonym_ids"]], 1)
        for near, far in zip(pulled, sample["antonym_ids"], strict=True):
            assert not (set(near) & set(far)) - {-1}
    assert boundaries > 50


def test_every_row_of_the_annotation_is_what_brute_force_finds(work, tmp_path):
    """O_i, P_i and N_i of every held-out position, from the definitions: transformers' own model, document by document,
    in float64, with a loop over positions. Rows must be the same; only equally distant ones may change places."""
    tensors = load_file(work / "senses" / "senses.safetensors")
    vectors, offsets = tensors["vectors"].double().numpy(), tensors["entry_offsets"].tolist()
    teacher = AutoModelForCausalLM.from_pretrained(work / "teacher", dtype=torch.float32)
    end = AutoTokenizer.from_pretrained(work / "teacher").eos_token_id

    def rows(entries):
        return sorted({row for entry in entries for row in range(offsets[entry], offsets[entry + 1])})

    def neighbours(kind, token):
        start, stop = tensors[f"{kind}_offsets"][token : token + 2].tolist()
        return tensors[f"{kind}_entries"][start:stop].tolist()

    positions = dict.fromkeys(("sense_ids", "synonym_ids", "antonym_ids"), 0)
    for sample in _samples(work / "shards" / "validation", tmp_path / "cache"):
        ids = torch.tensor(sample["input_ids"]).long()
        with torch.no_grad():
            _, states, has_target = run_apart(teacher, ids.unsqueeze(0), end)
        states = states.double().numpy()
        for position in range(T):
            target = int(ids[position + 1]) if has_target[position] else None
            synonyms, antonyms = ([], []) if target is None else (neighbours(k, target) for k in ("synonym", "antonym"))
            candidates = {
                "sense_ids": [] if target is None else rows([target]),
                "synonym_ids": rows([target, *synonyms]) if synonyms or antonyms else [],
                "antonym_ids": rows(antonyms),
            }
            for name, competing in candidates.items():
                distance = ((vectors[competing] - states[position]) ** 2).sum(-1)
                expected = [competing[index] for index in np.argsort(distance, kind="stable")[:KAPPA]]
                found = [row for row in sample[name][position].tolist() if row >= 0]
                if found != expected:  # then the distances are the same to rounding
                    of = dict(zip(competing, distance, strict=True))
                    assert [of[row] for row in found] == pytest.approx([of[row] for row in expected], rel=1e-5)
                positions[name] += bool(found)
    assert min(positions.values()) > 10, positions


def test_the_stored_distributions_are_those_of_transformers(work, tmp_path):
    """The top tokens of every training position, and the mass of the others, document by document."""
    teacher = AutoModelForCausalLM.from_pretrained(work / "teacher", dtype=torch.float32)
    end = AutoTokenizer.from_pretrained(work / "teacher").eos_token_id
    positions = 0
    for sample in _samples(work / "shards" / "train", tmp_path / "cache"):
        token_ids, logprobs, rest = (torch.from_numpy(sample[name].copy()) for name in TEACHER_COLUMNS)
        assert (token_ids.dtype, logprobs.dtype, rest.dtype) == (torch.int32, torch.float16, torch.float32)
        assert token_ids.shape == logprobs.shape == (T, TOP_N)
        assert rest.shape == (T,)
        with torch.no_grad():
            logits, _, has_target = run_apart(teacher, torch.tensor(sample["input_ids"]).long().unsqueeze(0), end)
        has_target[-1] = False
        expected, order = logits.double().log_softmax(-1)[has_target].sort(dim=-1, descending=True)
        found = logits.double().log_softmax(-1)[has_target].gather(1, token_ids[has_target].long())
        torch.testing.assert_close(found, expected[:, :TOP_N], rtol=1e-5, atol=1e-5)  # these tokens, but for near ties
        assert (token_ids[has_target, 0] == order[:, 0]).float().mean() > 0.9
        torch.testing.assert_close(logprobs[has_target].double(), expected[:, :TOP_N], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(rest[has_target].double(), expected[:, TOP_N:].logsumexp(-1), rtol=1e-4, atol=1e-5)
        assert (token_ids[~has_target] == -1).all()
        assert not logprobs[~has_target].any()
        assert not rest[~has_target].any()
        positions += int(has_target.sum())
    assert positions > 500
    # Held-out text is read with the teacher itself.
    held_out = next(iter(_samples(work / "shards" / "validation", tmp_path / "held-out")))
    assert not set(TEACHER_COLUMNS) & set(held_out)


def test_training_samples_are_texts_that_the_teacher_continues(work, copy_of_tiny, world, tmp_path, capsys):
    """The stage itself: what it writes of training texts, and that held-out ones stay as they are."""
    path = copy_of_tiny(
        "corpus",
        "teacher",
        corpus={**yaml.safe_load((work.parent / "tiny.yaml").read_text())["corpus"], "packing": "none"},
        senses={"path": str(work / "senses")},
        annotation={"kappa": KAPPA, "batch_size": 8, "continuation_tokens": 5},
    )
    config = load_config(path)
    # Whole texts are at their ends, as this teacher knows: it is given the first half of each.
    corpus = config.path("corpus", "train.parquet")
    whole = pq.read_table(corpus)
    halves = [" ".join(text.split()[: len(text.split()) // 2 + 1]) for text in whole.column("text").to_pylist()]
    pq.write_table(whole.set_column(whole.column_names.index("text"), "text", pa.array(halves)), corpus)
    update_manifest(config.path("corpus"))
    source = build_sequences_of(config)
    capsys.readouterr()
    annotate(config, world)
    manifests = {split: read_manifest(config.path("shards", split), "shards", made_by="") for split in SPLITS}
    added = manifests["train"].facts["continued_tokens"]
    assert f"{added:,} tokens" in capsys.readouterr().err
    assert "continued_tokens" not in manifests["validation"].facts
    assert not {"seed", "continuation_tokens", "teacher_top_n"} & set(manifests["validation"].config)
    teacher = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    end = source.tokenizer.eos_token_id
    found, of_continuation = dict.fromkeys(range(1, 6), 0), 0
    texts = load_file(config.path("sequences", "train.safetensors"))
    for index, sample in enumerate(_samples(config.path("shards", "train"), tmp_path / "train")):
        assert set(sample) == set(COLUMNS)
        before, length = texts["input_ids"][index].long(), int(texts["lengths"][index])
        after, after_length = torch.tensor(sample["input_ids"]).long(), int(sample["loss_mask"].sum()) + 1
        if before[length - 1] != end or length == 1:
            assert after.tolist() == before.tolist()
            continue
        count = after_length - (length - 1)
        assert after[: length - 1].tolist() == before[: length - 1].tolist()
        # Each token that is added is the most probable one after all before it, and none follows an end of text.
        with torch.no_grad():
            predicted = teacher(after[: after_length - 1].unsqueeze(0)).logits[0].argmax(-1)
        assert after[length - 1 : after_length].tolist() == predicted[length - 2 :].tolist()
        assert end not in after[length - 1 : after_length - 1]
        found[count] += 1
        of_continuation += int((sample["sense_ids"][length - 1 : after_length - 1, 0] >= 0).sum())
    assert sum(count * number for count, number in found.items()) == added
    assert min(found.values()) > 0, found
    assert of_continuation > 20  # sense rows
    held_out = load_file(config.path("sequences", "validation.safetensors"))
    for index, sample in enumerate(_samples(config.path("shards", "validation"), tmp_path / "validation")):
        assert sample["input_ids"].tolist() == held_out["input_ids"][index].tolist()
        assert int(sample["loss_mask"].sum()) == int(held_out["lengths"][index]) - 1


def test_every_manifest_names_the_inputs_of_its_artifact(work):
    digests = {}
    for folder, kind in [
        ("corpus", "corpus"),
        ("lexicon", "lexicon"),
        ("teacher", "teacher"),
        ("sequences", "sequences"),
        ("senses", "senses"),
        ("shards/train", "shards"),
        ("shards/validation", "shards"),
        ("student", "student"),
        ("export/dskd", "export"),
        ("evaluation/dskd", "evaluation"),
    ]:
        digests[folder] = read_manifest(work / folder, kind, made_by="")
    assert digests["shards/train"].inputs["senses"] == digests["senses"].digest
    assert digests["senses"].inputs["lexicon"] == digests["lexicon"].digest
    assert digests["senses"].teacher == digests["teacher"].digest == digests["student"].teacher
    assert digests["shards/train"].tokenizer == digests["sequences"].tokenizer
    assert digests["evaluation/dskd"].inputs["model"] == digests["export/dskd"].digest
    assert digests["shards/train"].config["kappa"] == KAPPA
    for path in work.rglob("*"):
        assert path.suffix not in (".pkl", ".pickle", ".npy"), path
        assert ".partial" not in path.name, path


def test_the_recipe_of_shards_keeps_its_settings(work):
    """Another key, or a lost one, would have every user's shards made again."""
    kept = read_manifest(work / "shards/validation", "shards").config
    assert kept == {"kappa": 2, "shard_size_mb": 64, "precision": "fp32"}


@pytest.mark.parametrize(("name", "folder"), [("teacher", "teacher"), ("student", "student"), ("dskd", "export/dskd")])
def test_measures_are_those_of_a_plain_evaluation(work, tmp_path, name, folder):
    tensors = load_file(work / "senses" / "senses.safetensors")
    vectors = tensors["vectors"].double()
    model = AutoModelForCausalLM.from_pretrained(work / folder, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(work / "teacher", dtype=torch.float32)
    end = AutoTokenizer.from_pretrained(work / "teacher").eos_token_id
    nll, lexical_nll, correct, agree, aligned, of_sample = [], [], [], [], [], []
    for sample in _samples(work / "shards" / "validation", tmp_path / "cache"):
        ids = torch.from_numpy(sample["input_ids"]).long()
        with torch.no_grad():
            logits, states, has_target = run_apart(model, ids.unsqueeze(0), end)
            expected = run_apart(teacher, ids.unsqueeze(0), end)[0].argmax(-1)
        states, labels, predicted = states.double(), ids.roll(-1), logits.argmax(-1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        nll += losses[has_target].tolist()
        of_sample.append((float(losses[has_target].sum()), int(has_target.sum())))
        correct += (predicted == labels)[has_target].tolist()
        agree += (predicted == expected)[has_target].tolist()
        for position in has_target.nonzero().squeeze(-1).tolist():
            near = [row for row in sample["synonym_ids"][position] if row >= 0]
            far = [row for row in sample["antonym_ids"][position] if row >= 0]
            if near or far:
                lexical_nll.append(float(losses[position]))
            if near and far:
                to_near, to_far = (min((vectors[r] - states[position]).norm() for r in rows) for rows in (near, far))
                aligned.append(bool(to_near < to_far))
    measured = json.loads((work / "evaluation" / name / "measures.json").read_text())
    assert len(aligned) > 10
    assert measured["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert measured["lexical_perplexity"] == pytest.approx(math.exp(np.mean(lexical_nll)), rel=1e-4)
    assert measured["accuracy"] == pytest.approx(np.mean(correct), abs=2e-3)
    assert measured["agreement"] == pytest.approx(np.mean(agree), abs=4e-3)
    assert measured["sense_alignment"] == pytest.approx(np.mean(aligned), abs=2e-2)
    # The same sample by sample, and the measures are the sums of these.
    table = pq.read_table(work / "evaluation" / name / "examples.parquet").to_pydict()
    assert table["example"] == [str(number) for number in range(38)]
    assert table["tokens"] == [tokens for _, tokens in of_sample]
    assert table["nll"] == pytest.approx([total for total, _ in of_sample], rel=1e-4)
    assert sum(table["lexical_tokens"]) == len(lexical_nll)
    assert sum(table["alignable"]) == len(aligned)
    assert measured["accuracy"] == sum(table["correct"]) / sum(table["tokens"])
    assert measured["lexical_perplexity"] == pytest.approx(
        math.exp(sum(table["lexical_nll"]) / sum(table["lexical_tokens"]))
    )


def test_measures_of_each_sample_do_not_depend_on_ranks_or_batches(work, copy_of_tiny, world):
    path = copy_of_tiny("teacher", "student", "senses", "shards", "export", evaluation={"batch_size": 5})
    config = load_config(path, ["tracking.enabled=false"])
    evaluate(config, world)
    for name in ("teacher", "student", "dskd"):
        one, two = (
            pq.read_table(folder / name / "examples.parquet")
            for folder in (config.path("evaluation"), work / "evaluation")
        )
        assert one.schema.equals(two.schema, check_metadata=True)
        for column in two.column_names:
            values = one.column(column).to_pylist()
            if column in ("example", "tokens", "lexical_tokens", "alignable"):
                assert values == two.column(column).to_pylist(), (name, column)
            else:  # to rounding, which may turn the nearest or most probable of near ties
                apart = np.abs(np.subtract(values, two.column(column).to_pylist()))
                assert apart.max() < (1e-3 if "nll" in column else 1.5), (name, column)
                assert apart.mean() < (1e-4 if "nll" in column else 0.06), (name, column)


def test_the_tracked_run_has_its_evaluation_and_names_its_data(tiny, work):
    config = load_config(tiny)
    (run,) = [run for run in read_runs(config) if run.name == "dskd"]
    digest = sha256_of_file(work / "sequences" / "validation.safetensors")  # of the text alone, whatever the senses
    assert run.tags["evaluation_data"] == digest
    content = read_artifact(config, run.run_id, "evaluation/examples.parquet")
    assert content == (work / "evaluation" / "dskd" / "examples.parquet").read_bytes()
    table = read_examples(content)
    assert table.data == digest
    measured = json.loads((work / "evaluation" / "dskd" / "measures.json").read_text())
    assert table.values() == measured
    assert {name: run.metrics[f"eval/{name}"] for name in measured} == measured
    assert read_artifact(config, run.run_id, "evaluation/nothing.parquet") is None


@pytest.mark.parametrize(("name", "folder"), [("teacher", "teacher"), ("student", "student"), ("dskd", "export/dskd")])
def test_continuations_are_those_that_transformers_generates(work, tmp_path, name, folder):
    model = AutoModelForCausalLM.from_pretrained(work / folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work / "teacher")
    end, count = tokenizer.eos_token_id, TINY["evaluation"]["sample_tokens"]
    expected, rows = [], []
    for sample, _ in zip(_samples(work / "shards" / "validation", tmp_path / "cache"), range(48), strict=False):
        ids = sample["input_ids"].tolist()
        rows.append((ids, ids[: ids.index(end) + 1] if end in ids else ids))
    long = [row for row in rows if len(row[1]) // 2 >= 5]  # each half has five tokens or more
    assert len(long) >= 3
    for ids, document in long[:3]:
        half = max(1, len(document) // 2)
        prompt = torch.tensor([ids[:half]])
        added = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=end, pad_token_id=end)
        texts = (ids[:half], document[half : half + count], added[0, half:])
        expected.append([tokenizer.decode(tokens, skip_special_tokens=True) for tokens in texts])
    table = json.loads((work / "evaluation" / name / "samples.json").read_text())
    assert table["columns"] == list(dict.fromkeys(["prompt", "the text itself", "teacher", name]))
    assert [[row[0], row[1], row[-1]] for row in table["data"]] == expected
    # The teacher's column is the same as in its own table.
    teachers = json.loads((work / "evaluation" / "teacher" / "samples.json").read_text())
    assert [row[2] for row in table["data"]] == [row[2] for row in teachers["data"]]
    lines = (work / "evaluation" / name / "samples.md").read_text().splitlines()
    assert len(lines) == 2 + len(expected)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(table["columns"]) + 1 for line in lines)
