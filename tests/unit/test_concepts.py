"""What docs/concepts.md says of the code."""

import importlib
import re
import sys
import threading
from pathlib import Path

import trlx
from tests.runs import PROMPTS, tiny_config

PAGE = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text()
PATH = re.findall(r"^\| (\d+) \| `([\w.]+)` \| `([\w/]+)\.py` \|", PAGE, re.MULTILINE)


def code_of(name, file):
    """The code object of a function, which must stand in the file itself."""
    found = importlib.import_module(file.replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    assert Path(found.__code__.co_filename).as_posix().endswith(f"{file}.py")
    return found.__code__


def test_a_reward_reaches_a_weight_by_the_functions_of_the_table_in_their_order(tmp_path):
    assert [int(number) for number, _, _ in PATH] == list(range(1, len(PATH) + 1)) and len(PATH) <= 11
    codes = {code_of(name, file): name for _, name, file in PATH}
    ended, rewarded = [], []

    def reward_fn(samples, **kwargs):
        rewarded.append(len(ended))
        return [float(len(sample)) for sample in samples]

    def note(frame, event, arg):
        if event == "return" and frame.f_code in codes:
            ended.append(codes[frame.f_code])

    method = {"num_rollouts": 4, "chunk_size": 4, "ppo_epochs": 1}
    config = tiny_config(tmp_path, "PPO", method=method, train={"total_steps": 1})
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        trlx.train(config=config, reward_fn=reward_fn, prompts=PROMPTS[:4])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    of_rollouts = ended[rewarded[1] :]  # an evaluation came first, another one comes last
    first = {name: of_rollouts.index(name) for _, name, _ in PATH}
    order = [name for _, name, _ in PATH]
    # the optimizer's step is the last thing that train_step does
    order[9:11] = ["Replicated.update", "AccelerateBackend.train_step"]
    assert sorted(first, key=first.get) == order
