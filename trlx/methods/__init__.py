"""The maths of every algorithm: torch and ``trlx.batch`` only."""
