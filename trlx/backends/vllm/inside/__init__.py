"""This folder goes on the PYTHONPATH of vLLM servers, which need no trlx: they load the package in it."""
