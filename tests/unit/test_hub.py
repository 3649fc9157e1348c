"""What goes to the Hugging Face hub, with a folder in its place."""

from __future__ import annotations

import json
import re
import shutil

import huggingface_hub
import pytest
import transformers
from safetensors.torch import load_file

import trlx
from tests.builders import tiny_gpt2_config
from tests.runs import TEXTS, tiny_config
from trlx.run.hub import check_login
from trlx.trainer.accelerate import AccelerateSFTTrainer

NEW, REPO = {"total_steps": 1, "eval_interval": 1, "push_to_hub": "me/model"}, "https://huggingface.co/me/model"


class Hub:
    """Stands for `huggingface_hub.HfApi`: repositories are folders under `root`."""

    root, calls, down = None, [], False

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, self.token))
        self.reached()
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision=None):
        self.calls.append(("upload", repo_id, commit_message, revision))
        self.reached()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def reached(self):
        if self.down:
            raise ConnectionError("no network")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "root", tmp_path / "hub")
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return Hub


def falling(samples, calls=[], **kwargs):  # noqa: B006  counts its calls
    """A metric that is best before the first step."""
    calls.append(1)
    return {"reward": [1 / len(calls)] * len(samples)}


def card_of(folder):
    text = (folder / "README.md").read_text()
    about, code = re.fullmatch(r"---\n(.*?)\n---.*```python\n(.*?)```.*", text, re.DOTALL).groups()
    return text, code, about


def loaded(code, repo_id, folder):
    """What the code of a card loads, from the folder that stands for its repository."""
    names = {}
    exec(code.replace(repo_id, str(folder)), names)  # noqa: S102
    return names["model"], names["tokenizer"]


def test_a_run_uploads_its_best_model_with_a_card_whose_code_loads_it(tmp_path, hub):
    config = tiny_config(tmp_path / "run", "SFT", train={**NEW, "hub_private": True})
    trlx.train(samples=TEXTS, metric_fn=falling, config=config)
    made = ("create", "me/model", True, None)
    assert hub.calls == [made, made, ("upload", "me/model", "trlx, step 0", None)]
    folder, best = hub.root / "me" / "model", tmp_path / "run" / "best_checkpoint" / "hf_model"
    assert {path.name for path in folder.iterdir()} == {path.name for path in best.iterdir()}
    text, code, about = card_of(folder)
    model, tokenizer = loaded(code, "me/model", folder)
    last = tmp_path / "run" / "checkpoint_1" / "hf_model"
    first, last = (load_file(path / "model.safetensors") for path in (best, last))
    embeddings = model.get_input_embeddings().weight
    assert embeddings.equal(first["transformer.wte.weight"]) and not embeddings.equal(last["transformer.wte.weight"])
    assert tokenizer("ab").input_ids == config.tokenizer.tokenizer_path("ab").input_ids
    assert about == "library_name: transformers\ntags:\n- trlx\n- sft"
    assert "gpt2, trained with SFT by trlx" in text and ", 0 steps." in text
    assert "|---|---|\n| `metrics/reward` | 1 |\n" in text and "\n\n```yaml\nmethod:\n  name: SFTConfig" in text
    assert "  lr: 0.003\n" in text and "  batch_size: 4\n" in text and str(tmp_path) not in text


def test_an_adapter_is_uploaded_alone_or_merged(tmp_path, hub):
    pytest.importorskip("peft")
    lora = {"peft_config": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2}}
    trainer = AccelerateSFTTrainer(tiny_config(tmp_path / "run", "SFT", model=lora))
    assert trainer.push_to_hub("me/merged", merge=True, private=False, token="t", revision="v1") == f"{REPO[:-5]}merged"
    assert hub.calls == [("create", "me/merged", False, "t"), ("upload", "me/merged", "trlx, step 0", "v1")]
    trainer.push_to_hub("me/adapter", commit_message="first")
    assert hub.calls[-1] == ("upload", "me/adapter", "first", None)
    merged, adapter = hub.root / "me" / "merged", hub.root / "me" / "adapter"
    model, _ = loaded(card_of(merged)[1], "me/merged", merged)
    assert isinstance(model, transformers.GPT2LMHeadModel) and not (merged / "adapter_config.json").exists()
    text, code, about = card_of(adapter)
    assert "import AutoPeftModelForCausalLM\n" in code and about.startswith("library_name: peft\n")
    assert not (adapter / "model.safetensors").exists() and (adapter / "adapter_model.safetensors").is_file()


def test_a_model_that_cannot_be_uploaded_stays_and_the_message_says_what_to_type(tmp_path, hub, monkeypatch, caplog):
    class Falls(trlx.Callback):
        def on_start(self, trainer):
            monkeypatch.setattr(hub, "down", True)

    folder = tmp_path / "my run"
    config = tiny_config(folder, "SFT", train={**NEW, "save_best": False})
    trainer = trlx.train(samples=TEXTS, config=config, callbacks=[Falls()])
    model = folder / "checkpoint_1" / "hf_model"
    told = (
        "The model could not be uploaded to me/model (ConnectionError: no network). It is in {0}: type "
        "`hf upload me/model '{0}'`"
    )
    assert [record.getMessage() for record in caplog.records].count(told.format(model)) == 1
    assert (model / "model.safetensors").is_file() and (model / "README.md").is_file()
    with pytest.raises(RuntimeError, match=re.escape(told.format(folder / "hub"))):
        trainer.push_to_hub("me/model")
    assert (folder / "hub" / "model.safetensors").is_file()
    # a new run is refused at its start, one that goes on is not
    before = (folder / "metrics.jsonl").read_text()
    again = {**NEW, "total_steps": 2, "resume_from_checkpoint": "auto", "eval_interval": 2}
    trlx.train(samples=TEXTS, config=tiny_config(folder, "SFT", train=again))
    assert "me/model cannot be made (ConnectionError: no network): tried again at the end of the run" in caplog.text
    assert len((folder / "metrics.jsonl").read_text()) > len(before)
    with pytest.raises(ValueError, match="me/model cannot be made .*no network.: repair that, or leave"):
        trlx.train(samples=TEXTS, config=tiny_config(tmp_path / "new", "SFT", train=NEW))
    assert [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()] == []


def test_a_run_is_refused_before_its_model_is_loaded_if_nobody_is_logged_in(tmp_path, hub, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    config = tiny_config(tmp_path, "SFT", train=NEW, model={"model_path": "/nowhere"})
    with pytest.raises(ValueError, match="train.push_to_hub: nobody is logged in .*type `hf auth login`, set HF_TOKEN"):
        trlx.train(samples=TEXTS, config=config)
    check_login(config.evolve(train={"push_to_hub": None}).train)
    assert hub.calls == []
    # and a run that makes no step has nothing to upload
    empty = config.evolve(train={"total_steps": 0, "save_best": False}, model={"model_path": tiny_gpt2_config()})
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    trlx.train(samples=TEXTS, config=empty)
    assert [call[0] for call in hub.calls] == ["create"]
    assert "The run saved no model for train.push_to_hub: me/model is empty" in caplog.text
