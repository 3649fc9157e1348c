"""GRPO with a reward that can be checked: sums of two numbers, where the right result is known.

Usage: python -m examples.arithmetic [--model Qwen/Qwen2.5-0.5B-Instruct] [--out FOLDER] [section.key=value ...]

Without --model, a small random model first learns from worked examples (SFT), offline. Their teacher mostly forgets to
carry the one, and the model learns to answer like the teacher. Then GRPO rewards right results, and the model becomes
better than its teacher. A model of the hub has no teacher: it gets an instruction and larger numbers.
"""

from __future__ import annotations

import random

import torch
from transformers import GPT2Config

import trlx
from examples.common import Rows, arguments, byte_tokenizer, configure
from examples.common import reward as chosen_reward
from examples.common import rows as chosen_rows
from trlx.rewards import NumberMatch

PUPIL = "pupil"
"""The model that is made and taught here."""
FORGETS = 0.8
"""How often its teacher forgets to carry."""
INSTRUCTION = "Add the two numbers digit by digit. End with #### and the result.\n"
"""What a model of the hub is told."""
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{{ message.content }}{{ eos_token }}\n"
    "{% else %}Q:{{ message.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
SMALL = {
    "method": {"num_rollouts": 256, "chunk_size": 256, "gen_kwargs": {"max_new_tokens": 32}},
    "optimizer": {"kwargs": {"lr": 2.0e-4}},
    "train": {"seq_length": 48, "batch_size": 128, "minibatch_size": None, "total_steps": 60, "eval_interval": 10},
}
"""Settings for the pupil: 32 problems at once, eight answers to each."""


def main(hparams=None, data: str = "default", reward: str = "default", lessons: int = 400):
    """Trains, prints the accuracy on problems that it did not train on, returns the trainer.

    Rows of `data` have a "question" and an "answer", and for the pupil a "worked" example, from which it learns for
    `lessons` steps.
    """
    config = arithmetic_config(hparams)
    model = config.model.model_path
    is_small = model == PUPIL or isinstance(model, GPT2Config)
    made = problems(4256 if data == "default" else 264, config.train.seed, digits=2 if is_small else 6)
    rows = chosen_rows(data, lambda: made, lambda: made)
    prompts = asked(rows, "" if is_small else INSTRUCTION)
    held_out = prompts[: min(256, len(prompts) // 2)]
    if model == PUPIL:
        config = config.evolve(model={"model_path": taught(rows[len(held_out) :], held_out, config, lessons)})
    accuracy = Accuracy()
    trainer = trlx.train(
        reward_fn=chosen_reward(reward, NumberMatch, NumberMatch()),
        prompts=prompts[len(held_out) :],
        eval_prompts=held_out,
        metric_fn=accuracy,
        config=config,
    )
    print("Share of right answers to problems that were held out")
    for step, share in accuracy.history.items():
        print(f"  step {step:4d}  {share:.3f}  {'█' * round(50 * share)}")
    return trainer


def arithmetic_config(hparams=None) -> trlx.TRLConfig:
    """The preset without a KL penalty, for small models with `SMALL`, and `hparams` over it."""
    base = trlx.load_preset("grpo").evolve(
        model={"model_path": PUPIL},
        method={"loss_type": "dapo", "kl_coef": 0.0},
        train={"checkpoint_dir": "ckpts/arithmetic", "tracker": None},
    )
    is_small = trlx.TRLConfig.update(base, hparams or {}).model.model_path in (PUPIL, "tiny")
    config = configure(base.evolve(**SMALL) if is_small else base, hparams)
    if isinstance(config.model.model_path, GPT2Config):
        config.tokenizer.tokenizer_path.chat_template = TEMPLATE
    return config


def problems(count: int, seed: int, digits: int) -> Rows:
    """Different sums of two numbers of `digits` digits: "question", right "answer", and what the teacher wrote."""
    draw = random.Random(seed)
    numbers = range(10 ** (digits - 1), 10**digits)
    pairs: dict[tuple[int, int], None] = {}  # a dict keeps the order
    while len(pairs) < count:
        pairs[draw.choice(numbers), draw.choice(numbers)] = None
    return [{"question": f"{a}+{b}", "answer": str(a + b), "worked": worked(a, b, FORGETS, draw)} for a, b in pairs]


def worked(a: int, b: int, forgets: float, draw: random.Random) -> str:
    """A sum digit by digit from the right, "7+8=15 4+3+1=8 #### 85" for 47 + 38; `forgets`: how often without carry."""
    steps, carry, result = [], 0, ""
    while a or b:
        terms = [a % 10, b % 10] + [1] * carry
        total = sum(terms)
        steps.append(f"{'+'.join(map(str, terms))}={total}")
        a, b = a // 10, b // 10
        result = f"{total % 10}{result}"
        carry = int(total > 9 and draw.random() >= forgets)
    return f"{' '.join(steps)} #### {'1' * carry}{result}"


def asked(rows: Rows, instruction: str) -> Rows:
    """Chats for the model, with the answers for the reward."""
    return [
        {"prompt": [{"role": "user", "content": instruction + row["question"]}], "answer": row["answer"]}
        for row in rows
    ]


class Accuracy:
    """metric_fn: which answers are right. `history` has the share of right ones by optimizer step."""

    def __init__(self):
        self.history: dict[int, float] = {}

    def __call__(self, outputs, answer, step):
        right = NumberMatch()(outputs=outputs, answer=answer)
        self.history[step] = sum(right) / len(right)
        return {"accuracy": right}


def taught(rows: Rows, held_out: Rows, config: trlx.TRLConfig, lessons: int) -> str:
    """Teaches a random GPT-2 of a quarter of a million weights with worked examples; returns its folder."""
    # a second thread gains nothing on matrices this small
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    folder = f"{config.train.checkpoint_dir}_pupil"
    sft = trlx.load_preset("sft").evolve(
        method={"gen_kwargs": config.method.gen_kwargs},
        tokenizer={"tokenizer_path": tokenizer},
        optimizer={"kwargs": {"lr": 3.0e-3}},
        scheduler={"kwargs": {"T_max": lessons, "eta_min": 3.0e-4}},
        train={
            "seq_length": config.train.seq_length,
            "batch_size": 64,
            "total_steps": lessons,
            "eval_interval": lessons,
            "tracker": None,
            "checkpoint_dir": f"{folder}/sft",
            "seed": config.train.seed,
        },
    )
    shape = {"n_layer": 2, "n_embd": 96, "n_head": 4, "n_positions": 64}
    no_dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    trainer = trlx.train(
        model_path=GPT2Config(vocab_size=len(tokenizer), **shape, **no_dropout, **special),
        samples=[
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["worked"]}]
            for row in rows
        ],
        eval_prompts=held_out,
        metric_fn=Accuracy(),
        config=sft,
    )
    trainer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main(**arguments(__doc__))
