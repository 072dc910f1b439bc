"""The stage `launcher/build_senses.py`: lexicon, teacher and text become `WORKDIR/senses`."""

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from dskd.config import Config, SensesConfig
from dskd.console import progress_bar, say, stage
from dskd.distributed import World, barrier, main_first, on_main
from dskd.errors import UserError
from dskd.lexicon.relations import FOLDER as LEXICON_FOLDER
from dskd.lexicon.relations import MADE_BY as LEXICON_MADE_BY
from dskd.lexicon.relations import load_lexicon
from dskd.manifest import Building, Recipe, is_current, read_manifest
from dskd.model_folder import ModelFolder, find_teacher
from dskd.models import load_frozen
from dskd.random_numbers import derived_seed
from dskd.senses.dictionary import FILE, FOLDER, save_dictionary
from dskd.senses.entries import Entries, build_entries
from dskd.senses.gather import TokenStates, gather_states
from dskd.senses.kmeans import groups, kmeans
from dskd.senses.spans import compose_spans
from dskd.sequences import load_sequences


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """What decides the content of the dictionary. The batch size does not."""
    lexicon = read_manifest(config.path(LEXICON_FOLDER), "lexicon", made_by=LEXICON_MADE_BY)
    _, sequences = load_sequences(config, "train", teacher.tokenizer_digest)
    settings = config.senses.as_dict() | {"seed": config.seed, "precision": config.precision}
    del settings["batch_size"]
    return Recipe(
        "senses",
        {"lexicon": lexicon.digest, "sequences": sequences.digest},
        settings,
        teacher=teacher.digest,
        tokenizer=teacher.tokenizer_digest,
    )


def build_senses(config: Config, world: World, *, force: bool = False) -> None:
    """Gathers states on all ranks, clusters them where they are owned, and writes the dictionary on rank 0.

    A dictionary that is up to date is left as it is, but with `force`.
    """
    target = config.path(FOLDER)
    source = main_first(lambda: find_teacher(config))
    wanted = main_first(lambda: recipe(config, source))
    if not force and on_main(lambda: is_current(target, wanted)):
        say(f"up to date: {target}")
        return
    sources = [config.path(name) for name in ("lexicon", "sequences")]
    with stage("senses: teacher states to sense embeddings", reads=sources, writes=target / FILE):
        teacher = load_frozen(source, config, world)
        sequences, _ = load_sequences(config, "train", source.tokenizer_digest)
        building = Building(target, wanted)
        on_main(building.clear)
        states = gather_states(teacher, sequences, config.senses, config.seed, world)
        vocab_size, tokenizer = teacher.vocab_size, source.load_tokenizer()
        teacher.close()

        tokens, sizes, vectors, counts = cluster(states, config.senses, config.seed, world.device)
        part = {"tokens": tokens, "sizes": sizes, "vectors": vectors.to(torch.bfloat16), "counts": counts}
        save_file(part, building.folder / f"part-{world.rank}.safetensors")
        barrier()
        on_main(lambda: _merge(config, building, world.world_size, vocab_size, tokenizer))


def cluster(
    states: TokenStates, settings: SensesConfig, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sense embeddings of every token of `states`: at most k each; a token with at most k states keeps them.

    Returns:
        Tokens [m], rows of each [m], vectors [R, D] in the order of tokens, and states behind each row [R].
    """
    k = settings.k
    state_counts = states.offsets.diff()
    sizes = state_counts.clamp(max=k)
    offsets = F.pad(sizes.cumsum(0), (1, 0))
    vectors = torch.empty(int(offsets[-1]), states.states.shape[1])
    counts = torch.ones(int(offsets[-1]), dtype=torch.int64)

    few = (state_counts <= k).nonzero().squeeze(-1)
    vectors[_ranges(offsets[few], sizes[few])] = states.states[_ranges(states.offsets[few], sizes[few])].float()

    many = (state_counts > k).nonzero().squeeze(-1)
    cluster_seed = derived_seed(seed, "senses", "kmeans")
    with progress_bar(total=len(many), label="k-means", unit="words") as bar:
        for indices, width in groups(state_counts[many], states.states.shape[1]):
            tokens = many[indices]
            rows = states.offsets[tokens].unsqueeze(-1) + torch.arange(width)
            mask = rows < states.offsets[tokens + 1].unsqueeze(-1)
            points = states.states[torch.where(mask, rows, 0)].to(device)
            found = kmeans(
                points,
                mask.to(device),
                k,
                seed=cluster_seed,
                keys=states.tokens[tokens],
                restarts=settings.restarts,
                max_iterations=settings.max_iterations,
            )
            place = _ranges(offsets[tokens], sizes[tokens])
            vectors[place] = found.centers.flatten(0, 1).cpu()
            counts[place] = found.counts.flatten().cpu()
            bar.update(len(tokens))
    return states.tokens, sizes, vectors, counts


def _merge(config: Config, building: Building, world_size: int, vocab_size: int, tokenizer: object) -> None:
    """Puts the ranks' parts together in the order of tokens, adds the spans, and publishes the dictionary."""
    paths = [building.folder / f"part-{rank}.safetensors" for rank in range(world_size)]
    parts = [load_file(path) for path in paths]
    tokens = torch.cat([part["tokens"] for part in parts])
    sizes = torch.cat([part["sizes"] for part in parts])
    starts = sizes.cumsum(0) - sizes
    order = tokens.argsort()
    rows = _ranges(starts[order], sizes[order])
    vectors = torch.cat([part["vectors"] for part in parts])[rows]
    counts = torch.cat([part["counts"] for part in parts])[rows]
    if not len(vectors):
        raise UserError("the teacher's states belong to no token at all: the training sequences have no target")
    token_sizes = torch.zeros(vocab_size, dtype=torch.int64)
    token_sizes[tokens] = sizes
    token_offsets = F.pad(token_sizes.cumsum(0), (1, 0))

    relations = load_lexicon(config)
    entries, facts = build_entries(relations, tokenizer, vocab_size, config.senses.surface_forms)
    span_vectors, span_counts, span_sizes = compose_spans(
        entries.span_tokens, vectors, counts, token_offsets, config.senses.k
    )
    entry_offsets = torch.cat([token_offsets, token_offsets[-1] + span_sizes.cumsum(0)])
    save_dictionary(
        building.folder / FILE,
        torch.cat([vectors, span_vectors.to(torch.bfloat16)]),
        torch.cat([counts, span_counts]),
        entry_offsets,
        entries,
    )
    for path in paths:
        path.unlink()
    building.facts.update(
        rows=int(entry_offsets[-1]),
        tokens_with_senses=len(tokens),
        spans_with_senses=int((span_sizes > 0).sum()),
        states=int(counts.sum()),
        **facts,
        **_relations_with_senses(entries, entry_offsets),
    )
    building.publish()
    say(
        f"  {building.facts['rows']:,} sense embeddings from {int(counts.sum()):,} states: {len(tokens):,} of "
        f"{vocab_size:,} tokens and {building.facts['spans_with_senses']:,} of {facts['spans']:,} spans have senses"
    )
    for name in ("synonym", "antonym"):
        usable, all_pairs = building.facts[f"{name}_pairs_with_senses"], facts[f"{name}_pairs"]
        heads = facts[f"tokens_with_{name}s"]
        say(f"  {all_pairs:,} {name} pairs of {heads:,} tokens, {usable:,} of them with senses on both sides")
    unusable = {why: number for why, number in facts.items() if why.startswith(("head", "neighbour"))}
    say(
        "  pairs the tokenizer cannot express: "
        + ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in unusable.items())
    )


def _relations_with_senses(entries: Entries, entry_offsets: torch.Tensor) -> dict[str, int]:
    """How many pairs have senses on both sides, and so can act in training."""
    has_rows = entry_offsets.diff() > 0
    facts = {}
    for relation in ("synonym", "antonym"):
        offsets, tails = getattr(entries, f"{relation}_offsets"), getattr(entries, f"{relation}_entries")
        heads = torch.arange(entries.vocab_size).repeat_interleave(offsets.diff())
        facts[f"{relation}_pairs_with_senses"] = int((has_rows[heads] & has_rows[tails.long()]).sum())
    return facts


def _ranges(starts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The integers starts[j] … starts[j] + sizes[j] - 1 for every j, end to end."""
    before = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) + (starts - before).repeat_interleave(sizes)
