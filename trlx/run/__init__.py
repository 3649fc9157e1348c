"""What surrounds training: the folder of a run, what it prints, how it stops, and how it resumes."""

from typing import Any

Trainer = Any
"""A ``trlx.trainer.base.Trainer``, which imports these files and is therefore not imported here."""
