"""Our training step against a plain implementation of the published algorithm (docs/method.md, sections 3 and 4).

    python -m benchmarks.published

In the published form everything happens inside the step, one sequence at a time: the teacher continues the prompt
greedily, token by token; teacher and student compute whole logits; a loop over positions looks up each target in
dictionaries of senses, synonyms and antonyms and searches for the nearest rows; the optimizer is plain AdamW. Both
sides have the same models, tokens and number format, and take turns. The result is the ratio of tokens per second.

One thing on the published side follows the paper instead of its code: a position is not pushed from its target's own
senses. There is no gradient accumulation; each sequence is a step.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.profiling import profile_steps, shares_text
from benchmarks.report import Spread, machine, parse, publish, take_turns
from benchmarks.workload import (
    OurTraining,
    build_workload_parser,
    read_config,
    read_tokens,
    work_directory,
)
from dskd.config import Config, LossConfig
from dskd.distributed.rendezvous import initialize, shutdown
from dskd.models.files.folder import find_teacher
from dskd.models.running.precision import compute_dtype
from dskd.models.structure.trained import choose_trained
from dskd.senses.dictionary import SenseDictionary, load_dictionary
from dskd.students.student import find_student

_NEIGHBOURS = 25  # number of synonyms, and of antonyms, that a position considers
_NEW_TOKENS = 10


@dataclass(frozen=True)
class Lexicon:
    """Senses, synonyms and antonyms as Python dictionaries by token, as in the published code."""

    senses: dict[int, torch.Tensor]  # [k, D] each
    synonyms: dict[int, list[int]]
    antonyms: dict[int, list[int]]

    @classmethod
    def of(cls, dictionary: SenseDictionary, tokens: set[int], device: torch.device) -> "Lexicon":
        """Takes the senses of `tokens` and their neighbours to the device."""

        def neighbours(relation: str) -> dict[int, list[int]]:
            lists = dictionary.entries.neighbours(relation)
            return {token: listed for token in tokens if (listed := lists.of(token))}

        synonyms, antonyms = neighbours("synonym"), neighbours("antonym")
        related = tokens.union(*synonyms.values(), *antonyms.values())
        senses = {entry: dictionary.read(dictionary.rows_of(entry)).to(device) for entry in related}
        return cls({entry: rows for entry, rows in senses.items() if len(rows)}, synonyms, antonyms)


def choose_positions(targets: list[int], lexicon: Lexicon, loss: LossConfig) -> tuple[list[int], list[int]]:
    """Draws positions for the relation term, and the same number (or all, if fewer) for the own term."""
    related = [i for i, y in enumerate(targets) if y in lexicon.synonyms or y in lexicon.antonyms]
    with_senses = [i for i, y in enumerate(targets) if y in lexicon.senses]
    count = min(len(related), max(round(loss.relation_share * len(related)), loss.min_relations))
    return random.sample(related, count), random.sample(with_senses, min(count, len(with_senses)))


def sense_loss(
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    targets: list[int],
    relation: list[int],
    own: list[int],
    lexicon: Lexicon,
    loss: LossConfig,
    kappa: int,
) -> torch.Tensor:
    """Computes L_sense of one sequence, position by position; `hidden` and `teacher_hidden` are [L, D].

    `relation` and `own` are the positions of the two terms.
    """

    def nearest(entries: Sequence[int], i: int) -> torch.Tensor:
        rows = torch.cat([lexicon.senses[entry] for entry in entries if entry in lexicon.senses]).float()
        distances = (rows - teacher_hidden[i].float()).norm(dim=-1)
        return rows[distances.topk(min(kappa, len(rows)), largest=False).indices]

    def distance(i: int, rows: torch.Tensor) -> torch.Tensor:
        return (hidden[i].float() - rows).square().mean(dim=-1)

    # Relation term: a pull to the rows nearest to the teacher's state, a hinged push from the nearest antonym rows.
    terms = []
    for i in relation:
        y = targets[i]
        synonyms, antonyms = lexicon.synonyms.get(y, []), lexicon.antonyms.get(y, [])
        synonyms = random.sample(synonyms, min(_NEIGHBOURS, len(synonyms)))
        antonyms = random.sample(antonyms, min(_NEIGHBOURS, len(antonyms)))
        term = distance(i, nearest([y, *synonyms], i)).mean()
        if antonyms:
            hinge = (loss.margin - distance(i, nearest(antonyms, i))).clamp(min=0)
            term = term + loss.antonym_weight * hinge.mean()
        terms.append(term)
    terms += [distance(i, nearest([targets[i]], i)).mean() for i in own]
    return torch.stack(terms).mean() if terms else hidden.new_zeros(())


def logit_losses(
    logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean CE and the mean KL(teacher || student) of whole logits [L, V]."""
    ce = F.cross_entropy(logits.float(), targets)
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.softmax(teacher_logits.float() / temperature, dim=-1)
    return ce, F.kl_div(student, teacher, reduction="batchmean")


class PublishedTraining:
    """Training by the published algorithm, with models from transformers."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device
        dtype = compute_dtype(config.precision, device)
        self._teacher = _load(find_teacher(config).path, dtype, device).eval().requires_grad_(False)
        self._student = _load(find_student(config).path, dtype, device).train()
        trained = choose_trained(self._student, config.student)
        self._optimizer = torch.optim.AdamW(
            trained, lr=config.train.peak_learning_rate, weight_decay=config.train.weight_decay
        )
        self._sequences = torch.from_numpy(read_tokens(config)).long()
        # The tokens of the prompts. A continuation may contain others, which then have no senses.
        tokens = set(self._sequences[:64].unique().tolist())
        self._lexicon = Lexicon.of(load_dictionary(config)[0], tokens, device)
        self._step = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a sequence; the few that the random cut removes are counted as trained."""
        return self._config.corpus.sequence_length

    def step(self) -> None:
        """Trains on one sequence: continuation, both models, the three losses, AdamW."""
        prompt = self._sequences[self._step % 64, :-_NEW_TOKENS].to(self._device)[None]
        self._step += 1
        ids = self._teacher.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            pad_token_id=0,
        )
        # The published method cuts the continuation at a random length.
        ids = ids[:, : prompt.shape[1] + random.randint(1, _NEW_TOKENS)]
        with torch.no_grad():
            teacher = self._teacher(ids, output_hidden_states=True, use_cache=False)
        student = self._student(ids, output_hidden_states=True, use_cache=False)
        loss, targets = self._config.loss, ids[0, 1:]
        ce, kl = logit_losses(student.logits[0, :-1], teacher.logits[0, :-1], targets, loss.temperature)
        listed = targets.tolist()
        relation, own = choose_positions(listed, self._lexicon, loss)
        hidden, teacher_hidden = student.hidden_states[-1][0], teacher.hidden_states[-1][0]
        kappa = self._config.annotation.kappa
        sense = sense_loss(hidden, teacher_hidden, listed, relation, own, self._lexicon, loss, kappa)
        total = loss.ce_weight * ce + loss.kd_weight * loss.temperature**2 * kl + loss.sense_weight * sense
        total.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _load(folder: Any, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_workload_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sequences",
        type=int,
        default=4,
        help="published steps per round, each of one sequence, against one step of ours",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="print the kinds of operations that take the time of both; measure nothing else",
    )
    args = parse(parser, arguments)
    at_start = machine()
    random.seed(0)
    with work_directory(args) as path:
        world = initialize()
        config = read_config(path, args.overrides)
        ours, published = OurTraining(config, world), PublishedTraining(config, world.device)

        def published_steps() -> None:
            for _ in range(args.sequences):
                published.step()

        if args.profile:
            for name, step in (("dskd", ours.step), ("published", published_steps)):
                print(f"{name}\n{shares_text(profile_steps(step)[0])}", flush=True)
            return
        seconds = take_turns({"dskd": ours.step, "published": published_steps}, rounds=args.rounds)
        ours.close()
        shutdown()
    rates = {
        "dskd": [ours.tokens_per_step / s for s in seconds["dskd"]],
        "published": [args.sequences * published.tokens_per_step / s for s in seconds["published"]],
    }
    ratio = Spread.of(one / other for one, other in zip(rates["dskd"], rates["published"], strict=True))
    rows = [[name, Spread.of(values).text(",.0f"), ""] for name, values in rates.items()]
    rows.append(["times as fast", ratio.text(".1f"), ">= 20 on a GPU, >= 5 on a CPU"])
    results = {name: Spread.of(values).as_dict() for name, values in rates.items()} | {"ratio": ratio.as_dict()}
    publish(args, "benchmarks.published", ("tokens/s", "figure", "goal"), rows, results, at_start)


if __name__ == "__main__":
    main(sys.argv[1:])
