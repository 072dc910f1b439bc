"""Checks of a model's architecture that need only its config.json and run before anything else is built from it.

The model is a teacher or a pretrained student.

The model is built on the meta device, without memory for its parameters. Checks that need the weights run when the
model is first loaded (:mod:`dskd.models.checks.probes`).
"""

from typing import Any

from dskd.config import CorpusConfig
from dskd.errors import UserError
from dskd.models.checks.head_probe import find_logit_transform
from dskd.models.checks.probes import accepts, takes_positions
from dskd.models.files.folder import ModelFolder
from dskd.models.files.weights import LAYER_NAME
from dskd.models.limits import original_positions, rope_scaling
from dskd.models.structure.base_model import base_model
from dskd.models.structure.causal_lm import empty_model

# These failed a trial on two ranks with different tokens, under ZeRO-3 with all experts gathered as one module.
_UNGATHERABLE = ("dbrx", "jetmoe")
# These keep the states of a run in their modules, and the next run continues from them, with or without `use_cache`.
_STATEFUL = ("recurrent_gemma",)


def check_architecture(folder: ModelFolder, corpus: CorpusConfig) -> Any:
    """Builds a teacher or a pretrained student on the meta device, and refuses it if this package does not support it.

    Args:
        folder: the model; only its config.json is read.
        corpus: the section `corpus` of the config, for the length of sequences and what is in them.

    Returns:
        The model, on the meta device.

    Raises:
        UserError: when the model is refused, with the reason.
    """
    model = empty_model(folder)
    where = f"{folder.path}: {type(model).__name__}"
    find_logit_transform(model, folder)
    width, hidden_size = model.get_output_embeddings().weight.shape[1], model.config.hidden_size
    if width != hidden_size:
        raise UserError(
            f"{where}: the output matrix reads states of {width} values, and hidden_size of config.json is "
            f"{hidden_size}; a model that projects its last hidden states is not supported"
        )
    base, count = base_model(model), model.config.num_hidden_layers
    numbers = {int(layer.group(1)) for name, _ in model.named_parameters() if (layer := LAYER_NAME.search(name))}
    if numbers != set(range(count)):
        raise UserError(
            f"{where}: config.json names {count} layers, but their parameters are not called layers.N, h.N or "
            "blocks.N; such a model is not supported"
        )
    if missing := [name for name in ("input_ids", "inputs_embeds", "use_cache") if not accepts(base, name)]:
        raise UserError(f"{where} cannot be run here: its forward does not take {', '.join(missing)}")
    if noise := getattr(model.config, "router_jitter_noise", None):
        raise UserError(
            f"{where} is a mixture of experts that chooses them at random in training (router_jitter_noise: {noise}), "
            "so a run would not be a function of its seed; such a model is not supported"
        )
    if model.config.model_type in _STATEFUL:
        raise UserError(
            f"{where} keeps recurrent states from one batch to the next, so its states would depend on the batch "
            "before; such a model is not supported"
        )
    if model.config.model_type in _UNGATHERABLE:
        raise UserError(
            f"{where} is a mixture of experts whose weights are read outside of the module that holds them: ranks with "
            "different tokens cannot gather them; such a model is not supported"
        )
    _check_sequences(model.config, corpus, where, with_positions=takes_positions(base))
    return model


def _check_sequences(model_config: Any, corpus: CorpusConfig, where: str, *, with_positions: bool) -> None:
    """Refuses sequence settings with which a document's states would depend on other text in its sequence or batch."""
    if corpus.packing == "documents" and not with_positions:
        raise UserError(
            f"{where} does not keep documents apart that share a sequence: it takes no positions. Set "
            "corpus.packing to stream, if they may see each other, or to none, which gives each a sequence of its own",
            known_to_all_ranks=True,
        )
    length = corpus.sequence_length
    chunk = getattr(model_config, "attention_chunk_size", None)
    if corpus.packing == "documents" and chunk and length > chunk:
        raise UserError(
            f"{where} attends in chunks of {chunk} positions (attention_chunk_size), which would cut packed documents "
            f"in other places than single ones; set corpus.sequence_length, now {length}, to at most {chunk}, or "
            "corpus.packing to stream or none"
        )
    kind, _ = rope_scaling(model_config)
    limit = getattr(model_config, "max_position_embeddings", None)
    if kind == "dynamic" and limit and length > limit:
        raise UserError(
            f"{where} computes its rotary table anew for batches of more than {limit} positions (rope_type: dynamic), "
            "so its states would depend on which sequences share a batch, and on the batch before; set "
            f"corpus.sequence_length, now {length}, to at most {limit}"
        )
    original = original_positions(model_config)
    if corpus.packing != "stream" and kind == "longrope" and original and length > original:
        raise UserError(
            f"{where} has one set of rotary factors for batches of up to {original} positions and another for longer "
            "ones (longrope), so its states would depend on which sequences share a batch; set corpus.sequence_length, "
            f"now {length}, to at most {original}, or corpus.packing to stream"
        )
