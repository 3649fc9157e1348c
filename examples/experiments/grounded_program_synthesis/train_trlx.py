"""PPO on writing programs: a model sees a list and what became of it, and writes the function. The interpreter rewards.

Usage: python -m examples.experiments.grounded_program_synthesis.train_trlx [--model tiny] [section.key=value ...]
"""

from __future__ import annotations

import trlx
from examples.common import Rows, arguments, configure, rows
from examples.common import reward as chosen_reward
from examples.experiments.grounded_program_synthesis.lang import ProgramError, examples, run

MODEL = "reshinthadith/codegen_350M_list_manip_5_len"
RIGHT, WRONG, BROKEN = 1.0, -0.5, -1.0


def tasks(count: int) -> Rows:
    """Prompts, with the value that a right program has."""
    return [{"prompt": example.prompt, "expected": example.output} for example in examples(count)]


def correctness(outputs, expected, **kwargs) -> list[float]:
    """RIGHT if the program gives the expected value, WRONG if another, BROKEN if none."""
    return [grade(output, value) for output, value in zip(outputs, expected, strict=True)]


def grade(program: str, expected) -> float:
    """The reward of one program."""
    try:
        return RIGHT if run(program) == expected else WRONG
    except ProgramError:
        return BROKEN


def program_config() -> trlx.TRLConfig:
    """Few and sharp samples at a time, a KL steered to 6 nats."""
    return trlx.load_preset("ppo").evolve(
        model={"model_path": MODEL},
        optimizer={"kwargs": {"lr": 1.412e-4}},
        scheduler={"kwargs": {"T_max": 80000, "eta_min": 1.412e-4}},
        method={
            "num_rollouts": 8,
            "chunk_size": 8,
            "init_kl_coef": 0.2,
            "target": 6,
            "vf_coef": 0.2,
            "gen_kwargs": {"max_new_tokens": 256, "top_p": 0.7, "temperature": 0.5},
        },
        train={"seq_length": 512, "epochs": 10, "total_steps": 80000, "batch_size": 8, "eval_interval": 16},
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains, writes ``hf_model`` under train.checkpoint_dir, returns the trainer."""
    config = configure(program_config(), hparams)
    trainer = trlx.train(
        reward_fn=chosen_reward(reward, lambda: correctness, correctness),
        prompts=rows(data, lambda: tasks(1000), lambda: tasks(8)),
        config=config,
    )
    trainer.save_pretrained()
    return trainer


if __name__ == "__main__":
    main(**arguments(__doc__))
