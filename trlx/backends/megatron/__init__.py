"""Tensor- and pipeline-parallel training on Megatron-Core."""
