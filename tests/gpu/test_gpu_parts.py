"""Parts that do something else on a GPU than on the CPU: copies, kernels, memory, and the choice of the device."""

import random

import pytest
import torch
from gpus import CPU, DEVICES, GPU, ON_GPU, needs_gpu, run_on_gpu
from loaded_steps import steps_of, write_shards
from plain_reading import run_apart
from rank_processes import ONE_RANK
from safetensors.torch import save_file
from tiny_models import SHAPE, save_model, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from dskd.config import Config, FromScratchConfig, LossConfig
from dskd.config.reading import load_config
from dskd.corpus.packing import pack
from dskd.corpus.sequences import open_sequences, position_ids_of
from dskd.errors import UserError
from dskd.losses.head import DistillationHead, HeadSizes, Normalizers
from dskd.models.files.folder import find_teacher
from dskd.models.running.frozen import Decoder
from dskd.models.running.sampling import Sampling, load_sampler
from dskd.models.structure.base_model import base_model
from dskd.students.measuring import measure_importance
from dskd.training.data.sense_bank import free_bytes, load_bank, require_room
from dskd.training.models.width_map import StateSums
from dskd.training.teacher_from_scratch import build_llama, train_model

pytestmark = pytest.mark.slow


def _tensors(value):
    """Yields the tensors in dictionaries and lists, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list):
        for part in value:
            yield from _tensors(part)


@needs_gpu
def test_steps_on_a_gpu_have_the_bytes_that_the_loader_read(tmp_path):
    """On the CPU: test_loader.py::test_the_stream_that_uses_a_copy_waits_for_it_and_keeps_its_memory."""
    write_shards(tmp_path)
    expected = [list(_tensors(step.micro_batches)) for step in steps_of(tmp_path, tmp_path / "cpu")]
    busy, found = torch.randn(4096, 4096, device=GPU), []
    for step in steps_of(tmp_path, tmp_path / "gpu", num_workers=1, world=ON_GPU):
        for _ in range(30):  # the step's work, during which the next step is copied
            busy = (busy @ busy).sin()
        # Queued behind the work, as the kernels of a step are.
        found.append([tensor.clone() for tensor in _tensors(step.micro_batches)])
        for batch in step.micro_batches:
            devices = {name: value.device.type for name, value in batch.items() if isinstance(value, torch.Tensor)}
            assert devices.pop("sample_ids") == "cpu"
            assert set(devices.values()) == {"cuda"}
    torch.cuda.synchronize()
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.cpu(), other)


@needs_gpu
def test_a_sense_bank_on_a_gpu_has_the_vectors_of_the_file(tmp_path):
    """On the CPU: test_loader.py, with copies into memory of the host."""
    vectors = torch.randn(300_001, 128).bfloat16()  # more than one piece
    save_file({"vectors": vectors}, tmp_path / "senses.safetensors")
    bank = load_bank(tmp_path / "senses.safetensors", GPU)
    assert bank.device.type == "cuda" and torch.equal(bank.cpu(), vectors)
    free = free_bytes(GPU)
    assert 0 < free <= torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(UserError, match=r"set train\.sense_bank to host"):
        require_room(tmp_path, 2 * torch.cuda.get_device_properties(0).total_memory, free)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_packed_documents_have_the_states_that_each_has_alone(device, dtype):
    """In heads of 64 values, for which a GPU has other kernels than for those of tiny models."""
    torch.manual_seed(0)
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape | {"max_position_embeddings": 512})).to(device, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that attention is not uniform
    decoder = Decoder(base_model(model))
    ids = torch.randint(1, shape["vocab_size"], (2, 300), device=device)
    begins = [[0, 7, 130, 131], [0, 200]]
    starts = torch.zeros(2, 300, dtype=torch.uint8)
    for row, places in enumerate(begins):
        starts[row, places] = 1
    with torch.no_grad():
        packed = decoder(ids, position_ids_of(starts).to(device))
        for row, places in enumerate(begins):
            for begin, end in zip(places, [*places[1:], 300], strict=True):
                alone = decoder(ids[row : row + 1, begin:end])[0].double()
                error = (packed[row, begin:end].double() - alone).norm() / alone.norm()
                assert error < (1e-5 if dtype == torch.float32 else 2e-2), (row, begin)


@needs_gpu
def test_the_heads_memory_does_not_grow_with_the_positions():
    """On the CPU, where memory is less exact: python -m benchmarks.loss_memory."""
    vocab_size, hidden_size, sizes = 32_768, 128, (4096, 16_384)
    weight = torch.nn.Parameter(torch.randn(vocab_size, hidden_size, device=GPU).bfloat16(), requires_grad=False)
    chunk, block = HeadSizes.of(None, vocab_size, GPU)
    head = DistillationHead(weight, None, LossConfig(sense_weight=0), chunk_size=chunk, block_size=block)
    beyond = []
    for positions in sizes:
        hidden = torch.randn(1, positions, hidden_size, device=GPU).bfloat16().requires_grad_()
        labels = torch.randint(0, vocab_size, (1, positions), device=GPU)
        mask = torch.ones_like(labels, dtype=torch.bool)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss, _ = head(
            hidden,
            labels=labels,
            loss_mask=mask,
            normalizers=Normalizers(1 / positions, 1),
            teacher_hidden=hidden.detach(),
        )
        loss.backward()
        beyond.append(torch.cuda.max_memory_allocated() - before)
    logits_bytes = (sizes[1] - sizes[0]) * vocab_size * 2
    assert beyond[1] - beyond[0] < 0.05 * logits_bytes  # states and gradients, of 1/256 of the logits' size each


@needs_gpu
def test_layers_are_measured_on_a_gpu_and_differ_as_on_the_cpu(copy_of_tiny, monkeypatch, capsys):
    """On the CPU: students/test_measuring.py."""
    config = load_config(copy_of_tiny("corpus", "teacher", "sequences"))
    on_cpu = measure_importance(config, find_teacher(config), 2)
    monkeypatch.delenv("DS_ACCELERATOR")  # as outside of tests; nothing here uses DeepSpeed
    on_gpu = measure_importance(config, find_teacher(config), 2)
    assert "float32 on the GPU" in capsys.readouterr().err
    for found, expected in ((on_gpu.layers, on_cpu.layers), (on_gpu.blocks, on_cpu.blocks)):
        assert found == pytest.approx(expected, rel=1e-3)


@needs_gpu
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.6)])
def test_rows_get_the_tokens_on_a_gpu_that_they_get_on_the_cpu(tmp_path, temperature, top_p):
    """On the CPU: models/running/test_sampling.py."""
    save_model(tmp_path / "teacher")
    config = Config(
        workdir=str(tmp_path / "work"),
        precision="fp32",
        teacher={"path": str(tmp_path / "teacher")},
        corpus={"sequence_length": 16},
    )
    prompts, seeds = [[5, 17, 3], [9], [4, 4, 60, 71, 2, 33], [88, 12]], [11, 2**62 + 5, 0, 7]
    found = []
    for world in (ONE_RANK, ON_GPU):
        sampler = load_sampler(find_teacher(config), config, world)
        assert sampler.engine is None  # whole on the device
        assert sampler.causal_lm.device.type == world.device.type
        found.append(sampler.sample(prompts, seeds, Sampling(12, temperature, top_p)))
        sampler.close()
    assert found[0] == found[1]
    assert any(len(row) == 12 for row in found[0])


@needs_gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 3e-2)])
def test_a_teacher_from_scratch_learns_on_a_gpu_as_on_the_cpu(tmp_path, monkeypatch, precision, tolerance):
    """With Muon and autocast. On the CPU: training/test_teacher_from_scratch.py."""
    words = [f"w{index}" for index in range(30)]
    draw, tokenizer = random.Random(0), word_tokenizer(words)
    texts = [" ".join(draw.choices(words[: draw.randint(2, 30)], k=draw.randint(1, 20))) for _ in range(200)]
    packed = pack(iter(texts), tokenizer, tmp_path / "sequences.safetensors", sequence_length=16, packing="documents")
    sequences = open_sequences(tmp_path / "sequences.safetensors")
    settings = FromScratchConfig(
        vocab_size=300,
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        train_tokens=16 * packed.sequences,
        batch_size=packed.sequences // 10,
    )
    losses = []
    for format_of_run in ("fp32", precision):
        model = build_llama(settings, len(tokenizer), 16, tokenizer, seed=0)
        losses.append(train_model(model, sequences, settings, 0, format_of_run))
        assert next(model.parameters()).device == CPU  # where it is written from
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # the second one uses the GPU
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    with torch.no_grad():
        ids = sequences.batch(0, 8).input_ids
        logits, _, _ = run_apart(model, ids, tokenizer.eos_token_id)
    assert logits.isfinite().all()


@needs_gpu
def test_the_width_map_is_fitted_as_on_the_cpu():
    """On the CPU: training/test_width_map.py."""
    torch.manual_seed(0)
    states, targets = torch.randn(500, 24), torch.randn(500, 40)
    fits = []
    for device in (CPU, GPU):
        sums = StateSums.zeros(24, 40, device)
        for part in (slice(0, 200), slice(200, 500)):
            sums.add(states[part].to(device), targets[part].to(device))
        fits.append(sums.solve())
    torch.testing.assert_close(fits[1][0].cpu(), fits[0][0], rtol=1e-4, atol=1e-5)
    assert fits[1][1] == pytest.approx(fits[0][1], rel=1e-4)


@needs_gpu
def test_auto_means_what_the_gpu_computes_and_asking_takes_no_memory_of_it():
    """On the CPU: models/running/test_precision.py."""
    answer = run_on_gpu(
        "-c",
        "import torch; from dskd.models.running.precision import resolve_precision\n"
        "print(resolve_precision('auto'), torch.cuda.is_initialized())",
    )
    expected = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    assert answer.split()[-2:] == [expected, "False"]
