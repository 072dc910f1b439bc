"""Evaluation on held-out text: next-token prediction, agreement with the teacher, and alignment with sense embeddings.

| measure | definition, over target positions of the validation shards |
|---|---|
| perplexity | exp of the mean cross-entropy |
| accuracy | share of positions whose most probable token is the actual next one |
| agreement | share of positions whose most probable token is the teacher's |
| lexical_perplexity | perplexity over positions whose target has a synonym or antonym |
| sense_alignment | share of the positions with rows in both P_i and N_i whose state is nearest to a row of P_i |

A model whose states are not of the teacher's width, which is that of the rows, has no sense_alignment.

The sums that make up each measure are also saved for each sample (:mod:`dskd.evaluation.scores_by_example`), so that
runs can be compared sample by sample.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dskd import shards
from dskd.artifacts import kinds
from dskd.artifacts.manifest import Manifest, Recipe
from dskd.config import Config
from dskd.console import progress_bar
from dskd.distributed.collectives import main_first, on_main, sum_over_ranks
from dskd.distributed.node_cache import open_node_cache
from dskd.distributed.world import World
from dskd.evaluation import continued_texts, suite
from dskd.evaluation.evaluations import HELD_OUT
from dskd.evaluation.models import TEACHER, EvaluatedModel, candidates, load_candidate, same_on_all_ranks
from dskd.evaluation.scores_by_example import Examples, Measure, save_examples
from dskd.evaluation.suite import EXAMPLES_FILE, Measurement, Outcome
from dskd.models.files.folder import ModelFolder
from dskd.models.running.frozen import FrozenModel
from dskd.models.running.precision import resolve_precision
from dskd.models.running.readouts import chunk_size, next_token
from dskd.models.structure.output_head import OutputHead
from dskd.senses.dictionary import SenseDictionary, load_dictionary

MEASURES = (
    Measure("perplexity", "nll", "tokens", lower_is_better=True, is_exponential=True),
    Measure("accuracy", "correct", "tokens"),
    Measure("agreement", "agree", "tokens"),
    Measure("lexical_perplexity", "lexical_nll", "lexical_tokens", lower_is_better=True, is_exponential=True),
    Measure("sense_alignment", "aligned", "alignable"),
)
_SUMS = ("nll", "tokens", "correct", "agree", "lexical_nll", "lexical_tokens", "aligned", "alignable")  # of a sample
_NOT_INTEGERS = ("nll", "lexical_nll")


@dataclass(frozen=True)
class HeldOutInputs:
    """The artifacts that every model is measured with."""

    teacher: ModelFolder
    dictionary: SenseDictionary
    senses: Manifest  # of the dictionary
    validation: Manifest  # of the shards
    requests: Sequence[continued_texts.Request]  # that every model answers


def open_inputs(config: Config, teacher: ModelFolder) -> HeldOutInputs:
    """Opens the sense dictionary and the manifest of the validation shards, unless one of them is missing or damaged
    (UserError), and tokenizes the requests.
    """
    dictionary, senses = load_dictionary(config)
    validation = shards.load_manifest(config, "validation")
    return HeldOutInputs(teacher, dictionary, senses, validation, continued_texts.read_requests(config, teacher))


def recipe(config: Config, candidate: EvaluatedModel, inputs: HeldOutInputs) -> Recipe:
    """Returns everything that a model's measures depend on; the batch size is not part of it."""
    return Recipe(
        kinds.EVALUATION.name,
        {"model": candidate.folder.digest, "shards": inputs.validation.digest, "senses": inputs.senses.digest},
        {"precision": resolve_precision(config.precision), **continued_texts.settings(config, inputs.requests)},
        inputs.teacher.digest,
        inputs.teacher.tokenizer_digest,
    )


def _measurements(config: Config, models: Sequence[EvaluatedModel], inputs: HeldOutInputs) -> list[Measurement]:
    reads = [config.path(kinds.SHARDS.folder, "validation")]
    return [Measurement(HELD_OUT, model, recipe(config, model, inputs), reads) for model in models]


def are_current(config: Config, teacher: ModelFolder | None = None) -> bool:
    """Returns True if every model has measures, and they are of that model and this text.

    `teacher` is the config's, if it was found before.
    """
    models = candidates(config, teacher)
    inputs = open_inputs(config, models[0].folder)
    return all(measurement.is_current(config) for measurement in _measurements(config, models, inputs))


def evaluate(
    config: Config, world: World, models: Sequence[EvaluatedModel] | None = None, *, force: bool = False
) -> HeldOutInputs:
    """Measures models whose measures are not up to date, or with `force` all, and writes `WORKDIR/evaluation/NAME`.

    All ranks must call it. `models` are the models, the teacher first, if they have already been found. Returns the
    artifacts that the models were measured with.
    """
    models = models or same_on_all_ranks(lambda: candidates(config))
    teacher = models[0]
    inputs = main_first(lambda: open_inputs(config, teacher.folder))
    on_main(
        lambda: shards.require_fitting(
            config,
            "validation",
            inputs.validation,
            senses=inputs.senses.digest,
            teacher=teacher.folder.digest,
            tokenizer=teacher.folder.tokenizer_digest,
        )
    )
    stale = suite.find_stale(config, _measurements(config, models, inputs), force=force)
    if not stale:
        return inputs
    text = HeldOutText(config, inputs, world)
    folders = [model.folder for model in models]
    requests = main_first(lambda: continued_texts.Prompts.of_requests(config, inputs.requests, folders))
    prompts = [requests, text.prompts(config)]
    # The teacher comes first: the other models are compared with its predictions.
    predictions: list[torch.Tensor] = []
    if stale[0].candidate.name != TEACHER:
        model = load_candidate(teacher, config, world)
        measure(model, text, predictions, world, label="teacher's predictions")
        model.close()

    def measure_model(model: FrozenModel, measurement: Measurement) -> Callable[[], Outcome]:
        examples = measure(model, text, predictions, world, label="evaluating")
        write_continuations = functools.partial(
            continued_texts.write_continuations,
            teacher=teacher.folder,
            prompts=prompts,
            continuations=[row for group in prompts for row in continued_texts.continue_prompts(model, group)],
            name=measurement.candidate.name,
            teachers=HELD_OUT.folder_of(config, TEACHER),
        )
        return functools.partial(_outcome, examples, write_continuations if any(map(len, prompts)) else None)

    suite.run(config, world, stale, measure_model, force=force)
    return inputs


def _outcome(examples: Examples, write_continuations: Callable[[Path], None] | None) -> Outcome:
    measures = examples.values()

    def write_files(folder: Path) -> None:
        save_examples(folder / EXAMPLES_FILE, examples)
        if write_continuations is not None:
            write_continuations(folder)

    return Outcome(
        measures,
        measures,
        examples.data,
        write_files,
        lines=[", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in measures.items())],
        tables=[] if write_continuations is None else [continued_texts.CONTINUATIONS_TABLE],
        files=[] if write_continuations is None else [continued_texts.CONTINUATIONS_TEXT],
    )


class HeldOutText:
    """The validation shards, which every model reads in the same batches."""

    def __init__(self, config: Config, inputs: HeldOutInputs, world: World) -> None:
        validation, cache = inputs.validation, open_node_cache(config.train.shard_cache, world)
        self._dataset = shards.open_shards(config, "validation", cache, world, batch_size=1)
        self._vectors = inputs.dictionary.mapped
        self._sense_width = inputs.dictionary.hidden_size
        self._batch_size = config.evaluation.batch_size
        self._world = world
        self.num_samples = validation.facts["samples"]  # len(dataset) is only this rank's share
        # The digest covers the held-out tokens, not their annotation; older shards only have their own digest.
        self.digest = validation.facts.get("text", validation.digest)
        # Digests of the data that a measure depends on in addition to the text.
        self.measured_with = {"agreement": validation.teacher, "sense_alignment": validation.digest}
        self.loss_chunk_size = config.train.loss_chunk_size

    def compares_senses(self, model: FrozenModel) -> bool:
        """Returns True if the model's states have the width of the sense embeddings."""
        return model.hidden_size == self._sense_width

    def prompts(self, config: Config) -> continued_texts.Prompts:
        """Returns the prompts that the models continue."""
        first = range(min(continued_texts.Prompts.num_rows(config), self.num_samples))
        return continued_texts.Prompts.of(config, shards.collate_tokens([self._dataset[index] for index in first]))

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields this rank's batches; every rank gets the same number, and the last one may have no targets.

        `samples` [B] holds the indices of a batch's samples.
        """
        starts = range(0, self.num_samples, self._batch_size)
        for number in self._world.turns(len(starts)):
            start = starts[number or 0]
            stop = min(start + self._batch_size, self.num_samples)
            samples = [self._dataset[index] for index in range(start, stop)]
            batch = shards.collate_tokens(samples)
            synonyms = torch.stack([torch.tensor(sample[shards.SYNONYM_ROWS]) for sample in samples])
            antonyms = torch.stack([torch.tensor(sample[shards.ANTONYM_ROWS]) for sample in samples])
            if number is None:
                batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
            batch["samples"] = torch.arange(start, stop)
            # The nearest of the target's own rows to the teacher's state; -1 if it has no rows.
            batch["nearest_sense"] = torch.stack([torch.tensor(sample[shards.OWN_ROWS][:, 0]) for sample in samples])
            batch["lexical"] = (synonyms[..., 0] >= 0) | (antonyms[..., 0] >= 0)
            both = ((synonyms[..., 0] >= 0) & (antonyms[..., 0] >= 0) & batch["loss_mask"]).flatten()
            batch["aligned_positions"] = both.nonzero().squeeze(-1)
            near, far = synonyms.flatten(0, 1)[both].numpy(), antonyms.flatten(0, 1)[both].numpy()
            batch["sense_rows"], (batch["near"], batch["far"]) = shards.gather_rows(self._vectors, [near, far])
            yield batch


def measure(
    model: FrozenModel, text: HeldOutText, predictions: list[torch.Tensor], world: World, *, label: str
) -> Examples:
    """Returns the sums that make up a model's measures, for each sample of all ranks, on every rank.

    `predictions` holds the teacher's predicted tokens by batch. If it is empty, `model` is the teacher and its
    predictions are appended.
    """
    compares_senses = text.compares_senses(model)
    is_teacher, size = not predictions, chunk_size(text.loss_chunk_size, model.vocab_size, world.device)
    # One rank fills in each sample, and adding the other ranks' zeros is exact: the number of ranks changes nothing.
    sums = torch.zeros(text.num_samples, len(_SUMS), dtype=torch.float64)
    with progress_bar(total=text.num_samples, label=label, unit="sequences") as bar:
        for number, batch in enumerate(text.batches()):
            mask = batch["loss_mask"].to(world.device)
            labels = batch["labels"].to(world.device)[mask]
            hidden, (nll, predicted) = model.read(
                batch["input_ids"],
                batch.get("position_ids"),
                functools.partial(_read_next_token, mask=mask, labels=labels, chunk_size=size),
            )
            if is_teacher:
                predictions.append(predicted)
            # Of all targets [n], those with relations; of all positions [B, T], those with rows in both P_i and N_i.
            lexical = batch["lexical"].to(world.device)[mask]
            alignable = torch.zeros_like(mask)
            aligned = torch.zeros(0, dtype=torch.bool, device=world.device)
            if compares_senses:
                alignable.view(-1)[batch["aligned_positions"].to(world.device)] = True
                aligned = alignment(hidden.flatten(0, 1), batch, world.device)
            # The columns of `_SUMS`, each [B]: one sum over the positions of a sample.
            parts = (
                _by_sample(nll, mask),
                mask.sum(-1),
                _by_sample(predicted == labels, mask),
                _by_sample(predicted == predictions[number], mask),
                _by_sample(nll.masked_fill(~lexical, 0.0), mask),
                _by_sample(lexical, mask),
                _by_sample(aligned, alignable),
                alignable.sum(-1),
            )
            sums[batch["samples"]] += torch.stack([part.double() for part in parts], dim=-1).cpu()
            bar.update(min(len(mask) * world.world_size, bar.total - bar.n))
    columns = sum_over_ranks(sums.to(world.device)).T.cpu().numpy()
    return Examples(
        text.digest,
        [str(number) for number in range(text.num_samples)],
        {
            name: column if name in _NOT_INTEGERS else column.astype(np.int64)
            for name, column in zip(_SUMS, columns, strict=True)
        },
        [
            replace(each, data=text.measured_with.get(each.name))
            for each in MEASURES
            if compares_senses or each.total != "aligned"
        ],
    )


def _by_sample(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the sum [B] of each row's values; `values` holds one for each true position of `mask` [B, T]."""
    return (
        torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_scatter(mask, values.double()).sum(-1)
    )


def _read_next_token(
    hidden: torch.Tensor, head: OutputHead, *, mask: torch.Tensor, labels: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    return hidden, next_token(hidden[mask], labels, head, chunk_size)


def alignment(states: torch.Tensor, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Returns, for each position with rows in both P_i and N_i, whether the nearest row of P_i is nearer [n].

    `states` [B * T, D] are the model's last hidden states.
    """
    positions = batch["aligned_positions"].to(device)
    if not len(positions):
        return torch.zeros(0, dtype=torch.bool, device=device)
    aligned, rows = states[positions].float(), batch["sense_rows"].to(device).float()
    nearest = []
    for name in ("near", "far"):
        index = batch[name].to(device)
        squares = (aligned.unsqueeze(1) - rows[index.clamp(min=0)]).square().sum(-1)
        nearest.append(squares.masked_fill(index < 0, torch.inf).min(-1).values)
    return nearest[0] < nearest[1]
