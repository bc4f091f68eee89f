"""Prompts, answers and verdicts in the tokens of real models, next to `apply_chat_template`."""

from importlib.util import find_spec

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from models.real import REAL, unpack
from scir.data.chat import DATE, set_template
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
    "42",
    "`x`",
    "(a) one\n(b) two",
    "¿Qué es «naïve»? 你好, ☃ 12 345",
]
BROKEN = ["\nYes? ", "\n\n Hi", "\t x"]  # these may be one token with the template's line break, in a conversation
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module", params=REAL)
def real(request, tmp_path_factory):
    """A real model's tokenizer with its chat template, and what is known of it."""
    known, folder = REAL[request.param], tmp_path_factory.mktemp("real")
    if known.file and not find_spec("sentencepiece"):
        pytest.skip("sentencepiece is not installed, which reads tokenizer.model")
    try:
        unpack(known, folder)
    except OSError as e:
        pytest.skip(str(e))
    tokenizer = (LlamaTokenizer if known.file else AutoTokenizer).from_pretrained(folder)
    tokenizer.chat_template = set_template(known.template or tokenizer.chat_template, known.args)
    return tokenizer, known


def theirs(tokenizer, turns, asks=True):
    """A conversation's ids by transformers alone."""
    return tokenizer.apply_chat_template(turns, add_generation_prompt=asks, date_string=DATE, return_dict=False)


def talk(*texts):
    """Texts of user, assistant, user, ..."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("text", TEXTS + BROKEN)
def test_conversations_have_the_ids_of_the_template(real, text):
    tokenizer, _ = real
    for turns in (talk(text), talk("Hi", text, "So?"), talk("Hi", "Yes", text)):
        assert encode_prompt(tokenizer, turns) == theirs(tokenizer, turns)


@pytest.mark.parametrize("turns", [talk("Hi"), talk("Hi", "Yes", " So?\n")])
def test_system_messages_have_the_ids_of_the_template_or_are_refused(real, turns):
    tokenizer, known = real
    if known.system == "refused":
        with pytest.raises(ValueError, match="no system role"):
            encode_prompt(tokenizer, [SYSTEM, *turns])
    else:
        assert encode_prompt(tokenizer, [SYSTEM, *turns]) == theirs(tokenizer, [SYSTEM, *turns])
        assert encode_prompt(tokenizer, turns, SYSTEM["content"]) == theirs(tokenizer, [SYSTEM, *turns])


def without_last_space(tokenizer, ids, end):
    """A conversation without the space that Llama 2's template writes between an answer and its end."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    at = max(i for i, token in enumerate(tokens) if token == end)
    return ids[: at - 1] + ids[at:] if tokens[at - 1] == "▁" else ids


@pytest.mark.parametrize("text", TEXTS)
def test_answers_have_the_ids_of_the_template_and_end_as_it_ends_them(real, text):
    tokenizer, known = real
    assert tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) == known.end
    ours = encode_prompt(tokenizer, "Hi") + encode_response(tokenizer, text)
    said = without_last_space(tokenizer, theirs(tokenizer, talk("Hi", text), asks=False), known.end)
    assert said[: len(ours)] == ours
    assert ours[-1] == turn_end(tokenizer)
    assert not tokenizer.decode(said[len(ours) :]).strip()


@pytest.mark.parametrize("texts", [["Hi", "Yes."], ["Hi", "Yes.", "So?", "No."]])
def test_an_answered_conversation_is_that_of_the_template(real, texts):
    tokenizer, known = real
    assert encode_messages(tokenizer, talk(*texts)) == theirs(tokenizer, talk(*texts), asks=False)
    if known.system == "kept":
        turns = [SYSTEM, *talk(*texts)]
        assert encode_messages(tokenizer, turns) == theirs(tokenizer, turns, asks=False)
    else:  # Nemo's template leaves the system message out where the assistant spoke last
        with pytest.raises(ValueError, match="no system role"):
            encode_messages(tokenizer, [SYSTEM, *talk(*texts)])


@pytest.mark.parametrize("words", [("A", "B"), ("Yes", "No"), ("1", "2")])
def test_verdicts_are_read_where_the_template_has_them(real, words):
    tokenizer, known = real
    for system in (None, "Be fair.") if known.system == "kept" else (None,):
        judge = JudgeSpec(system=system, verdicts=words)
        asked = judge_ids(tokenizer, judge, "Why is the sky blue?", "Air scatters blue light.", "no")
        question = judge.template.format(prompt="Why is the sky blue?", first="Air scatters blue light.", second="no")
        verdicts = find_verdicts(tokenizer, words)
        for word, ids in zip(words, (verdicts.first, verdicts.second)):
            turns = [{"role": "system", "content": system}] * bool(system) + talk(question, word)
            said = theirs(tokenizer, turns, asks=False)
            at = max(i for i, token in enumerate(said) if tokenizer.decode([token]).strip() == word)
            assert said[at] in ids and said[at - 4 : at] == asked[-4:]
            assert tokenizer.decode(said[:at]) == tokenizer.decode(asked)


@pytest.mark.parametrize("word", ["A", "B", "Yes", "No", "1"])
def test_the_ids_of_a_verdict_are_spellings_of_its_word(real, word):
    tokenizer, _ = real
    assert all(tokenizer.decode([i]).strip() == word for i in verdict_ids(tokenizer, word))


def test_words_that_cannot_be_verdicts_are_refused(real):
    tokenizer, _ = real
    with pytest.raises(ValueError, match="'Unmistakably' is not a single token"):
        verdict_ids(tokenizer, "Unmistakably")


def test_nobody_can_write_a_special_token(real):
    tokenizer, known = real
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    marks = lambda ids: [i for i in ids if i in special]
    for bad in (f"{known.end}{tokenizer.eos_token}x", f"x{tokenizer.bos_token} ", known.end[:-1], known.end[1:]):
        assert marks(encode_prompt(tokenizer, bad)) == marks(encode_prompt(tokenizer, "x"))
        assert bad.strip() in tokenizer.decode(encode_prompt(tokenizer, bad))
        assert marks(encode_response(tokenizer, bad)) == [turn_end(tokenizer)]
        talks = [encode_messages(tokenizer, talk(t, t, t)) for t in (bad, "x")]
        assert marks(talks[0]) == marks(talks[1]) != []
        judged = [judge_ids(tokenizer, JudgeSpec(), t, t, t) for t in (bad, "x")]
        assert marks(judged[0]) == marks(judged[1])
