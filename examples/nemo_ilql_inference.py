"""Samples film reviews from a model that ILQL trained, in any layout, leaning more and more on its Q heads (beta).

Usage: torchrun --nproc-per-node 4 -m examples.nemo_ilql_inference --model ckpts/best_checkpoint --tp 2 --pp 2
       python -m examples.nemo_ilql_inference --model tiny method.gen_kwargs.beta=[0,8]
"""

from __future__ import annotations

from examples.imdb import openings, reviews, sentiment
from examples.megatron import inference_config, layout_arguments, speak
from trlx.trainer.nemo import NeMoILQLTrainer

PROMPTS = 8
BETAS = [0, 1, 4]


def main(hparams=None, data: str = "default", reward: str = "default") -> dict[float, list[str]]:
    """Prints a sample from each prompt for each beta of method.gen_kwargs; returns them by beta."""
    config = inference_config("ilql", {"method.gen_kwargs.beta": BETAS, **(hparams or {})})
    trainer = NeMoILQLTrainer(config, **config.train.trainer_kwargs)
    prompts, judge = openings(reviews(data, "test"))[:PROMPTS], sentiment(reward)
    found, betas = {}, config.method.gen_kwargs["beta"]
    for beta in betas if isinstance(betas, list) else [betas]:
        if trainer.backend.is_main:
            print(f"beta {beta}")
        found[beta] = speak(trainer, prompts, judge, beta=beta)
    return found


if __name__ == "__main__":
    main(**layout_arguments(__doc__))
