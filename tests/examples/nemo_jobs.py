"""What processes of the tests of examples on the Megatron backend do; importable by them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from examples import nemo_ilql_inference, nemo_ppo_inference, nemo_vs_ds_chat
from examples.llama_nemo import convert_llama_to_nemo, nemo_llama2_ppo_sentiments
from tests.runs import metrics, run
from trlx.backends.megatron.nemo.archive import opened
from trlx.batch import Rollout
from trlx.data.collate import collate

QUICK = {
    "model.model_path": "tiny",
    "method.gen_kwargs.max_new_tokens": 4,
    "train.total_steps": 1,
    "train.batch_size": 4,
    "train.tracker": None,
    "train.save_best": False,
}
PPO = {"method.num_rollouts": 4, "method.chunk_size": 8, "method.ppo_epochs": 1}
MADE = {"data": "made", "reward": "made"}


def train_examples(folder: Path, scripts: list[str], layout: dict[str, Any]) -> None:
    """One step of each script."""
    for script in scripts:
        main = importlib.import_module(f"examples.nemo_{script}_sentiments").main
        changes = {**QUICK, **(PPO if script == "ppo" else {}), **_layout(layout)}
        trainer = main({**changes, "train.checkpoint_dir": str(folder / script)}, **MADE)
        assert trainer.schedule.step == 1
        assert (folder / script / "checkpoint_1" / "hf_model" / "config.json").is_file()


def sample_examples(checkpoint: Path, archive: Path, tokenizer: Path, layout: dict[str, Any]) -> None:
    """A checkpoint of PPO, a `.nemo` archive of ILQL and a model that is named "tiny" speak."""
    few = {"method.gen_kwargs.max_new_tokens": 4, **_layout(layout)}
    texts = nemo_ppo_inference.main({**few, "model.model_path": str(checkpoint)}, **MADE)
    assert len(texts) == nemo_ppo_inference.PROMPTS
    assert all(text.startswith("We saw a ") for text in texts)
    named = {"model.model_path": str(archive), "tokenizer.tokenizer_path": str(tokenizer)}
    by_beta = nemo_ilql_inference.main({**few, **named, "method.gen_kwargs.beta": [0, 8]}, **MADE)
    assert {beta: len(texts) for beta, texts in by_beta.items()} == dict.fromkeys([0, 8], nemo_ilql_inference.PROMPTS)
    tiny = {**few, "model.model_path": "tiny", "method.gen_kwargs.beta": 2}
    assert list(nemo_ilql_inference.main(tiny, **MADE)) == [2]


def llama_and_speed(folder: Path) -> None:
    """Llama's script trains, its export becomes an archive, and the measuring script measures."""
    quick = {**QUICK, **PPO}
    trainer = nemo_llama2_ppo_sentiments.main({**quick, "train.checkpoint_dir": str(folder / "llama")}, **MADE)
    assert trainer.backend.updates.optim.distributed and trainer.backend.stage[0].config.recompute_granularity == "full"
    exported = folder / "llama" / "checkpoint_1" / "hf_model"
    convert_llama_to_nemo.main([str(exported), str(folder / "llama.nemo"), "--tensor", "2"])
    with opened(folder / "llama.nemo") as archive:
        assert archive.parallel_sizes() == (2, 1)
    speed = {**quick, "train.checkpoint_dir": str(folder / "speed"), "train.total_steps": 2, "train.seq_length": 256}
    found = nemo_vs_ds_chat.main(speed, **MADE)
    assert found["answer tokens per second"] > 0 and found["time/step"] > 0


def cross(folder: Path, first: str, then: str) -> None:
    """SFT on one backend, its export, PPO from there on the other. Two processes: tensor parallel, or data parallel."""
    taught = run("SFT", folder / "taught", **_on(first, "SFT"))
    model = folder / "model"
    _export(taught, model)
    source = {"model": {"model_path": str(model)}, "tokenizer": {"tokenizer_path": None}}
    improved = run("PPO", folder / "improved", **_on(then, "PPO"), **source)
    _export(improved, folder / "improved" / "hf_model")
    measured = [line["policy/kl"] for line in metrics(folder / "improved") if "policy/kl" in line]
    assert measured[0] < 1e-10 < 1e-5 < measured[-1]


def _export(trainer: Any, folder: Path) -> None:
    """Writes what is trained; plain transformers gives every token the probability that the trainer gives it."""
    trainer.save_pretrained(folder)
    rows = [Rollout(prompt=[4, 5, 6], response=[7, 8, 9, 2]), Rollout(prompt=[10], response=[11, 4])]
    batch = collate(rows, pad_id=0)
    scored = trainer.backend.evaluate(batch).logprobs
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=batch.tokens).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[..., 0]
    counts = batch.response_mask[:, 1:]
    torch.testing.assert_close(scored[:, 1:][counts], expected[counts], rtol=0, atol=1e-5)


def _on(backend: str, method: str) -> dict[str, Any]:
    if backend == "accelerate":
        return {"train": {"total_steps": 6}}
    kwargs = {"tensor_model_parallel_size": 2}
    return {"train": {"total_steps": 6, "trainer": f"NeMo{method}Trainer", "trainer_kwargs": kwargs}}


def _layout(sizes: dict[str, Any]) -> dict[str, Any]:
    return {f"train.trainer_kwargs.{name}": size for name, size in sizes.items()}
