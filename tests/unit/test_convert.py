"""`trlx convert`: models between Hugging Face folders and `.nemo` archives."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.builders import char_tokenizer
from tests.unit.nemo_archives import LLAMA, llama, older_llama, written
from tests.unit.test_megatron_families import CONFIGS, logits_of, random_model
from trlx.backends.megatron.nemo.archive import opened, write_archive
from trlx.launch.cli import main


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_folder_becomes_an_archive_and_again_the_same_folder(tmp_path, name):
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "hf")
    char_tokenizer().save_pretrained(tmp_path / "hf")
    heads = {"value.bias": torch.tensor([3.0])}
    save_file(heads, tmp_path / "hf" / "trlx_heads.safetensors")
    first, second, back = (str(tmp_path / each) for each in ("first.nemo", "second.nemo", "back"))
    assert main(["convert", str(tmp_path / "hf"), first, "--tensor", "2", "--pipeline", "2"]) == 0
    assert main(["convert", first, second, "--tensor", "4"]) == 0
    assert main(["convert", second, back]) == 0
    again = AutoModelForCausalLM.from_pretrained(back)
    assert torch.equal(logits_of(again), logits_of(model))
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert again.config.to_dict() == AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.to_dict() | {
        "_name_or_path": back
    }
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()
    assert load_file(tmp_path / "back" / "trlx_heads.safetensors")["value.bias"].tolist() == [3.0]
    assert main(["convert", back, str(tmp_path / "third.nemo")]) == 0
    with opened(tmp_path / "third.nemo") as archive, opened(first) as other:
        assert set(archive.names) - {"model_weights.ckpt"} == {name for name in other.names if "/" not in name}
    with opened(first) as archive:
        assert archive.config["tokenizer"]["model"] == "nemo:tokenizer.json"
        assert archive.file(archive.config["tokenizer"]["model"]).is_file()


def test_an_archive_of_nemos_becomes_a_folder_with_its_tokenizer_under_its_plain_name(tmp_path):
    model = llama()
    write_archive(
        tmp_path / "m.nemo", LLAMA, older_llama(model), {f"{'0a' * 16}_tokenizer.model": b"pieces", "notes": b"x"}
    )
    assert main(["convert", str(tmp_path / "m.nemo"), str(tmp_path / "hf"), "--vocab-size", "6"]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.tensor([[1, 5, 3, 2]])
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"pieces"
    assert not (tmp_path / "hf" / "notes").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["hf", "other"], "both Hugging Face folders"),
        (["m.nemo", "other", "--tensor", "2"], "leave them out"),
        (["m.nemo", "hf"], "something at .*hf already"),
        (["missing.nemo", "other"], "no .nemo file or folder"),
        (["empty", "m2.nemo"], "no model at .*empty"),
        (["m.nemo", "m2.nemo", "--tensor", "0"], "at least 1 x 1"),
    ],
)
def test_what_cannot_be_converted_is_said_in_a_sentence(tmp_path, arguments, message):
    llama().save_pretrained(tmp_path / "hf")
    written(tmp_path / "m.nemo", llama())
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / each) for each in arguments[:2]]
    with pytest.raises(SystemExit, match=message):
        main(["convert", *paths, *arguments[2:]])


def test_models_are_converted_without_megatron():
    code = "import sys; sys.modules['megatron'] = None; import trlx.launch.convert"
    subprocess.run([sys.executable, "-c", code], check=True)
