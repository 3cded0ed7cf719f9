"""The loss mask of chats: all of the assistant's turns up to their end tokens, and nothing else."""

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from svdtune.data import encode, encode_all, prompt_ids, to_examples
from svdtune.data.encoding import IGNORED
from svdtune.errors import SvdtuneError

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "six"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + "{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As of models that think: what was thought in earlier turns is taken out.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tiny_tokenizer)
    own.chat_template = CHATML
    return own


def learnt(tokenizer: PreTrainedTokenizerFast, row: dict[str, object]) -> str:
    [example] = to_examples([row], "prompt", "completion")
    encoded = encode(example, tokenizer, 1000)
    return tokenizer.decode([token for token in encoded["labels"] if token != IGNORED], skip_special_tokens=False)


def test_all_turns_are_trained_on_up_to_their_end_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token
    assert learnt(tokenizer, {"messages": TURNS}) == f"4{end}six{end}"
    [example] = to_examples([{"messages": TURNS}], "prompt", "completion")
    whole = tokenizer.decode(encode(example, tokenizer, 1000)["input_ids"], skip_special_tokens=False)
    written = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert whole == written[: written.rindex(end) + len(end)]  # nothing behind the last end token


def test_a_prompt_of_several_turns_is_not_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    more = [*TURNS[4:], TURNS[1], TURNS[2]]
    assert (
        learnt(tokenizer, {"prompt": TURNS[:4], "completion": more})
        == f"six{tokenizer.eos_token}4{tokenizer.eos_token}"
    )


def test_one_answer_in_a_chat_is_encoded_as_a_prompt_and_a_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    [chat] = to_examples([{"messages": TURNS[:3]}], "prompt", "completion")
    [pair] = to_examples([{"prompt": TURNS[:2], "completion": "4"}], "prompt", "completion")
    assert encode(chat, tokenizer, 1000) == encode(pair, tokenizer, 1000)


def test_a_template_that_takes_back_what_it_wrote_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = FORGETS
    with pytest.raises(
        SvdtuneError, match="the chat template writes what comes before the assistant's turn 5 different"
    ):
        learnt(tokenizer, {"messages": TURNS})


def test_a_template_that_refuses_is_quoted(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must take turns') }}"
    with pytest.raises(SvdtuneError, match="the chat template refuses its first 2 messages: roles must take turns"):
        learnt(tokenizer, {"messages": TURNS})


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
KNOWS_TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAID = {"role": "assistant", "content": "let me add", "tool_calls": CALL["tool_calls"]}
LATER = {"role": "system", "content": "Be brief."}
# Chats, by what each alone holds; and templates, by what each alone does not write.
CHATS = {
    "what the role 'system' says at first": {"messages": TURNS[:3]},
    "what the role 'system' says after the first message": {"messages": [*TURNS[1:3], LATER, *TURNS[3:]]},
    "what the role 'tool' says after the first message": {
        "messages": [TURNS[1], TURNS[2], {"role": "tool", "content": "7"}, TURNS[4]]
    },
    "what the role 'assistant' says beside a call of tools": {"messages": [TURNS[1], SAID]},
    "the assistant's calls of tools": {"messages": [TURNS[1], CALL]},
    "the tools that may be called": {"messages": TURNS[1:3], "tools": [TOOL]},
}


def of(messages: str) -> str:
    return "{% set messages = (" + messages + ") | list %}" + KNOWS_TOOLS


LACKS = {
    "what the role 'system' says at first": KNOWS_TOOLS.replace(
        "{{ m.content }}", "{% if not (loop.first and m.role == 'system') %}{{ m.content }}{% endif %}"
    ),
    "what the role 'system' says after the first message": of(
        "messages[:1] + messages[1:] | rejectattr('role', 'equalto', 'system') | list"
    ),
    "what the role 'tool' says after the first message": of("messages | rejectattr('role', 'equalto', 'tool')"),
    "what the role 'assistant' says beside a call of tools": KNOWS_TOOLS.replace(
        "{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"
    ),
    "the assistant's calls of tools": KNOWS_TOOLS.replace("m.tool_calls %}", "false %}"),
    "the tools that may be called": KNOWS_TOOLS.replace("if tools", "if false"),
}
# Words beside a call come with the call.
ALSO = {("what the role 'assistant' says beside a call of tools", "the assistant's calls of tools")}


@pytest.mark.parametrize("lacking", LACKS)
@pytest.mark.parametrize("held", CHATS)
def test_what_a_template_leaves_out_is_named(tokenizer: PreTrainedTokenizerFast, held: str, lacking: str) -> None:
    """A run would train on chats that lack it."""
    tokenizer.chat_template = LACKS[lacking]
    [example] = to_examples([CHATS[held]], "prompt", "completion")
    if held != lacking and (held, lacking) not in ALSO:
        alone, many = encode(example, tokenizer, 1000), encode_all([example] * 2, tokenizer, 1000)[0]
        assert list(many) == [alone, alone]
        return
    with pytest.raises(SvdtuneError, match=f"the chat template leaves out {lacking}, so that .* `model.chat_template`"):
        encode(example, tokenizer, 1000)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_writes_no_text_is_refused(tokenizer: PreTrainedTokenizerFast, role: str) -> None:
    """As those that take a content in parts alone."""
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}", f"{{% if m.role != '{role}' %}}{{{{ m.content }}}}{{% endif %}}"
    )
    with pytest.raises(SvdtuneError, match=f"the chat template leaves out what the role '{role}' says"):
        learnt(tokenizer, {"messages": TURNS[1:]})


def test_what_was_thought_before_the_only_answer_is_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    thinks = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", thinks)
    row = {"messages": [TURNS[1], {**TURNS[2], "reasoning_content": "2 and 2"}]}
    assert learnt(tokenizer, row) == f"<think>2 and 2</think>4{tokenizer.eos_token}"


def test_tools_reach_the_prompt_in_evaluation_too(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = KNOWS_TOOLS
    for row in ({"prompt": "2 + 2?"}, {"messages": TURNS[1:2]}, {"messages": TURNS[1:3]}):
        [example] = to_examples([{**row, "tools": [TOOL]}], "prompt")
        assert tokenizer.decode(prompt_ids(example, tokenizer, "chat")).startswith("add")
    [text] = to_examples([{"prompt": "2 + 2?", "tools": [TOOL]}], "prompt")
    with pytest.raises(
        SvdtuneError, match=r"the row has tools, and the template 'plain' writes none; use `template: chat`"
    ):
        prompt_ids(text, tokenizer)


def test_a_turn_without_an_end_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML.replace("{{ eos_token }}", "")
    with pytest.raises(
        SvdtuneError, match=r"does not close an assistant's turn with the end token \d+.*model\.end_token"
    ):
        learnt(tokenizer, {"messages": TURNS})


def test_many_at_once_are_what_each_is_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": TURNS}, {"prompt": "ask", "completion": "say"}, {"text": "all"}, {"messages": TURNS[:3]}]
    examples = [to_examples([row], "prompt", "completion")[0] for row in rows]
    assert list(encode_all(examples, tokenizer, 1000)[0]) == [encode(example, tokenizer, 1000) for example in examples]
