"""Prompts, answers and verdicts in the tokens of real models, next to `apply_chat_template`."""

import pytest
from transformers import AutoTokenizer

from models.real import REAL, tokenizer_folder
from scir.data.chat import set_template
from scir.method.judge import find_verdicts, judge_ids, verdict_ids
from scir.model.logprobs import encode_messages, encode_prompt, encode_response, turn_end
from scir.recipe import JudgeSpec

TEXTS = [
    "Hi there",
    "  Hi there \n",
    "é ☃ 漢字 🙂",
    "a\n\n\nb",
    "def f(x):\n    return x",
    "1234567 89",
    "'s",
    "▁a",
    "x\ty",
    "<think> is a word",
    "# A\n- b\n",
]


@pytest.fixture(scope="module", params=REAL)
def real(request):
    """A real model's tokenizer with its chat template, and what the package says of it."""
    try:
        folder = tokenizer_folder(request.param)
    except OSError as e:
        pytest.skip(str(e))
    package, tokenizer = REAL[request.param], AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template or package.template
    if "enable_thinking" in tokenizer.chat_template:
        tokenizer.chat_template = set_template(tokenizer.chat_template, {"enable_thinking": False})
    return tokenizer, package


def theirs(tokenizer, turns, asks=True):
    """A conversation's ids by transformers alone."""
    return tokenizer.apply_chat_template(turns, add_generation_prompt=asks, return_dict=False)


def talk(*texts):
    """Texts of user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("text", TEXTS)
def test_conversations_have_the_ids_of_the_template(real, text):
    tokenizer, _ = real
    for turns in (talk(text), talk("Hi", text, "So?"), talk("Hi", "Yes", text)):
        assert encode_prompt(tokenizer, turns) == theirs(tokenizer, turns)


def test_system_messages_have_the_ids_of_the_template_or_are_refused(real):
    tokenizer, package = real
    turns = [{"role": "system", "content": "Be brief."}, *talk("Hi")]
    if package.template:
        with pytest.raises(ValueError, match="no system role"):
            encode_prompt(tokenizer, turns)
    else:
        assert encode_prompt(tokenizer, turns) == theirs(tokenizer, turns)


@pytest.mark.parametrize("text", TEXTS)
def test_answers_have_the_ids_of_the_template_and_end_as_it_ends_them(real, text):
    tokenizer, package = real
    assert tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) == package.end
    ours = encode_prompt(tokenizer, "Hi") + encode_response(tokenizer, text)
    assert theirs(tokenizer, talk("Hi", text), asks=False)[: len(ours)] == ours
    assert ours[-1] == turn_end(tokenizer)


@pytest.mark.parametrize("word", ["A", "B", "Yes", "No"])
def test_the_verdict_is_among_the_ids_that_are_read(real, word):
    tokenizer, _ = real
    asked = encode_prompt(tokenizer, "A or B?")
    said = theirs(tokenizer, talk("A or B?", word), asks=False)
    assert said[: len(asked)] == asked and said[len(asked)] in verdict_ids(tokenizer, word)
    assert all(tokenizer.decode([i]).strip() == word for i in verdict_ids(tokenizer, word))


def test_words_that_cannot_be_verdicts_are_refused(real):
    tokenizer, _ = real
    find_verdicts(tokenizer)
    with pytest.raises(ValueError, match="'Unmistakably' is not a single token"):
        verdict_ids(tokenizer, "Unmistakably")


def test_nobody_can_write_a_special_token(real):
    tokenizer, package = real
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    count = lambda ids: sum(i in special for i in ids)
    bad = f"{package.end}{tokenizer.eos_token}x"
    assert count(encode_prompt(tokenizer, bad)) == count(encode_prompt(tokenizer, "x"))
    assert count(encode_response(tokenizer, bad)) == 1
    assert bad in tokenizer.decode(encode_prompt(tokenizer, bad))
    judged = [judge_ids(tokenizer, JudgeSpec(), t, t, t) for t in (bad, "x")]
    assert count(judged[0]) == count(judged[1])


def test_an_answered_conversation_is_that_of_the_template(real):
    tokenizer, _ = real
    turns = talk("Hi", "Yes.", "So?", "No.")
    assert encode_messages(tokenizer, turns) == theirs(tokenizer, turns, asks=False)
