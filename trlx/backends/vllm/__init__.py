"""Sampling from vLLM servers: the sampler, one server over HTTP, the way of weights, and what vLLM loads for it."""
