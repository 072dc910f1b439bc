"""The stage in which the teacher writes texts: `WORKDIR/written`.

The random numbers of a text depend on the seed, the sense and the number of the text, so any number of ranks, and a
resumed run, writes the same texts. `corpus.batch_size` can change them: in another batch the last digits of the
probabilities differ. A server writes other texts each time.
"""

import contextlib
import time
from typing import Any

from dskd.artifacts import kinds
from dskd.artifacts.building import Building
from dskd.artifacts.disk_space import report_full_disk
from dskd.artifacts.hashing import MANIFEST_NAME, digest_of_json
from dskd.artifacts.manifest import Recipe, is_current, read_manifest
from dskd.config import Config
from dskd.config.data import KEYS_OF_TEXTS
from dskd.config.server_url import shown_url
from dskd.console import say, stage
from dskd.corpus.written.blocks import blocks_of, is_written, join_blocks, read_writer
from dskd.corpus.written.prompts import WritingPrompter
from dskd.corpus.written.requests import Request, find_senses, make_requests
from dskd.distributed.collectives import barrier, gather_json, main_first, on_main
from dskd.distributed.world import World
from dskd.errors import UserError
from dskd.lexicon.wordnet import open_wordnet
from dskd.models.files.folder import ModelFolder, find_teacher
from dskd.models.limits import vocabulary_size
from dskd.models.running.precision import resolve_precision


def recipe(config: Config, teacher: ModelFolder) -> Recipe:
    """Returns the recipe of the texts: every input and setting that affects them, except for the size of a batch.

    With a server, its URL and the name of its model stand for the teacher.
    """
    corpus = config.corpus.as_dict()
    settings: dict[str, Any] = {"seed": config.seed} | {key: corpus[key] for key in KEYS_OF_TEXTS}
    inputs = {"wordnet": open_wordnet(config.wordnet.path).digest}
    if config.corpus.server is not None:
        settings["server_model"] = corpus["server_model"]
        settings["server"] = _server_of_recipe(config)
        return Recipe(kinds.WRITTEN.name, inputs, settings, tokenizer=teacher.tokenizer_digest)
    inputs["chat_template"] = digest_of_json(getattr(teacher.tokenizer, "chat_template", None))
    settings["precision"] = resolve_precision(config.precision)
    return Recipe(kinds.WRITTEN.name, inputs, settings, teacher=teacher.digest, tokenizer=teacher.tokenizer_digest)


def _server_of_recipe(config: Config) -> str:
    """Returns the URL of the server as manifests have it, without a path that may hold a key.

    Texts of earlier versions have the whole URL in their manifest, and stay up to date.
    """
    folder, url = config.path(kinds.WRITTEN.folder), config.corpus.server
    assert url is not None, "called only if corpus.server is set"
    shown = shown_url(url)
    if shown != url and (folder / MANIFEST_NAME).is_file():
        with contextlib.suppress(UserError):  # a damaged one is not up to date anyway
            if read_manifest(folder, kinds.WRITTEN.name).config.get("server") == url:
                return url
    return shown


def write_texts(config: Config, world: World, *, force: bool = False) -> None:
    """Writes `WORKDIR/written/texts.parquet` on all ranks or, with a server, in one process; leaves texts that are up
    to date as they are.

    Raises:
        UserError: when the config has another source of text, the teacher does not fit, no word of WordNet is one token
            of it, or a server is to write for several ranks or refuses to.
        OutageError: when a server does not answer.
    """
    corpus = config.corpus
    if corpus.source != "teacher":
        raise UserError(
            f"corpus.source is {corpus.source}, so there is nothing for the teacher to write; set it to teacher",
            known_to_all_ranks=True,
        )
    if corpus.server is not None and world.world_size > 1:
        raise UserError(
            f"corpus.server sends the requests of one process, and this job has {world.world_size}; start it as "
            "`python launcher/write_texts.py`, and set corpus.server_requests to the number of requests at once",
            known_to_all_ranks=True,
        )
    teacher = main_first(lambda: find_teacher(config))
    building = Building(config.path(kinds.WRITTEN.folder), main_first(lambda: recipe(config, teacher)))
    if not force and on_main(lambda: is_current(building.path, building.recipe)):
        say(f"up to date: {building.path}")
        return
    if corpus.server is not None and read_writer(building.folder) is None:
        from dskd.corpus.written.server import Server

        Server(corpus).find_model()  # before WordNet is read, which takes far longer than to see that a URL is wrong
    writer = str(teacher.path) if corpus.server is None else shown_url(corpus.server)
    with stage("written: the teacher writes a text for every sense", reads=[writer], writes=building.path):
        prompter = WritingPrompter(teacher.tokenizer, config.seed)
        num_senses, requests = main_first(lambda: _find_requests(config, teacher))
        if corpus.server is None:
            how = "its chat template" if prompter.is_chat else "plain beginnings of texts: it has no chat template"
            say(f"  {len(requests):,} texts, asked for with {how}")
        _write_blocks(config, world, teacher, prompter, requests, building)
        building.facts["senses_of_one_token"] = num_senses
        with report_full_disk(building.folder):
            on_main(lambda: _publish(building, requests))


def _find_requests(config: Config, teacher: ModelFolder) -> tuple[int, list[Request]]:
    """Returns the number of all senses of words that are one token, and the requests.

    Raises:
        UserError: when there are none.
    """
    tokenizer, wordnet = teacher.tokenizer, open_wordnet(config.wordnet.path)
    senses = find_senses(wordnet, tokenizer, vocabulary_size(teacher.load_config()) or len(tokenizer), config.seed)
    if not senses:
        raise UserError(
            f"no word of WordNet ({wordnet.origin}) is one token of {teacher.path}, so there is no sense to write for; "
            "use a teacher whose tokenizer knows English words, or another corpus.source"
        )
    return len(senses), make_requests(senses, config.corpus)


def _write_blocks(
    config: Config,
    world: World,
    teacher: ModelFolder,
    prompter: WritingPrompter,
    requests: list[Request],
    building: Building,
) -> None:
    """Writes the blocks that an interruption has not left, on all ranks or with the server."""
    on_main(building.resume_or_clear)
    blocks = blocks_of(len(requests))
    done = on_main(lambda: [is_written(building.folder, block) for block in blocks])
    left = [block for block, is_done in zip(blocks, done, strict=True) if not is_done]
    if len(left) < len(blocks):
        say(f"  resuming: {len(blocks) - len(left)} of {len(blocks)} blocks were written before an interruption")
    if not left:
        if config.corpus.server is not None:
            building.facts["server_model"] = read_writer(building.folder)
        return
    started = time.perf_counter()
    with report_full_disk(building.folder):
        if config.corpus.server is not None:
            from dskd.corpus.written.server import write_with_server

            building.facts["server_model"] = write_with_server(config, prompter, requests, left, building.folder)
        else:
            from dskd.corpus.written.local import write_with_teacher

            written = write_with_teacher(config, world, teacher, prompter, requests, left, building.folder)
            seconds, tokens = time.perf_counter() - started, sum(gather_json(written))
            say(f"  {tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s of all ranks")
    barrier()


def _publish(building: Building, requests: list[Request]) -> None:
    texts = join_blocks(building.folder, blocks_of(len(requests)), requests)
    building.facts |= {"texts": len(texts), "characters": sum(map(len, texts))}
    building.publish()
