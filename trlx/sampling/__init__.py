"""Sampling: the settings of it, what is done to logits before a token is drawn, and the samplers."""
