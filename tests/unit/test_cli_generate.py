"""``trlx generate`` and ``trlx chat``: samples and answers of what was trained."""

import builtins
import inspect
import io
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from tests.builders import CHARACTERS, char_tokenizer, tiny_gpt2
from tests.runs import run
from tests.unit.test_cli import failure
from trlx.launch import chat, trained
from trlx.launch import generate as generating
from trlx.launch.cli import main
from trlx.launch.generate import Request

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def ilql(tmp_path_factory):
    """A trainer and the folder of its run, whose evaluations sampled with beta 0 and 2."""
    folder = tmp_path_factory.mktemp("ilql")
    return run("ILQL", folder, train={"total_steps": 1, "eval_interval": 1, "checkpoint_interval": 1}), folder


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A folder with a chat model."""
    folder, tokenizer = tmp_path_factory.mktemp("talker"), char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_gpt2().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answered(capsys, *argv) -> list[dict]:
    """The lines of JSON that `generate` prints."""
    assert main(["generate", *map(str, argv), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_name_of_a_checkpoint_gives_what_its_trainer_samples(ilql, capsys):
    trainer, folder = ilql
    texts = ["ab", "cab"]
    greedy = {beta: trainer.generate(texts, beta=beta, temperature=0) for beta in (0, 2, 500)}
    assert greedy[0] != greedy[500]
    asked = ["--prompt", "ab", "--prompt", "cab", "--gen", "temperature=0"]
    found = [{"prompt": text, "output": output} for text, output in zip(texts, greedy[2], strict=True)]
    assert answered(capsys, folder, *asked) == found  # with the last value that evaluations tried
    names = ("checkpoint_1", "checkpoint_1/hf_model")
    assert [trained.find(str(folder / name)) for name in names] == [trained.find(str(folder))] * 2
    outputs = [row["output"] for row in answered(capsys, folder, *asked, "beta=500")]
    assert outputs == greedy[500]


def test_a_model_without_a_run_samples_rows_of_a_file_and_keeps_their_columns(talker, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "ab", "label": 1}\n{"question": "b", "label": 2}\n')
    asked = ["--prompts", "rows.jsonl", "--column", "prompt=question", "-n", "2", "--gen", "max_new_tokens=4"]
    rows = answered(capsys, talker, *asked, "--batch-size", "3")
    assert [(row["prompt"], row["label"]) for row in rows] == [("ab", 1), ("ab", 1), ("b", 2), ("b", 2)]
    assert rows != answered(capsys, talker, *asked, "--batch-size", "3", "--seed", "1")
    assert main(["generate", str(talker), *asked, "--batch-size", "3", "--out", "out.jsonl"]) == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows
    assert capsys.readouterr().out == ""


def test_the_lines_of_a_pipe_are_prompts_and_are_printed_for_reading(talker, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n\nb\n"))
    typed = [str(talker), "--gen", "max_new_tokens=3", "temperature=0"]
    assert main(["generate", *typed]) == 0
    printed = capsys.readouterr().out
    first, second = (row["output"] for row in answered(capsys, *typed, "--prompt", "ab", "--prompt", "b"))
    assert printed == f"> ab\n{first}\n\n> b\n{second}\n\n"
    (cut,) = answered(capsys, *typed, "--prompt", "ab", "--stop", first[1])
    assert cut["output"] == first[: first.index(first[1])].rstrip()


def test_a_message_is_written_in_the_chat_template_and_its_turn_ends_where_the_model_says(talker, tmp_path, capsys):
    model = shutil.copytree(talker, tmp_path / "model")
    (whole,) = answered(capsys, model, "--prompt", "u:ab\na:", "--gen", "temperature=0")
    end = whole["output"][2]
    GenerationConfig(eos_token_id=[2, CHARACTERS.index(end) + 4]).save_pretrained(model)
    (said,) = answered(capsys, model, "--prompt", "ab", "--gen", "temperature=0", "--chat")
    turn = whole["output"][: whole["output"].index(end) + 1]
    assert said == {"prompt": [{"role": "user", "content": "ab"}], "output": turn}


@pytest.mark.parametrize(
    "typed, said",
    [
        ("nowhere/at/all --prompt a", "the checkpoint is 'nowhere/at/all', which does not exist (seen from "),
        ("empty --prompt a", "empty holds neither a checkpoint nor a model: name a folder that a run has saved into\n"),
        ("judge --prompt a", "judge is a reward model, which generates nothing: it scores, as --reward "),
        ("run --prompt a", "run holds neither a checkpoint nor a model"),
        ("a.txt --prompt a", "a.txt is a file: name a folder, a .nemo archive, or a model of the hub\n"),
        ("TALKER", "There are no prompts: add --prompt TEXT or --prompts FILE, or pipe lines of text\n"),
        ("TALKER --prompt a --gen temprature=1", "Unknown key 'method.gen_kwargs.temprature'. Did you mean"),
        ("TALKER --prompt a --gen 3", "--gen takes key=value, such as temperature=0.7, got 3\n"),
        ("TALKER --prompt a --gen beta=1", "method.gen_kwargs.beta is 1, but only ILQL has the Q heads"),
        ("TALKER --prompt a --device tpu", "--device is 'tpu': write cpu, cuda, or cuda:N for GPU N\n"),
        ("TALKER --prompt a --device cuda:9", "--device is 'cuda:9', but there are 0 GPUs here\n"),
        ("TALKER --prompt a --out none/x.jsonl", "--out is none/x.jsonl, but there is no folder none\n"),
        ("TALKER --prompt a --number 0", "--number must be at least 1, got 0\n"),
        ("TALKER --prompt a --processes 0", "--processes must be at least 1, got 0\n"),
        ("TALKER --prompts rows.csv", "rows.csv has the columns question: write --column prompt=NAME for the prompts"),
    ],
)
def test_what_cannot_be_sampled_is_one_sentence_and_exit_code_2(typed, said, talker, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "rows.csv").write_text("question\na\n")
    for name, method in (("judge", "RewardConfig"), ("run", "PPOConfig")):
        (tmp_path / name / "hf_model" if name == "judge" else tmp_path / name).mkdir(parents=True)
        settings = {"method": {"name": method}, "train": {}}
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    (tmp_path / "judge" / "hf_model" / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, printed = failure(capsys, "generate", *typed.replace("TALKER", str(talker)).split())
    assert code == 2 and printed.startswith(f"trlx generate: {said}") and printed.count("\n") == 1


def test_several_processes_sample_with_the_same_words(talker, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(generating, "become", lambda command: ran.append(command) or sys.exit(0))
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\nb\n"))
    typed = [str(talker), "--gen", "top_k=3", "max_new_tokens=4", "--json", "--batch-size", "3", "--tp", "2"]
    with pytest.raises(SystemExit):
        main(["generate", *typed, "--processes", "2"])
    words = ran[0][ran[0].index("generate") :]
    monkeypatch.setattr(generating, "run", lambda request, processes: ran.append((request, processes)))
    main(words)
    assert ran[1] == (
        Request(
            checkpoint=str(talker),
            prompt=["ab", "b"],
            gen=["top_k=3", "max_new_tokens=4"],
            json=True,
            batch_size=3,
            tp=2,
        ),
        None,
    )


def test_archives_and_layouts_are_sampled_on_megatron(ilql, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(trained, "_built", lambda config, stop: built.append(config))
    (tmp_path / "model.nemo").touch()
    trained.sampler(trained.find(str(tmp_path / "model.nemo")), [], [])
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": None}
    trained.sampler(trained.find(str(ilql[1])), ["beta=1"], [], layout=layout)
    found = [(config.train.trainer, config.train.trainer_kwargs) for config in built]
    assert found == [("NeMoSFTTrainer", {}), ("NeMoILQLTrainer", {"tensor_model_parallel_size": 2})]


def test_a_model_is_loaded_as_its_run_loaded_it(monkeypatch):
    monkeypatch.setattr(trained, "_built", lambda config, stop: config)
    model = {"model_arch_type": "seq2seq", "model_extra_configs": {"dtype": "torch.bfloat16", "attn_pdrop": 0.5}}
    run = {"model": model, "train": {"mixed_precision": "bf16", "seq_length": 77}}
    found = trained.sampler(trained.Source("t5", run), [], [])
    assert (found.model.model_arch_type, found.model.model_extra_configs) == ("seq2seq", {"dtype": "bfloat16"})
    assert (found.train.mixed_precision, found.train.seq_length) == ("bf16", 77)


@pytest.mark.parametrize("command", ["generate --prompt a --tp 2", "chat"])
def test_what_is_typed_reaches_the_sampler(command, talker, monkeypatch):
    asked, typed = [], inspect.signature(trained.sampler)

    def sampler(*given, **named):
        asked.append(typed.bind(*given, **named).arguments)
        raise KeyboardInterrupt

    for module in (generating, chat):
        monkeypatch.setattr(module, "sampler", sampler)
    name, *own = command.split()
    options = "--gen top_k=3 --stop END --tokenizer words --seed 5".split()
    assert main([name, str(talker), *own, *options]) == 130
    wanted = {"source": trained.find(str(talker)), "settings": ["top_k=3"], "stop": ["END"], "tokenizer": "words"}
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": None}
    more = {"layout": layout} if name == "generate" else {"usual": {"max_new_tokens": chat.NEW_TOKENS}}
    assert asked == [{**wanted, "seed": 5, **more}]


def test_each_process_answers_its_own_prompts_and_all_of_them_take_part(monkeypatch):
    monkeypatch.setattr(generating.Respond, "texts", lambda self, prompts: [prompt.upper() for prompt in prompts])
    rows = [{"prompt": letter} for letter in "abcde"]
    for rank, heard in ((0, [["A", "B"], ["E"]]), (1, [["C", "D"], []])):
        said = []
        backend = SimpleNamespace(data_rank=rank, data_size=2, row_format=None)
        backend.gather_objects = lambda texts, said=said: (
            said.append(texts) or "ABCDE"[4 * len(said) - 4 : 4 * len(said)]
        )
        trainer = SimpleNamespace(backend=backend, sampling=lambda _: None, sampling_kwargs={}, tokenizer=None)
        trainer.draw = lambda prompts, _: prompts
        found = list(generating._answered(trainer, None, rows, 2))
        assert said == heard and [row["output"] for row in found] == list("ABCDE")


def typing(monkeypatch, *lines):
    """Makes `input` return these lines, raise those that are errors, and then end."""
    waiting = iter([*lines, EOFError()])

    def read(_):
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)


def test_a_conversation_is_remembered_and_each_answer_is_shown_once(talker, capsys, monkeypatch):
    typing(
        monkeypatch, "ab", "/system c", "ba", KeyboardInterrupt(), "", "/what", "cab", "/reset", "b", "/quit", "never"
    )
    heard, respond = [], generating.Respond.texts

    def texts(self, prompts):
        answers = respond(self, prompts)
        heard.append((prompts[0], answers[0]))
        return answers

    monkeypatch.setattr(generating.Respond, "texts", texts)
    assert main(["chat", str(talker), "--gen", "max_new_tokens=8", "--system", "d"]) == 0
    (first, system), (_, second) = ({"role": "system", "content": text} for text in "dc"), heard[1]
    said = [{"role": "user", "content": "ba"}, {"role": "assistant", "content": second}]
    assert [prompt for prompt, _ in heard] == [
        [first, {"role": "user", "content": "ab"}],
        [system, said[0]],
        [system, *said, {"role": "user", "content": "cab"}],
        [system, {"role": "user", "content": "b"}],
    ]
    printed = capsys.readouterr().out
    assert printed.count(chat.HELP) == 2
    shown = [part for part in printed.replace(f"{chat.HELP}\n", "").split("\n\n") if part.strip()]
    assert "".join(shown).replace("\n", "") == "".join(answer for _, answer in heard).replace("\n", "")


def test_ctrl_c_ends_an_answer_and_a_conversation_that_is_too_long_stays_as_it_was(ilql, capsys, monkeypatch):
    typing(monkeypatch, "ab", "a" * 60, "b")
    prompts, stop = [], chat.Aloud.done

    def done(self, ids, start=0):
        assert list(self.stop_sequences) == ["END"]
        ended = stop(self, ids, start)
        if len(self.ids) == 2:
            raise KeyboardInterrupt
        return ended

    respond = generating.Respond.texts
    monkeypatch.setattr(chat.Aloud, "done", done)
    monkeypatch.setattr(
        generating.Respond, "texts", lambda self, given: prompts.append(given[0]) or respond(self, given)
    )
    assert main(["chat", str(ilql[1]), "--gen", "max_new_tokens=30", "beta=1", "--stop", "END"]) == 0
    printed = capsys.readouterr()
    first = printed.out.removeprefix(f"{chat.HELP}\n").split("\n\n")[0]
    assert 0 < len(first) <= 2
    assert prompts == ["ab", f"ab\n{first}\n{'a' * 60}", f"ab\n{first}\nb"]
    assert "positions of the model: shorten it, or lower max_new_tokens. /reset begins anew" in printed.err


def test_text_is_shown_at_once_but_for_what_may_become_a_stop_sequence_or_half_a_character():
    shown = []
    aloud = chat.Aloud(char_tokenizer(), ["bad"], shown.append)
    for text in ("a", "ab", "aba", "abac", "abacba"):
        aloud.tell(text, is_whole=False)
    assert shown == ["a", "bac"]
    aloud.tell("abacbad\ufffd", is_whole=False)
    assert shown == ["a", "bac"]
    aloud.tell("abac", is_whole=True)
    aloud.tell("abacba", is_whole=True)
    assert shown == ["a", "bac", "ba"]
    aloud.begin()
    aloud.tell("x\ufffd", is_whole=False)
    assert shown[3:] == ["x"]


def test_ctrl_c_is_exit_code_130_and_prints_no_traceback(talker, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generating, "_sample", interrupted)
    assert main(["generate", str(talker), "--prompt", "a"]) == 130
    assert "Traceback" not in capsys.readouterr().err
