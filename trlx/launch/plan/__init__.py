"""``trlx plan``: the memory and the traffic of a NeMo trainer's layout, computed without running it."""
