"""Places in shards where a row of the dictionary is the nearest sense, with shards made by hand."""

import numpy as np
import pytest

from dskd.artifacts.hashing import hash_files
from dskd.artifacts.mds import INDEX, read_samples
from dskd.errors import UserError
from dskd.inspection.contexts import find_contexts, render_context
from dskd.shards import COLUMNS, join_blocks
from dskd.shards.writing import write_block

T = 8


def _sample(input_ids, sense_rows, synonym_rows=()):
    columns = {name: np.full((T, 2), -1, np.int32) for name in ("sense_ids", "synonym_ids", "antonym_ids")}
    for position, row in sense_rows.items():
        columns["sense_ids"][position, 0] = row
    for position, rank, row in synonym_rows:
        columns["synonym_ids"][position, rank] = row
    starts = np.eye(1, T, dtype=np.uint8)[0]
    return {
        "input_ids": np.array(input_ids, np.int32),
        "loss_mask": np.ones(T, np.uint8),
        "document_starts": starts,
        **columns,
    }


@pytest.fixture
def shards(tmp_path, ids):
    text = [[ids[word] for word in ["the", "big", "size", "of", "very", "big", "the", "small"]]] * 3
    samples = [
        _sample(text[0], {0: 4, 4: 5}, [(6, 1, 9)]),
        _sample(text[1], {0: 5, 4: 5}),
        _sample(text[2], {4: 4}),
    ]
    folder = tmp_path / "train"
    write_block(folder / "block-0", iter(samples[:2]))
    write_block(folder / "block-1", iter(samples[2:]))
    join_blocks(folder, [folder / "block-0", folder / "block-1"])
    return folder, samples


def test_shards_are_read_as_they_were_written_and_stay_as_they_are(shards):
    folder, samples = shards
    before = hash_files(folder)
    for read, written in zip(read_samples(folder / INDEX), samples, strict=True):
        for name in COLUMNS:
            assert np.array_equal(read[name], written[name])
    assert hash_files(folder) == before


def test_contexts_are_the_places_where_a_row_is_nearest(shards, tokenizer):
    folder, _ = shards
    contexts = find_contexts(folder, 3, range(4, 6), tokenizer, of_synonyms=False, per_row=2, scan=99)
    first, second = "the «big» size of very big the small", "the big size of very «big» the small"
    assert contexts == ({4: [first, second], 5: [second, first]}, 3)


def test_the_scan_stops_when_every_row_has_enough_places_or_at_its_limit(shards, tokenizer):
    folder, _ = shards
    places, samples_read = find_contexts(folder, 3, range(5, 6), tokenizer, of_synonyms=False, per_row=1, scan=99)
    assert (len(places[5]), samples_read) == (1, 1)
    places, samples_read = find_contexts(folder, 3, range(4, 5), tokenizer, of_synonyms=False, per_row=9, scan=2)
    assert (len(places[4]), samples_read) == (1, 2)


def test_a_span_is_shown_where_a_synonym_is_pulled_to_it(shards, tokenizer):
    places, _ = find_contexts(shards[0], 3, range(9, 10), tokenizer, of_synonyms=True, per_row=3, scan=99)
    assert places == {9: ["the big size of very big the «small»"]}


def test_a_context_is_a_window_that_ends_with_its_document(tokenizer, ids):
    words = ["size", "<end>", *["big"] * 3, "small", *["the"] * 3, "<end>", "size"]
    text = [ids[word] for word in words]
    assert render_context(tokenizer, text, 5) == "big big big «small» the the the"
    long = [ids["big"]] * 40 + [ids["small"]] + [ids["the"]] * 40
    assert render_context(tokenizer, long, 40) == f"… {'big ' * 16}«small»{' the' * 8} …"


def test_a_tampered_shard_is_named(shards):
    folder, _ = shards
    path = folder / "shard.00001.mds.zstd"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"shard\.00001\.mds\.zstd: the content is not what index\.json says"):
        list(read_samples(folder / INDEX))


def test_contexts_are_found_without_reading_stored_states(shards, tmp_path, tokenizer):
    """At the shape of a real model, states are over 99 % of a shard."""
    folder, samples = shards
    with_states = [{**sample, "trunk_states": np.full((8, 500), 1.0, np.float32)} for sample in samples]
    stored = tmp_path / "stored"
    write_block(stored, with_states, {**COLUMNS, "trunk_states": "ndarray:float32"}, compression=None)
    path = stored / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-9] + b"\1" * 9)  # inside of the states
    with pytest.raises(UserError, match="the content is not what"):
        list(read_samples(stored / INDEX))
    (read, *_) = read_samples(stored / INDEX, columns=("input_ids", "sense_ids"))
    assert set(read) == {"input_ids", "sense_ids"}
    assert np.array_equal(read["sense_ids"], samples[0]["sense_ids"])
    for of_synonyms, rows in ((False, range(4, 6)), (True, range(9, 10))):
        found, expected = (
            find_contexts(place, 3, rows, tokenizer, of_synonyms=of_synonyms, per_row=2, scan=99)
            for place in (stored, folder)
        )
        assert found == expected
