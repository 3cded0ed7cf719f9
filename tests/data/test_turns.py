"""A chat that is written once has the pieces that it has when it is written up to each turn."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from svdtune.data import chats, turns
from svdtune.data.chats import chat_pieces
from svdtune.data.examples import Chat
from svdtune.errors import SvdtuneError

SYSTEM, ASK, SAY = (
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2 + 2? "},
    {"role": "assistant", "content": " <b>4</b>\n"},
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}},
}
CHATS: dict[str, Chat] = {
    "one": Chat([ASK, SAY]),
    "system": Chat([SYSTEM, ASK, SAY]),
    "three": Chat([SYSTEM, ASK, SAY, ASK, SAY | {"content": "five"}, ASK, SAY]),
    "last": Chat([ASK, SAY, ASK, SAY], learn_from=2),
    "first": Chat([SAY, ASK, SAY]),
    "after-system": Chat([SYSTEM, SAY, ASK, SAY]),
    "side by side": Chat([ASK, ASK, SAY, SAY]),
    "thought": Chat([ASK, SAY | {"content": "<think>\nhm\n</think>\n\n4"}, ASK, SAY]),
    "tools": Chat([ASK, SAY | {"tool_calls": [CALL]}, {"role": "tool", "content": "4"}, SAY], [TOOL]),
    "offered": Chat([SYSTEM, ASK, SAY, ASK, SAY], [TOOL]),
    "mark": Chat([ASK, SAY | {"content": f"4{turns.MARK}"}]),
}

BODY = "<{{ m.role }}>{{ m.content }}{{ eos_token }}\n"
ASKING = "{% if add_generation_prompt %}<assistant>{% endif %}"
ONWARD = {
    "plain": "{% for m in messages %}" + BODY + "{% endfor %}" + ASKING,
    "stripped": "{%- for m in messages -%}\n  " + BODY + "  {%- endfor -%}\n " + ASKING,
    "lines": "{% for m in messages %}\n  {% if loop.first %}\n  first\n  {% endif %}\n"
    + BODY
    + "{% endfor %}\n"
    + ASKING,
    "kept": "{% for m in messages +%}\n  {% if m.role == 'user' +%}\n>{% endif %}\n"
    + BODY
    + "{%+ endfor +%}\n "
    + ASKING,
    "rest": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}[{{ messages[0].content }}]"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}" + BODY + "{% endfor %}" + ASKING,
    "state": "{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}{{ ns.count }}"
    + BODY
    + "{% endfor %}"
    + ASKING,
    "before": "{% for m in messages %}{% if loop.previtem and loop.previtem.role == m.role %}!{% endif %}"
    + BODY
    + "{% endfor %}"
    + ASKING,
    "closed": "{% for m in messages %}"
    + BODY
    + "{% endfor %}{% if add_generation_prompt %}<assistant>{% else %}.{% endif %}",
    "inside": "{% for m in messages %}{% for c in m.content %}{{ c }}{% if loop.last %}{{ eos_token }}{% endif %}"
    "{% endfor %}\n{% endfor %}" + ASKING,
    "marked": "{% for m in messages %}{% generation %}" + BODY + "{% endgeneration %}{% endfor %}" + ASKING,
    "of a role": "{% for m in messages %}{% if m.role == 'user' %}{% elif m['role'] == 'tool' %}"
    "{% if loop.last %}!{% endif %}{% endif %}" + BODY + "{% endfor %}" + ASKING,
}
# What each of these writes for some first messages, nobody can tell from what it writes for all.
AHEAD = {
    "last": "{% for m in messages %}{% if loop.last %}!{% endif %}" + BODY + "{% endfor %}" + ASKING,
    "counted": "{{ messages | length }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKING,
    "from behind": "{{ messages[-1].role }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKING,
    "second": "{{ messages[1].role }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKING,
    "renamed": "{% set messages = messages[1:] %}{{ messages[0].role }}{% for m in messages %}"
    + BODY
    + "{% endfor %}"
    + ASKING,
    "next": "{% for m in messages %}" + BODY + "{{ messages[loop.index].role }}{% endfor %}" + ASKING,
    "twice": "{% for m in messages %}{{ m.role }}{% endfor %}{% for m in messages %}" + BODY + "{% endfor %}" + ASKING,
    "nested": "{% for m in messages %}" + BODY + "{% for n in messages %}.{% endfor %}{% endfor %}" + ASKING,
    "end": "{% set ns = namespace(role='') %}{% for m in messages %}" + BODY + "{% set ns.role = m.role %}{% endfor %}"
    "{% if add_generation_prompt and ns.role == 'user' %}<assistant>{% endif %}",
    "asked": "{% for m in messages %}{% if add_generation_prompt %}?{% endif %}" + BODY + "{% endfor %}" + ASKING,
    "stopped": "{% for m in messages %}"
    + BODY
    + "{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}"
    + ASKING,
    "all": "{{ messages }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKING,
    "held": "{% for m in messages %}{% set l = loop %}{% if l.last %}!{% endif %}" + BODY + "{% endfor %}" + ASKING,
    "broken": "{% for m in messages %}",
}


def _of_trl() -> dict[str, str]:
    """TRL's templates of many models, if it is installed."""
    found = find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path("nowhere")
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


TEMPLATES = ONWARD | AHEAD | _of_trl()


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def found(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The pieces, or what the refusal says."""
    try:
        return chat_pieces(chat, tokenizer, "row 1")
    except SvdtuneError as error:
        return str(error)


@pytest.mark.parametrize("template", TEMPLATES)
def test_once_is_as_up_to_each_turn(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(tiny_tokenizer, TEMPLATES[template])
    once = {name: found(chat, tokenizer) for name, chat in CHATS.items()}
    monkeypatch.setattr(chats, "marked", lambda template: None)
    assert once == {name: found(chat, tokenizer) for name, chat in CHATS.items()}


def test_which_templates_never_look_ahead() -> None:
    assert [name for name, template in ONWARD.items() if turns.marked(template) is None] == []
    assert [name for name, template in AHEAD.items() if turns.marked(template) is not None] == []
    of_role = turns.marked(ONWARD["of a role"])
    assert of_role is not None
    assert of_role.roles == {"tool"}


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma", "phi3", "cohere"])
def test_templates_of_well_known_models_are_among_them(name: str) -> None:
    pytest.importorskip("trl")
    assert turns.marked(_of_trl()[name]) is not None


def test_a_chat_is_written_once_however_long_it_is(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template(tiny_tokenizer, ONWARD["plain"])
    written: list[int] = []
    render = chats._rendered
    monkeypatch.setattr(
        chats, "_rendered", lambda messages, *rest: written.append(len(messages)) or render(messages, *rest)
    )
    for count in (1, 2, 20):
        assert len(chat_pieces(Chat([ASK, SAY] * count), tokenizer, "row 1")) == 2 * count
    assert written == [2, 2, 4, 40]  # and once more, for what stands behind the messages
    tokenizer.add_special_tokens({"eos_token": "<other>"})
    chat_pieces(Chat([ASK, SAY]), tokenizer, "row 1")
    assert written == [2, 2, 4, 40, 2, 2]
