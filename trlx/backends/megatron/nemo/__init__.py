"""NeMo's file formats: configuration files and `.nemo` archives."""
