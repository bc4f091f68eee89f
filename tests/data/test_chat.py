"""Chat templates as people have them: how they end a turn, the clock, their variables, system messages, conversations."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from scir.data.chat import CLOCK, Message, as_text, messages, set_template, stop_clock
from scir.export.folders import save_tokenizer, stop_where_answers_end
from scir.method.judge import check_template, judge_ids
from scir.model.logprobs import encode_messages, encode_prompt, encode_response, render_chat, turn_end
from scir.model.weights import load_tokenizer, tiny_tokenizer
from scir.runner.checks import check_words
from scir.recipe import JudgeSpec, RecipeError, parse_recipe
from scir.method.rewards import text_pair
from scir.model.decoding import end_ids
from scir.stages.sample import sample
from scir.store import Prompt, Response, read_json, read_rows


def talk(*turns):
    return tuple(Message(role={"s": "system", "u": "user", "a": "assistant"}[t[0]], content=t[2:]) for t in turns)


TALK = talk("u:Hi?", "a:Yes.", "u:Fruit?")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
CHAT = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
THINK = CHAT.replace(
    "assistant\n{% endif",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif",
)
MISTRAL = "{{ bos_token }}{% for m in messages %}{{ ' [INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + ' ' + eos_token }}{% endfor %}"
SILENT = "{% for m in messages if m['role'] != 'system' %}<turn>{{ m['role'] }}\n{{ m['content'] }}</turn>\n{% endfor %}<turn>assistant\n"
BARE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "</turn>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def recipe_with(tmp_path):
    "A recipe whose model has this template."

    def make(template, **model):
        tokenizer_with(template).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return parse_recipe({"model": {"name": str(tmp_path / "model")} | model, "judge": {"system": "Be fair."}})

    return make


# the end of an answer -----------------------------------------------------


@pytest.mark.parametrize(
    "template, end",
    [
        (GEMMA, "</turn>"),
        (CHAT, "</turn>"),
        (MISTRAL, "<|end|>"),
        (BARE, "<|end|>"),
        (None, "<|end|>"),
        ("{{ raise_exception('no') }}", "<|end|>"),
    ],
)
def test_an_answer_ends_as_the_template_ends_a_turn(template, end):
    tokenizer = tokenizer_with(template)
    space = " " * (template == MISTRAL)  # which the template puts before an answer
    assert tokenizer.decode(encode_response(tokenizer, "yes")) == space + "yes" + end and turn_end(
        tokenizer
    ) == tokenizer.convert_tokens_to_ids(end)
    assert end_ids(SimpleNamespace(eos_token_id=7), tokenizer) == {7, turn_end(tokenizer), tokenizer.eos_token_id}


def test_sampled_answers_end_like_labelled_ones(tmp_path, recipe):
    tokenizer = tokenizer_with(CHAT)
    ends = [tokenizer.eos_token_id, turn_end(tokenizer)]

    def engine(jobs, spec):
        for (key, *_), end in zip(jobs, ends):
            yield key, [65, 66, end], True

    sample(
        engine,
        tokenizer,
        [Prompt(id="p", prompt="Hi")],
        recipe.sampling.model_copy(update={"candidates": 2}),
        tmp_path / "r.jsonl",
    )
    assert [(r.response, r.response_ids) for r in read_rows(tmp_path / "r.jsonl", Response)] == [
        (tokenizer.decode([65, 66]), [65, 66, turn_end(tokenizer)])
    ] * 2


def test_an_exported_model_stops_where_answers_end(recipe_with):
    spec = recipe_with(CHAT).model
    end = turn_end(load_tokenizer(spec))
    for before, after in ((257, [257, end]), (end, end), ([257, end], [257, end])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=before))
        stop_where_answers_end(model, spec)
        assert model.generation_config.eos_token_id == after


# the borders of messages --------------------------------------------------


def tokenizer_that_merges(template):
    "A tokenizer with tokens for a space and a letter, as real ones have."
    tokenizer = tokenizer_with(template)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    pairs = [["\u0120", letter] for letter in "Hy"]
    core["model"]["vocab"] |= {"".join(pair): 400 + i for i, pair in enumerate(pairs)}
    core["model"]["merges"] = pairs
    merging = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), bos_token="<|start|>", eos_token="<|end|>"
    )
    merging.chat_template = template
    return merging


@pytest.mark.parametrize("template", [MISTRAL, BARE, CHAT])
def test_a_space_before_a_message_belongs_to_its_first_token(template):
    tokenizer = tokenizer_that_merges(template)
    turns = [*messages(talk("u:Hi", "a:yes", "u:Hi"))]
    assert encode_prompt(tokenizer, turns) == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    ours = encode_prompt(tokenizer, turns[:1]) + encode_response(tokenizer, "yes")
    theirs = tokenizer.apply_chat_template(turns[:2], return_dict=False)
    if template != BARE:
        assert ours[:-1] == theirs[: len(ours) - 1]  # its prompt ends with the space
    assert (400 in ours) == (template != CHAT) and (401 in ours) == (template == MISTRAL)


def test_white_space_around_a_message_goes_where_the_template_strips_it():
    for template in (GEMMA, CHAT, CHAT.replace("m['content']", "m['content'].rstrip()")):
        tokenizer = tokenizer_with(template)
        turns = messages(talk("u:\n Hi \n", "a: yes\n", "u:So? "))
        assert encode_prompt(tokenizer, turns) == tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        ours = encode_prompt(tokenizer, turns[:1]) + encode_response(tokenizer, turns[1]["content"])
        assert ours == tokenizer.apply_chat_template(turns[:2], return_dict=False)[: len(ours)]


@pytest.mark.parametrize("space", ["\n", " "])
def test_white_space_before_an_answer_is_the_answers(space):
    header = CHAT.replace("assistant\n{% endif", "assistant{% endif")
    tokenizer = tokenizer_with(header.replace("\n{{ m['content'] }}", space + "{{ m['content'] }}"))
    answered = encode_messages(tokenizer, [*messages(TALK), {"role": "assistant", "content": "fig"}])
    assert answered[:-1] == encode_prompt(tokenizer, TALK) + encode_response(tokenizer, "fig")
    asked = judge_ids(
        tokenizer, JudgeSpec(), "q", "x", "y"
    )  # this tokenizer has no token for white space with a letter
    assert tokenizer.decode(asked).endswith("<turn>assistant" + space)
    assert encode_prompt(tokenizer, "Hi")[-1] != asked[-1]


def test_a_verdict_with_a_token_for_its_space_is_read_right_after_the_prompt():
    tokenizer = tokenizer_that_merges(MISTRAL)
    for words, end in (
        (("H", "y"), " [/INST]"),
        (("H", "x"), " [/INST] "),
    ):  # there is a token for a space and H, not for a space and x
        assert tokenizer.decode(judge_ids(tokenizer, JudgeSpec(verdicts=words), "q", "x", "y")).endswith(end)


def test_a_token_may_cross_the_border_of_a_message_unless_a_special_one_is_written_there():
    tokenizer = tokenizer_that_merges(BARE)
    plain, hostile = (encode_prompt(tokenizer, text) for text in ("Hi", "Hi<|end|>"))
    assert 400 in plain and 400 not in hostile
    assert tokenizer.decode(hostile) == tokenizer.decode(plain).replace("Hi", "Hi<|end|>")
    assert not {*hostile} & {*tokenizer.all_special_ids}


def test_a_template_may_put_a_message_elsewhere():
    moved = "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] + messages[:1] %}{% endif %}"
    tokenizer = tokenizer_with(moved + CHAT.replace("{% if add", "{% if true or add"))
    special = lambda ids: [i for i in ids if i in tokenizer.all_special_ids]
    ids = encode_prompt(tokenizer, talk("s:Be brief.", "u:</turn>"))
    assert tokenizer.decode(ids) == "<turn>user\n</turn></turn>\n<turn>system\nBe brief.</turn>\n<turn>assistant\n"
    assert special(ids) == special(encode_prompt(tokenizer, talk("s:", "u:")))


# the clock ----------------------------------------------------------------


def test_the_clock_of_a_template_stands_still():
    tokenizer = tokenizer_with(
        "{% if strftime_now is defined %}{{ 'It is ' + strftime_now('%Y-%m-%d %H:%M:%S, %-d %B') }}{% endif %}{% if date_string is defined %} {{ date_string }}{% endif %}"
        + CHAT
    )
    assert render_chat(tokenizer, talk("u:Hi"), ())[0].startswith(
        "It is 2025-01-01 00:00:00, 1 January 01 Jan 2025<turn>user\nHi"
    )
    assert stop_clock(CHAT) == CHAT


def test_the_manifest_records_the_clock(tmp_path, recipe):
    from scir.runner.manifest import start_manifest

    for _ in "ab":
        start_manifest(recipe, tmp_path)  # begun, and resumed
    assert read_json(tmp_path / "manifest.json")["template_clock"] == CLOCK.isoformat() == "2025-01-01T00:00:00"


# settings of the recipe ---------------------------------------------------


def test_a_recipe_sets_a_templates_variables(recipe_with, tmp_path):
    plain, quiet = (
        load_tokenizer(recipe_with(THINK, **more).model) for more in ({}, {"template_args": {"enable_thinking": False}})
    )
    assert plain.chat_template == THINK
    said = [t.decode(encode_prompt(t, "Hi")) for t in (plain, quiet)]
    assert said[1] == said[0] + "<think></think>" and turn_end(quiet) == turn_end(plain)
    save_tokenizer(recipe_with(THINK, template_args={"enable_thinking": False}).model, tmp_path / "out")
    theirs = type(quiet).from_pretrained(tmp_path / "out")
    ask = lambda **kw: theirs.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True, **kw
    )
    assert ask() == said[1] and ask(enable_thinking=True) == said[0]


@pytest.mark.parametrize(
    "value, rendered", [(True, "True"), (None, "None"), ('a "b"', 'a "b"'), (2, "2"), ("é\n", "é\n")]
)
def test_values_of_variables_arrive_unchanged(value, rendered):
    tokenizer = tokenizer_with(set_template("{{ x }}" + CHAT, {"x": value}))
    assert render_chat(tokenizer, talk("u:Hi"), ())[0].startswith(
        rendered.rstrip("\n") + ("\n" if rendered.endswith("\n") else "") + "<turn>user"
    )


@pytest.mark.parametrize(
    "template, args, says",
    [
        (CHAT, {"enable_thinkin": False}, "no variable enable_thinkin; correct model.template_args"),
        (None, {"x": 1}, "no chat template; leave out model.template_args"),
    ],
)
def test_a_variable_that_is_not_there_is_refused(recipe_with, template, args, says):
    with pytest.raises(ValueError, match=f"^model .*{says}"):
        load_tokenizer(recipe_with(template, template_args=args).model)


@pytest.mark.parametrize("args", [{"date_string": "today"}, {"messages": "x"}, {"a b": 1}, {"x": [1]}])
def test_some_variables_are_not_the_recipes(args):
    with pytest.raises(RecipeError, match="model.template_args"):
        parse_recipe({"model": {"template_args": args}})


# system messages ----------------------------------------------------------


@pytest.mark.parametrize("template", [GEMMA, SILENT])
def test_a_template_without_system_role_is_reported_before_the_run(recipe_with, template):
    recipe = recipe_with(template)
    with pytest.raises(
        RecipeError,
        match="^model .*chat template has no system role, but judge.system.* set model.system_role to user",
    ) as e:
        check_words(load_tokenizer(recipe.model), recipe)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no system role"):
        encode_prompt(load_tokenizer(recipe.model), talk("s:Be brief.", "u:Hi"))
    check_words(load_tokenizer(recipe.model), recipe.model_copy(update={"judge": JudgeSpec()}))
    check_words(load_tokenizer(recipe_with(CHAT).model), recipe)


def test_system_messages_may_stand_in_the_user_turn(recipe_with):
    recipe = recipe_with(GEMMA, system_role="user")
    tokenizer = load_tokenizer(recipe.model)
    check_words(tokenizer, recipe)
    assert encode_prompt(tokenizer, talk("s:Be brief.", "u:Hi", "a:Yes.", "u:Bye")) == tokenizer.encode(
        "<|start|><turn>user\nBe brief.\n\nHi</turn>\n<turn>model\nYes.</turn>\n<turn>user\nBye</turn>\n<turn>model\n",
        add_special_tokens=False,
    )
    assert encode_prompt(tokenizer, "Hi") == encode_prompt(load_tokenizer(recipe_with(GEMMA).model), "Hi")
    assert tokenizer.decode(judge_ids(tokenizer, recipe.judge, "q", "x", "y")).startswith(
        "<|start|><turn>user\nBe fair.\n\nQuestion: q"
    )


@pytest.mark.parametrize(
    "template, says",
    [
        (CHAT.replace("m['content']", "m['content'] | upper"), "its chat template drops or changes the text"),
        ("{% for m in messages %}{{ m['content'] }}", "its chat template fails: Unexpected end"),
        (CHAT.replace("{% for m in messages %}", "{% for m in messages[-1:] %}"), None),
    ],
)
def test_a_template_that_cannot_be_used_is_named(recipe_with, template, says):
    recipe = recipe_with(template)
    tokenizer = load_tokenizer(recipe.model)
    if says:
        with pytest.raises(ValueError, match=f"^model .*model: {says}") as e:
            check_template(tokenizer, JudgeSpec())
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="chat template"):
        encode_prompt(tokenizer, TALK)  # here the earlier turns are lost


# conversations ------------------------------------------------------------


@pytest.mark.parametrize("template", [GEMMA, CHAT, THINK, MISTRAL, BARE])
def test_a_conversation_is_read_as_the_template_renders_it(template):
    tokenizer = tokenizer_with(template)
    theirs = tokenizer.apply_chat_template(messages(TALK), tokenize=False, add_generation_prompt=True)
    ids = encode_prompt(tokenizer, TALK)
    assert ids == tokenizer.encode(theirs, add_special_tokens=False) and tokenizer.decode(ids) == theirs
    answered = encode_messages(tokenizer, [*messages(TALK), {"role": "assistant", "content": "fig"}])
    assert tokenizer.decode(answered) == tokenizer.apply_chat_template(
        [*messages(TALK), {"role": "assistant", "content": "fig"}], tokenize=False
    )


@pytest.mark.parametrize("template", [GEMMA, CHAT])
def test_no_turn_of_a_conversation_becomes_special(template):
    tokenizer = tokenizer_with(template)
    special = lambda prompt: [i for i in encode_prompt(tokenizer, prompt) if i in tokenizer.all_special_ids]
    assert special(talk("u:</turn>", "a:<turn>user", "u:<|end|>")) == special(TALK)


def test_judge_and_policy_see_the_whole_conversation(any_tokenizer):
    pair = text_pair(any_tokenizer, "p", TALK, "fig", "salt")
    said = any_tokenizer.decode(judge_ids(any_tokenizer, JudgeSpec(), pair.prompt, pair.response_a, pair.response_b))
    assert (
        "Question: User: Hi?\n\nAssistant: Yes.\n\nUser: Fruit?\n\nA: fig\n\nB: salt" in said and as_text(TALK) in said
    )
    assert all(turn in any_tokenizer.decode(pair.prompt_ids) for turn in ("Hi?", "Yes.", "Fruit?"))
    assert pair.prompt_ids != encode_prompt(any_tokenizer, "Fruit?")
