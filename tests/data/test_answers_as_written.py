"""An answer is trained on as the chat template writes it, in the tokens that it has inside the
text."""

import copy
import string
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from svdtune.data import encode, to_examples
from svdtune.data.chats import answer_opening
from svdtune.data.encoding import IGNORED
from svdtune.data.preferences import encode_pairs, to_pairs
from svdtune.errors import SvdtuneError

TURNS = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3 + 3?"},
    {"role": "assistant", "content": "six"},
]
CHANNELS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}final: {% endif %}{{ m.content | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokens(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> tuple[list[str], list[str]]:
    """All tokens of a row, and those that are trained on."""
    [example] = to_examples([row], "prompt", "completion")
    encoded = encode(example, tokenizer, 1000)
    learnt = [token for token in encoded["labels"] if token != IGNORED]
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in encoded["input_ids"]], [
        str(tokenizer.convert_ids_to_tokens(token)) for token in learnt
    ]


@pytest.fixture
def channels(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tiny_tokenizer)
    own.chat_template = CHANNELS
    return own


def test_what_a_template_writes_around_one_answer_is_trained_on(channels: PreTrainedTokenizerFast) -> None:
    first, both = (tokens({"messages": TURNS[:size]}, channels)[1] for size in (2, 4))
    assert channels.convert_tokens_to_string(first) == "final: 4<|end|>"
    assert channels.convert_tokens_to_string(both) == "final: 4<|end|>final: six<|end|>"
    judged = {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [{"role": "assistant", "content": "5"}]}
    rows, _ = encode_pairs(to_pairs([judged]), channels, 1000)
    assert [channels.decode(rows[0][name]) for name in ("chosen_ids", "rejected_ids")] == [
        "final: 4<|end|>",
        "final: 5<|end|>",
    ]
    raw = tokens({"prompt": TURNS[:1], "completion": "4"}, channels)[1]
    assert channels.convert_tokens_to_string(raw) == "4<|end|>", "a text is what it is"


def test_what_a_template_opens_an_answer_with(channels: PreTrainedTokenizerFast) -> None:
    assert channels.convert_tokens_to_string(channels.convert_ids_to_tokens(answer_opening(channels))) == "final: "
    for template in (PHI, None, "{{ raise_exception('no') }}", "{{ messages | length }}"):
        channels.chat_template = template
        assert answer_opening(channels) == []


def test_a_template_that_asks_with_more_than_it_writes_later(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(tiny_tokenizer)
    own.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    for size in (2, 4):
        turns = [turn | ({"weight": 0} if at == 1 and size == 4 else {}) for at, turn in enumerate(TURNS[:size])]
        found, learnt = tokens({"messages": turns}, own)
        assert own.convert_tokens_to_string(learnt) == f"{turns[-1]['content']}<|end|>"
        assert own.convert_tokens_to_string(found).endswith(f"<think>{turns[-1]['content']}<|end|>")
        turns[-1] = {"role": "assistant", "content": "<think>2 and 2</think>4"}  # which opens its thoughts itself
        assert own.convert_tokens_to_string(tokens({"messages": turns}, own)[1]) == "2 and 2</think>4<|end|>"
    with pytest.raises(SvdtuneError, match="differently once the turn is there"):
        tokens({"messages": TURNS}, own)


def test_an_end_behind_the_whole_chat_is_no_part_of_its_turns(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(tiny_tokenizer)
    own.chat_template = PHI
    for template in (PHI, PHI.replace("m.content", "m.content | trim")):
        own.chat_template = template
        for size, learnt in ((2, "4<|end|>"), (4, "4<|end|>six<|end|>")):
            assert own.convert_tokens_to_string(tokens({"messages": TURNS[:size]}, own)[1]) == learnt
    spaced = [*TURNS[:3], {"role": "assistant", "content": "six\n"}]
    assert own.convert_tokens_to_string(tokens({"messages": spaced}, own)[1]) == "4<|end|>six<|end|>"


def sentencepiece(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer as those of Llama 2 and Mistral: a space is put before a text, as "▁"."""
    vocab = {token: at for at, token in enumerate(["<unk>", "<s>", "</s>", "▁", *string.printable.strip(), "\n", "▁▁"])}
    merges = [("▁", "▁")]
    for word in ("4", "six", "[", "a"):
        for at, letter in enumerate(word):
            merges.append((f"▁{word[:at]}", letter))
            vocab.setdefault(f"▁{word[: at + 1]}", len(vocab))
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
@pytest.mark.parametrize("template", [MISTRAL, ZEPHYR])
def test_a_piece_has_no_space_that_the_text_has_not(kind: str, template: str) -> None:
    tokenizer = sentencepiece(kind)
    tokenizer.chat_template = template
    found, learnt = tokens({"messages": TURNS}, tokenizer)
    text = str(tokenizer.apply_chat_template(TURNS, tokenize=False))
    whole = tokenizer.tokenize(text)
    assert found == whole[: len(found)]
    assert learnt == (["▁4", "</s>", "▁six", "</s>"] if template == MISTRAL else ["4", "</s>", "s", "i", "x", "</s>"])
    one = tokens({"messages": TURNS[:2]}, tokenizer)[0]
    assert one == found[: len(one)]


@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
@pytest.mark.parametrize(("completion", "answer"), [(" 4", ["▁4"]), ("4", ["4"])])
def test_a_completion_follows_its_prompt(kind: str, completion: str, answer: list[str]) -> None:
    tokenizer = sentencepiece(kind)
    found, learnt = tokens({"prompt": "a:\n", "completion": completion}, tokenizer)
    assert (found, learnt) == (["<s>", "▁a", ":", "\n", *answer, "</s>"], [*answer, "</s>"])
    assert tokens({"text": "4"}, tokenizer)[0] == ["<s>", "▁4", "</s>"], "a text that nothing precedes is whole"


@pytest.mark.parametrize("written", ["{{ c.arguments }}", "{{ '' + c.arguments }}", "{{ c.arguments | tojson }}"])
def test_arguments_of_calls_are_json_in_every_template(tiny_tokenizer: PreTrainedTokenizerFast, written: str) -> None:
    own = copy.deepcopy(tiny_tokenizer)
    calls = "{% for c in m.tool_calls or [] %}" + written + "{% endfor %}"
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        + calls
        + "{{ eos_token }}{% endfor %}"
        + ("{% if add_generation_prompt %}assistant:{% endif %}")
    )
    for arguments in ({"a": "ü"}, '{"a": "ü"}'):
        turn = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": arguments}]}
        learnt = tokens({"messages": [TURNS[0], turn]}, own)[1]
        assert own.convert_tokens_to_string(learnt) == '{"a": "ü"}<|end|>'


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_what_was_thought_is_written_or_refused(channels: PreTrainedTokenizerFast, name: str) -> None:
    row = {"messages": [TURNS[0], {**TURNS[1], name: "2 and 2"}]}
    with pytest.raises(SvdtuneError, match=f"leaves out what the assistant thought, '{name}'"):
        tokens(row, channels)
    channels.chat_template = CHANNELS.replace("{{ m.content", "{{ m." + name + " }}={{ m.content")
    assert channels.convert_tokens_to_string(tokens(row, channels)[1]) == "final: 2 and 2=4<|end|>"


def test_a_thought_under_two_names_is_written_once(channels: PreTrainedTokenizerFast) -> None:
    channels.chat_template = CHANNELS.replace("{{ m.content", "{{ m.reasoning_content }}={{ m.content")
    row = {"messages": [TURNS[0], {**TURNS[1], "reasoning": "2 and 2", "reasoning_content": "2 and 2"}]}
    assert channels.convert_tokens_to_string(tokens(row, channels)[1]) == "final: 2 and 2=4<|end|>"


def test_arguments_that_a_message_quotes_are_no_sign_of_a_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(tiny_tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.arguments | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": "b"}}]}
    turns = [{"role": "user", "content": "call {'a': 'b'}"}, call, {"role": "tool", "content": "{'a': 'b'}"}, TURNS[1]]
    assert own.convert_tokens_to_string(tokens({"messages": turns}, own)[1]) == '{"a": "b"}<|end|>4<|end|>'
