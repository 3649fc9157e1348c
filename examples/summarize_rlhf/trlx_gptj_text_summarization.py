"""Step 3: PPO towards summaries that the reward model likes better than the human's.

Usage: torchrun --nproc-per-node 7 -m examples.summarize_rlhf.trlx_gptj_text_summarization [section.key=value ...]
       python -m examples.summarize_rlhf.trlx_gptj_text_summarization --model tiny
With --reward module:function your own model of step 2, e.g. a trlx.SequenceClassifierReward("rm_checkpoint").
"""

from __future__ import annotations

import trlx
from examples.common import arguments, configure
from examples.summarize_rlhf.task import MAX_LENGTH, SFT, better_than_human, posts, preference, with_label
from trlx.models.source import tokenizer_for


def ppo_config() -> trlx.TRLConfig:
    """The fine-tuned GPT-J of step 1, its top eight blocks trained."""
    return trlx.load_preset("ppo").evolve(
        model={"model_path": SFT, "num_layers_unfrozen": 8},
        tokenizer={"tokenizer_path": "gpt2"},
        optimizer={"kwargs": {"lr": 5.0e-6, "betas": [0.9, 0.999], "weight_decay": 0.01}},
        scheduler={"kwargs": {"T_max": 100000, "eta_min": 5.0e-6}},
        method={
            "chunk_size": 16,
            "init_kl_coef": 0.1,
            "target": 6,
            "vf_coef": 0.2,
            "gen_kwargs": {"max_new_tokens": 50},
        },
        train={
            "seq_length": MAX_LENGTH,
            "epochs": 50,
            "total_steps": 100000,
            "batch_size": 4,
            "eval_interval": 200,
        },
    )


def main(hparams=None, data: str = "default", reward: str = "default"):
    """Trains; returns the trainer."""
    config = configure(ppo_config(), hparams)
    tokenizer = tokenizer_for(config.model.model_path, config.tokenizer)
    room = config.train.seq_length - config.method.gen_kwargs["max_new_tokens"]
    return trlx.train(
        reward_fn=better_than_human(preference(reward)),
        prompts=with_label(posts(data, "train"), tokenizer, room),
        eval_prompts=with_label(posts(data, "valid", 1000), tokenizer, room),
        config=config,
    )


if __name__ == "__main__":
    main(**arguments(__doc__))
