"""NeMo's forms: the keys of its configuration files, and models in `.nemo` archives."""
