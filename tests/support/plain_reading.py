"""Packed documents read by transformers one by one, with which tests compare our own reading."""

import functools
from typing import Any

import torch


def run_apart(
    model: Any, sequences: torch.Tensor, end: int, depth: int = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs a transformers model on each of the documents in packed sequences [B, T], one by one.

    A document ends with the end-of-text token, or with its sequence. Returns logits [B·T, V], the last
    hidden states [B·T, D] or those that enter the layer `depth`, and whether the next token belongs to the same
    document [B·T] bool.
    """
    documents: list[list[int]] = []
    for row in sequences.tolist():
        documents.append([])
        for token in row:
            if documents[-1][-1:] == [end]:
                documents.append([])
            documents[-1].append(token)
    # Padding is many equal documents of one token: equal ones are run once.
    run = functools.cache(lambda *document: model(torch.tensor([document]), output_hidden_states=True))
    outputs = [run(*document) for document in documents]
    logits = torch.cat([output.logits[0] for output in outputs])
    states = torch.cat([output.hidden_states[depth][0] for output in outputs])
    return logits, states, torch.tensor([i + 1 < len(document) for document in documents for i in range(len(document))])
