"""Checks parallel sizes against the model, the batch and the processes, before the model is built."""

from __future__ import annotations

from collections.abc import Iterator

from trlx.backends.megatron.decoder_config import DecoderConfig
from trlx.backends.megatron.settings import MegatronSettings
from trlx.strict import ConfigError


def check_sizes(settings: MegatronSettings, decoder: DecoderConfig, world_size: int, batch_size: int) -> None:
    """Checks that the parallel sizes divide heads, layers, rows and processes.

    Args:
        world_size: number of processes.
        batch_size: rows per optimizer step and data rank.

    Raises:
        ConfigError: sizes do not fit; the message has one sentence for each.
    """
    problems = [
        *_processes(settings, world_size),
        *_tensor(settings, decoder),
        *_pipeline(settings, decoder),
        *_batch(settings, batch_size),
        *_recompute(settings, decoder),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _processes(settings: MegatronSettings, world_size: int) -> Iterator[str]:
    tensor, pipeline = settings.sizes.tensor, settings.sizes.pipeline
    copy = tensor * pipeline
    if world_size % copy:
        yield (
            f"tensor_model_parallel_size {tensor} x pipeline_model_parallel_size {pipeline} = {copy} processes hold a "
            f"copy of the model, but {world_size} were started: start a multiple of {copy}, or write smaller sizes."
        )
    if settings.devices is None or settings.num_nodes is None:
        return
    expected = settings.devices * settings.num_nodes
    if world_size != expected:
        yield (
            f"trainer.devices {settings.devices} x trainer.num_nodes {settings.num_nodes} = {expected} processes, but "
            f"{world_size} were started: start your script with torchrun --nnodes {settings.num_nodes} "
            f"--nproc-per-node {settings.devices}, or write how many there are."
        )


def _tensor(settings: MegatronSettings, decoder: DecoderConfig) -> Iterator[str]:
    tensor = settings.sizes.tensor
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(decoder, name)
        if size % tensor:
            yield _not_divided(f"The model's {name}", size, "tensor_model_parallel_size", tensor)
    if decoder.num_attention_heads % decoder.num_query_groups:
        yield (
            f"The model's num_attention_heads {decoder.num_attention_heads} is not a multiple of num_query_groups "
            f"{decoder.num_query_groups}: every group must serve the same number of heads."
        )
    if settings.sizes.sequence and tensor == 1:
        yield "sequence_parallel needs tensor_model_parallel_size 2 or more: write sequence_parallel: false."


def _pipeline(settings: MegatronSettings, decoder: DecoderConfig) -> Iterator[str]:
    pipeline, virtual = settings.sizes.pipeline, settings.sizes.virtual
    if virtual is None:
        if decoder.num_layers % pipeline:
            yield _not_divided("The model's num_layers", decoder.num_layers, "pipeline_model_parallel_size", pipeline)
        return
    if pipeline == 1:
        yield (
            f"virtual_pipeline_model_parallel_size {virtual} needs pipeline_model_parallel_size 2 or more: write null, "
            "or more stages."
        )
    if decoder.num_layers % (pipeline * virtual):
        name = "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size"
        yield _not_divided("The model's num_layers", decoder.num_layers, name, pipeline * virtual)


def _batch(settings: MegatronSettings, batch_size: int) -> Iterator[str]:
    rows, pipeline = settings.micro_batch_size, settings.sizes.pipeline
    if batch_size % rows:
        yield (
            f"{rows} rows per microbatch (train.minibatch_size, else model.micro_batch_size) do not divide "
            f"train.batch_size {batch_size}, the rows of each data rank: write a train.minibatch_size that does."
        )
    elif settings.sizes.virtual is not None and (batch_size // rows) % pipeline:
        yield (
            f"train.batch_size {batch_size} / {rows} rows per microbatch = {batch_size // rows} microbatches, not a "
            f"multiple of pipeline_model_parallel_size {pipeline}, as virtual_pipeline_model_parallel_size needs: "
            "write another train.minibatch_size, or virtual_pipeline_model_parallel_size: null."
        )


def _recompute(settings: MegatronSettings, decoder: DecoderConfig) -> Iterator[str]:
    wanted, sizes = settings.recompute.num_layers, settings.sizes
    in_chunk = decoder.num_layers // (sizes.pipeline * (sizes.virtual or 1))
    if wanted is not None and wanted > in_chunk > 0:
        yield (
            f"activations_checkpoint_num_layers is {wanted}, but a pipeline stage (or virtual chunk) has {in_chunk} "
            f"layers: write at most {in_chunk}."
        )


def _not_divided(what: str, size: int, key: str, divisor: int) -> str:
    return f"{what} {size} is not a multiple of {key} {divisor}: write one of {_divisors(size)}."


def _divisors(size: int) -> str:
    """Divisors up to 64, e.g. "1, 2, 4, 8"."""
    return ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
