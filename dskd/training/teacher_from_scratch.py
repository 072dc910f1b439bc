"""Training of a small teacher from scratch, for machines without a model: byte-pair encoding, Llama, a token budget.

It exists so that the whole pipeline runs on real text within minutes on a laptop. Muon trains the weight matrices of
the layers, AdamW everything else; the learning rate rises over 5 % of the steps and falls linearly to 0.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from dskd.artifacts import kinds
from dskd.artifacts.building import build_artifact
from dskd.artifacts.disk_space import report_full_disk
from dskd.artifacts.manifest import Recipe, read_manifest
from dskd.config import Config, FromScratchConfig
from dskd.console import progress_bar, say, stage
from dskd.corpus.build import read_texts
from dskd.corpus.packing import pack
from dskd.corpus.sequences import Sequences, TokenBatch, open_sequences
from dskd.distributed.world import uses_gpu
from dskd.errors import UserError
from dskd.models.running.precision import compute_dtype, resolve_precision
from dskd.random_numbers import derived_seed
from dskd.students.new import intermediate_size
from dskd.training.muon import Float32Muon

END_OF_TEXT = "<|endoftext|>"
_WARMUP_SHARE = 0.05


def recipe(config: Config) -> Recipe:
    """Returns the recipe of the teacher that is trained from scratch."""
    documents = read_manifest(config.path(kinds.CORPUS.folder), kinds.CORPUS.name)
    assert config.teacher.train_from_scratch is not None
    settings = config.teacher.train_from_scratch.as_dict() | {
        "sequence_length": config.corpus.sequence_length,
        "packing": config.corpus.packing,
        "seed": config.seed,
        "precision": resolve_precision(config.precision),
    }
    return Recipe(kinds.TEACHER.name, {"corpus": documents.digest}, settings)


def build_teacher(config: Config) -> None:
    """Trains tokenizer and teacher on the training documents, and writes `WORKDIR/teacher`."""
    settings = config.teacher.train_from_scratch
    assert settings is not None
    target = config.path(kinds.TEACHER.folder)
    with stage("teacher: trained from scratch", reads=[config.path(kinds.CORPUS.folder)], writes=target):
        with build_artifact(target, recipe(config)) as building:
            tokenizer = train_tokenizer(read_texts(config, "train"), settings.vocab_size)
            tokenizer.save_pretrained(building.folder)
            sequence_length = config.corpus.sequence_length
            file = building.folder / "sequences.safetensors"
            packed = pack(
                read_texts(config, "train"),
                tokenizer,
                file,
                sequence_length=sequence_length,
                packing=config.corpus.packing,
            )
            if packed.tokens < sequence_length:
                raise UserError(
                    f"the corpus has {packed.tokens:,} tokens, fewer than one sequence of "
                    f"{sequence_length}: too few to train a teacher on; add text to corpus.train"
                )
            model = build_llama(settings, len(tokenizer), sequence_length, tokenizer, config.seed)
            loss = train_model(model, open_sequences(file), settings, config.seed, config.precision)
            file.unlink()
            with report_full_disk(building.folder):
                model.save_pretrained(building.folder, safe_serialization=True)
            building.facts.update(final_loss=loss, parameters=sum(p.numel() for p in model.parameters()))
        say(f"  {sum(p.numel() for p in model.parameters()):,} parameters, training perplexity {math.exp(loss):.1f}")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Trains a byte-level byte-pair encoding with one special token, the end of text, in transformers' wrapper."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],  # transformers adds token types, which decoders do not take
    )


def build_llama(settings: FromScratchConfig, vocab_size: int, sequence_length: int, tokenizer: Any, seed: int) -> Any:
    """Builds an untrained Llama of the recipe's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(derived_seed(seed, "teacher", "weights"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=intermediate_size(settings.hidden_size),
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_heads,
            max_position_embeddings=max(sequence_length, 512),
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def train_model(model: Any, sequences: Sequences, settings: FromScratchConfig, seed: int, precision: str) -> float:
    """Trains `model` on `sequences` for the recipe's token budget.

    Returns:
        Mean cross-entropy (nats per token) over the last tenth of the steps.

    Raises:
        UserError: if the loss is not finite.
    """
    # Muon is for the layers' matrices; embeddings, output matrix and norms are trained with AdamW at their own rate.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    device = torch.device("cuda" if uses_gpu() else "cpu")
    use_bf16 = compute_dtype(precision, device) == torch.bfloat16
    muon: torch.optim.Optimizer = (
        torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.0)
        if use_bf16
        else Float32Muon(matrices, lr=settings.learning_rate)
    )
    optimizers = [
        muon,
        torch.optim.AdamW(others, lr=settings.embedding_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [settings.learning_rate, settings.embedding_learning_rate]
    sequence_length = sequences.sequence_length
    steps = max(1, settings.train_tokens // (settings.batch_size * sequence_length))
    model.to(device).train()
    batches = _batches(sequences, settings.batch_size, derived_seed(seed, "teacher", "order"))
    losses: list[float] = []
    with progress_bar(total=steps * settings.batch_size * sequence_length, label="training", unit="tokens") as bar:
        for step in range(steps):
            batch = next(batches)
            input_ids, has_target = batch.input_ids.to(device), batch.has_target.to(device)
            positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids.to(device)}
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
                logits = model(input_ids=input_ids, use_cache=False, **positions).logits
            loss = F.cross_entropy(logits[has_target].float(), input_ids.roll(-1, dims=1)[has_target])
            loss.backward()
            # The same factor scales both peak rates: a linear warm-up, then a linear decay.
            factor = min((step + 1) / max(1, steps * _WARMUP_SHARE), (steps - step) / steps)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"the teacher's loss is {losses[-1]} at step {step + 1}: the training diverged. Lower "
                    "teacher.train_from_scratch.learning_rate and embedding_learning_rate"
                )
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(input_ids.numel())
    model.eval().cpu()
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _batches(sequences: Sequences, batch_size: int, seed: int) -> Iterator[TokenBatch]:
    generator = torch.Generator().manual_seed(seed)
    rest = torch.empty(0, dtype=torch.int64)
    while True:
        while len(rest) < batch_size:
            rest = torch.cat([rest, torch.randperm(len(sequences), generator=generator)])
        yield sequences.select(rest[:batch_size].numpy())
        rest = rest[batch_size:]
