"""Chats: the template's tokens exactly, and training on what the assistant says and how it stops."""

import pytest
from tokenizers import AddedToken

import trlx
from tests.builders import char_tokenizer, tiny_gpt2_config
from tests.runs import share_of_a, tiny_config
from trlx.batch import Rollout
from trlx.data.chat import chat_prompt, chat_tokens
from trlx.data.dialogue import dialogues
from trlx.data.prompts import PromptPipeline

EOS, END, NEWLINE = 2, 38, 37
PLAIN = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""ChatML in short: a line per message, ended by a token that is not eos."""
MARKED = (
    "{% for m in messages %}{{ m['role'][0] }}:"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>\n"
    "{% else %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
"""The same, with the answers marked, but not the tokens that end them."""


def with_template(template, **changes):
    tokenizer = char_tokenizer(**changes)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def trained_text(messages, tokenizer):
    """The chat's text with what is trained in capitals, character by character."""
    ids, flags = chat_tokens(messages, tokenizer, "Sample 0")
    pairs = zip(ids, flags, strict=True)
    return "".join(tokenizer.decode([i]).upper() if flag else tokenizer.decode([i]) for i, flag in pairs)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_all_turns_of_the_assistant_are_trained_with_the_token_that_ends_them_and_nothing_else(template):
    tokenizer = with_template(template)
    text = trained_text(chat("hi", "yo", "ab", "cd", system="be"), tokenizer)
    assert text == "s:be<|end|>\nu:hi<|end|>\na:YO<|END|>\nu:ab<|end|>\na:CD<|END|>"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_chat_becomes_a_rollout_of_the_templates_own_tokens(template):
    tokenizer = with_template(template)
    messages = chat("a", "b", "c", "d")
    (rollout,) = dialogues([messages], tokenizer, 99)
    whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert rollout.prompt + rollout.response == whole[:-1]  # without the line break after the last turn
    assert rollout.prompt == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert rollout.trained[:3] == [True, True, False] and rollout.trained[-2:] == [True, True]
    assert sum(rollout.trained) == 4 and rollout.response[-1] == END


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (PLAIN.replace("<|end|>", "</s>"), "u:a</s>\na:B</S>"),
        (PLAIN.replace("<|end|>", ""), "u:a\na:B\n</S>"),
        (MARKED.replace("<|end|>", ""), "u:a\na:B</S>"),
        (MARKED.replace("<|end|>", "{{ eos_token if not loop.last }}"), "u:a</s>\na:B</S>"),
        ("<s>" + PLAIN, "<s>u:a<|end|>\na:B<|END|>"),
        (MARKED.replace("{% endgeneration %}<|end|>\n", "<|end|>\n{% endgeneration %}"), "u:a<|end|>\na:B<|END|>"),
    ],
)
def test_a_chat_ends_as_its_template_says_and_by_one_eos_where_that_says_nothing(template, text):
    for adds_bos in (False, True):
        assert trained_text(chat("a", "b"), with_template(template, adds_bos=adds_bos)) == text


def test_eos_after_all_turns_but_the_last_is_trained_after_that_one_as_well():
    template = MARKED.replace("<|end|>\n", "{{ eos_token if not loop.last }}\n")
    text = trained_text(chat("a", "b", "c", "d"), with_template(template))
    assert text == "u:a</s>\na:B</S>\nu:c</s>\na:D</S>"


def test_an_empty_answer_still_teaches_to_stop():
    for template in (PLAIN, MARKED):
        assert trained_text(chat("a", ""), with_template(template)) == "u:a<|end|>\na:<|END|>"


def test_a_template_without_end_tokens_between_turns_leaves_the_next_header_untrained():
    template = MARKED.replace("<|end|>\n", "").replace("{{ m['role'][0] }}:", "<|end|>{{ m['role'][0] }}:")
    text = trained_text(chat("a", "b", "c", "d"), with_template(template))
    assert text == "<|end|>u:a<|end|>a:B<|end|>u:c<|end|>a:D</S>"


def test_white_space_that_a_tokenizer_trims_off_its_tokens_shifts_nothing():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {token: i for i, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")
    for template in (PLAIN, MARKED):
        tokenizer.chat_template = template.replace("<|end|>", "</s>").replace("}}:", "}}:\n").replace("a:{%", "a:\n{%")
        text = trained_text(chat(" a", " b ", "c", "\nd e"), tokenizer)
        assert text == "u:\n a</s>\na:\n B </S>\nu:\nc</s>\na:\n\nD E</S>"
        _, flags = chat_tokens(chat("a", " b "), tokenizer, "Sample 0")
        assert flags == [False] * 9 + [True] * 4


def test_white_space_that_no_token_holds_shifts_nothing():
    from tokenizers import pre_tokenizers

    for template in (PLAIN, MARKED):
        tokenizer = with_template(template.replace("}}:", "}}: ").replace("a:{%", "a: {%"))
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), tokenizer.backend_tokenizer.pre_tokenizer]
        )
        assert trained_text(chat("a", "b", "c", "d"), tokenizer) == "u:a<|end|>a:B<|END|>u:c<|end|>a:D<|END|>"


def test_characters_of_several_tokens_are_trained_whole():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {token: i for i, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = MARKED.replace("<|end|>", "</s>")
    ids, flags = chat_tokens(chat("é", "é"), tokenizer, "Sample 0")
    assert len(ids) == 11 and flags == [False] * 8 + [True] * 3


def test_a_prompt_is_the_chat_up_to_where_the_assistant_answers():
    for adds_bos in (False, True):
        tokenizer = with_template("<s>" + PLAIN, adds_bos=adds_bos)
        ids = chat_prompt(chat("a", "b", "c"), tokenizer, "Prompt 0")
        assert tokenizer.decode(ids) == "<s>u:a<|end|>\na:b<|end|>\nu:c<|end|>\na:" and ids.count(1) == 1


def test_prompts_may_be_chats_beside_texts_and_keep_their_metadata():
    tokenizer = with_template(PLAIN)
    rows = [{"prompt": chat("a"), "x": 1}, {"prompt": "b", "x": 2}, {"prompt": [4], "x": 3}]
    first, second, third = PromptPipeline(rows, 20, tokenizer)
    assert tokenizer.decode(first.ids) == "u:a<|end|>\na:" and (first.metadata, first.text) == ({"x": 1}, None)
    assert (second.ids, second.text, third.ids) == ([5], "b", [4])


def test_a_long_chat_prompt_keeps_its_end(caplog):
    tokenizer = with_template(PLAIN)
    first, second = PromptPipeline([chat("abc"), "abcd"], 3, tokenizer)
    assert tokenizer.decode(first.ids) == "\na:" and second.ids == [4, 5, 6]
    assert "cut on the left or right" in caplog.text


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_long_chat_keeps_the_bos_that_its_template_writes(adds_bos):
    tokenizer = with_template("<s>" + PLAIN, adds_bos=adds_bos)
    tokenizer.truncation_side = "left"
    (prompt,) = PromptPipeline([chat("abc")], 4, tokenizer)
    assert tokenizer.decode(prompt.ids) == "<s>\na:"
    (rollout,) = dialogues([chat("abc", "b")], tokenizer, 5)
    assert tokenizer.decode(rollout.prompt + rollout.response) == "<s>a:b<|end|>"


def test_samples_of_all_kinds_stay_in_order():
    tokenizer = with_template(PLAIN.replace("<|end|>", "</s>"))
    rollouts = dialogues(["b", chat("a", "b"), ["a", "c"]], tokenizer, 99, scores=[1.0, 2.0, 3.0])
    assert rollouts[0] == Rollout(prompt=[1], response=[5, EOS], score=1.0)
    assert rollouts[1].response == [5, EOS] and rollouts[1].score == 2.0 and rollouts[1].trained is None
    assert rollouts[2] == Rollout(prompt=[4], response=[6, EOS], score=3.0)


def test_keys_without_a_value_are_not_written_out():
    template = "{% for m in messages %}{{ m.content }}{% if 'tool_calls' in m %}#{% endif %}{% endfor %}"
    messages = [{**message, "tool_calls": None} for message in chat("a", "b")]
    assert trained_text(messages, with_template(template)) == "aB</S>"


WRONG = [
    ([{"role": "user"}], ValueError, 'message 0 must have "role" and "content"'),
    ([{"role": None, "content": "a"}], ValueError, 'message 0 must have "role" and "content"'),
    ([{"role": "user", "content": "a"}, "b"], TypeError, "message 1 must be a dict"),
    ([{"role": "bot", "content": "a"}], ValueError, "message 0 has the role 'bot'; known: system"),
    ([{"role": "user", "content": ["a"]}], TypeError, "message 0: content must be a text"),
    (chat("a")[:1] * 2, ValueError, "message 1: a message of user cannot stand after one of user"),
    ([*chat("a"), {"role": "system", "content": "a"}], ValueError, "message 1: a message of system cannot stand after"),
    (chat("a", "b")[1:], ValueError, "message 0: a message of assistant cannot stand at the beginning"),
    ([{"from": "human", "value": "a"}], ValueError, r"message 0 must have .*; it has .*'value'\]: write \"role\" for"),
]


@pytest.mark.parametrize(("messages", "error", "words"), WRONG)
def test_a_wrong_message_is_named(messages, error, words):
    tokenizer = with_template(PLAIN)
    with pytest.raises(error, match=f"Sample 1, {words}"):
        dialogues([chat("a", "b"), messages], tokenizer, 99)
    with pytest.raises(error, match=f"Prompt 1, {words}"):
        PromptPipeline([chat("a"), messages], 99, tokenizer)


def test_samples_end_with_the_assistant_and_prompts_do_not():
    tokenizer = with_template(PLAIN)
    with pytest.raises(ValueError, match="Sample 0 ends with a message of user"):
        dialogues([chat("a", "b", "c")], tokenizer, 99)
    with pytest.raises(ValueError, match="Prompt 0 ends with a message of the assistant"):
        PromptPipeline([chat("a", "b")], 99, tokenizer)


def test_without_a_chat_template_one_is_asked_for():
    for read in (
        lambda: dialogues([chat("a", "b")], char_tokenizer(), 9),
        lambda: PromptPipeline([chat("a")], 9, char_tokenizer()),
    ):
        with pytest.raises(ValueError, match="set tokenizer.chat_template"):
            read()


@pytest.mark.parametrize("marked", [False, True])
def test_what_the_template_itself_refuses_is_told_with_the_sample(marked):
    template = "{{ raise_exception('no system, please') }}" + (MARKED if marked else PLAIN)
    with pytest.raises(ValueError, match="Sample 0: the chat template refuses it: no system, please"):
        dialogues([chat("a", "b", system="c")], with_template(template), 99)


def test_a_template_that_rewrites_earlier_turns_needs_marks():
    forgets_answers = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' }}")
    asks_otherwise = PLAIN.replace("%}a:{%", "%}answer:{%")
    for template in (forgets_answers, asks_otherwise):
        with pytest.raises(ValueError, match=r"message 1 differently .* \{% generation %\}"):
            dialogues([chat("a", "b", "c", "d")], with_template(template), 99)
    marked = MARKED.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '' }}")
    assert trained_text(chat("a", "b", "c", "d"), with_template(marked)).endswith("a:<|END|>\nu:<|end|>\na:D<|END|>")
    with pytest.raises(ValueError, match="marks do not enclose the assistant's turns"):
        dialogues([chat("a", "b")], with_template(MARKED.replace("== 'assistant'", "== 'nobody'")), 99)


def test_chats_train_end_to_end(tmp_path):
    tokenizer = with_template(PLAIN)
    settings = {"model": {"model_path": tiny_gpt2_config(39)}, "tokenizer": {"tokenizer_path": tokenizer}}
    seen = []

    def reward(samples, prompts, outputs, **kwargs):
        seen.extend(prompts)
        return share_of_a(samples, prompts, outputs)

    config = tiny_config(tmp_path / "ppo", "PPO", **settings, train={"total_steps": 1, "seq_length": 20})
    prompts = [{"prompt": chat(text), "x": 1} for text in "abcdefgh"]
    trainer = trlx.train(config=config, reward_fn=reward, prompts=prompts)
    assert trainer.schedule.step == 1 and set(seen) == {f"u:{text}\na:" for text in "abcdefgh"}
    config = tiny_config(tmp_path / "sft", "SFT", **settings, train={"total_steps": 30, "seq_length": 24})
    config = config.evolve(optimizer={"kwargs": {"lr": 1e-2}}, method={"gen_kwargs": {"eos_token_id": END}})
    trainer = trlx.train(config=config, samples=[chat("a", "bb", "c", "dd")] * 4, eval_prompts=[chat("a")])
    response = trainer.generate([chat_prompt(chat("a"), tokenizer, "Prompt 0")], do_sample=False)[0, -3:]
    assert tokenizer.decode(response) == "bb<|end|>"
