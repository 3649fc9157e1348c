"""Models on the Hugging Face hub: a trainer's on request, and a run's best one at its end."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from omegaconf import OmegaConf

from trlx import __version__, checkpoint, logging
from trlx.config import TrainConfig, TRLConfig
from trlx.run import Trainer
from trlx.tracking.names import model_name

logger = logging.get_logger(__name__)

SETTINGS = "total_steps epochs batch_size minibatch_size seq_length max_grad_norm mixed_precision seed".split()
"""Of the section ``train``, what a model card shows."""
RESULTS = ("reward/", "metrics/", "eval/")
"""Names of an evaluation's numbers begin so."""
CARD = """---
{about}
---

# {title}

{base}, trained with {method} by trlx {version}, {steps} steps.

```python
from transformers import AutoTokenizer
from {package} import {kind}

model = {kind}.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```

| evaluation | |
|---|---|
{rows}
```yaml
{settings}
```
"""


class OnHub:
    """What a trainer does with the hub."""

    def push_to_hub(
        self: Trainer,
        repo_id: str,
        private: bool | None = None,
        merge: bool = False,
        token: str | None = None,
        **upload: Any,
    ) -> str:
        """Uploads the present model, its tokenizer and a model card to the Hugging Face hub. Call it on every process.

        They are written into the folder ``hub`` in ``train.checkpoint_dir`` first, and stay there.

        Args:
            repo_id: such as "me/model"; made if it does not exist.
            private: whether a new repository is; None: as the hub's settings say.
            merge: see `save_pretrained`.
            token: None: that of ``hf auth login``, or HF_TOKEN.
            upload: further arguments of ``HfApi.upload_folder``, such as ``commit_message`` or ``revision``.

        Returns:
            The address of the repository.

        Raises:
            RuntimeError: it could not be uploaded. The message says what to type.
        """
        folder = Path(self.config.train.checkpoint_dir) / "hub"
        self.backend.on_main(partial(shutil.rmtree, folder, ignore_errors=True))
        self.save_pretrained(folder, merge)
        made = {"private": private, "token": token}
        return self.backend.on_main(partial(_upload, self, folder, repo_id, self.schedule.step, made, **upload))

    @contextmanager
    def publishing(self: Trainer, resumed: bool) -> Iterator[None]:
        """Makes ``train.push_to_hub``, and uploads the best model after the block, or the last one if there is no best.

        Raises:
            ValueError: the repository cannot be made. If the run `resumed`, that is a warning.
        """
        train = self.config.train
        if train.push_to_hub is not None:
            self.backend.on_main(partial(_make, train, resumed))
        yield
        if train.push_to_hub is not None:
            self.backend.on_main(partial(_upload_best, self))


def check_login(train: TrainConfig) -> None:
    """Raises ValueError if ``train.push_to_hub`` is set and nobody is logged in."""
    if train.push_to_hub is not None and huggingface_hub.get_token() is None:
        raise ValueError(
            "train.push_to_hub: nobody is logged in to the Hugging Face hub: type `hf auth login`, set HF_TOKEN, or "
            "leave train.push_to_hub out"
        )


def _make(train: TrainConfig, resumed: bool) -> None:
    check_login(train)
    try:
        huggingface_hub.HfApi().create_repo(train.push_to_hub, private=train.hub_private, exist_ok=True)
    except Exception as error:
        problem = f"train.push_to_hub: {train.push_to_hub} cannot be made ({type(error).__name__}: {error})"
        if not resumed:
            raise ValueError(f"{problem}: repair that, or leave train.push_to_hub out") from error
        logger.warning("%s: tried again at the end of the run", problem)


def _upload_best(trainer: Trainer) -> None:
    train = trainer.config.train
    best = checkpoint.find(trainer.saver.best) if train.save_best and trainer.best_step is not None else None
    if best is None and trainer.saved is None:
        logger.warning(f"The run saved no model for train.push_to_hub: {train.push_to_hub} is empty")
        return
    folder, step = (best, trainer.best_step) if best else trainer.saved
    try:
        where = _upload(trainer, folder / "hf_model", train.push_to_hub, step, {"private": train.hub_private})
        logger.info(f"The model of step {step} is at {where}")
    except RuntimeError as error:
        logger.warning(str(error))


def _upload(trainer: Trainer, folder: Path, repo_id: str, step: int, made: dict[str, Any], **upload: Any) -> str:
    """Writes a card into `folder`, and uploads the folder; returns the repository's address."""
    try:
        card = folder / "README.md"
        card.unlink(missing_ok=True)  # checkpoints may share the file
        card.write_text(model_card(trainer.config, folder, repo_id, step, results(trainer, step)), encoding="utf-8")
        api = huggingface_hub.HfApi(token=made.pop("token", None))
        repo = api.create_repo(repo_id, exist_ok=True, **made)
        upload.setdefault("commit_message", f"trlx, step {step}")
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **upload)
        return str(repo)
    except Exception as error:
        typed = shlex.join(["hf", "upload", repo_id, str(folder)])
        raise RuntimeError(
            f"The model could not be uploaded to {repo_id} ({type(error).__name__}: {error}). It is in {folder}: "
            f"type `{typed}`"
        ) from error


def results(trainer: Trainer, step: int) -> dict[str, float]:
    """What the run's evaluation at a step found."""
    lines = [line for line in trainer.history if line["step"] == step] if trainer.run_folder else []
    return {name: value for line in lines for name, value in line.items() if name.startswith(RESULTS)}


def model_card(config: TRLConfig, folder: Path, repo_id: str, step: int, found: dict[str, float]) -> str:
    """The README of a repository: what was trained how, what came out, and how to load it.

    Args:
        folder: what `save_pretrained` wrote.
        found: results by name.
    """
    settings, method = config.to_json(), config.method.name.removesuffix("Config")
    base = settings["model"]["model_path"]
    on_hub = isinstance(base, str) and not Path(base).exists()
    package, kind = _loaded_by(folder)
    about = huggingface_hub.ModelCardData(
        base_model=base if on_hub else None, library_name=package, tags=["trlx", method.lower()]
    )
    shown = {name: settings[name] for name in ("method", "optimizer", "scheduler")}
    shown["train"] = {name: settings["train"][name] for name in SETTINGS}
    return CARD.format(
        about=about.to_yaml(),
        title=repo_id.rpartition("/")[2],
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else model_name(base),
        method=method,
        version=__version__,
        steps=step,
        package=package,
        kind=kind,
        repo_id=repo_id,
        rows="".join(f"| `{name}` | {value:.4g} |\n" for name, value in found.items() if value is not None),
        settings=OmegaConf.to_yaml(OmegaConf.create(shown)).rstrip(),
    )


def _loaded_by(folder: Path) -> tuple[str, str]:
    """The package and the class that load what `save_pretrained` wrote."""
    adapter = folder / "adapter_config.json"
    if not adapter.exists():
        return "transformers", json.loads((folder / "config.json").read_text())["architectures"][0]
    tasks = {"SEQ_2_SEQ_LM": "Seq2SeqLM", "SEQ_CLS": "SequenceClassification"}
    return "peft", "AutoPeftModelFor" + tasks.get(json.loads(adapter.read_text())["task_type"], "CausalLM")
