"""The machinery that runs models: a protocol, and one backend for each engine."""
