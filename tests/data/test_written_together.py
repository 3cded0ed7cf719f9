"""Many rows, written and tokenized together, are what each is alone: a prefix at a time, a piece at
a time."""

import copy
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from svdtune.data import Example, encode_all, prompt_ids
from svdtune.data.chats import check_written
from svdtune.data.encoding import IGNORED
from svdtune.data.examples import Chat
from svdtune.errors import SvdtuneError

BODY = "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
ASKING = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
OWN = {
    "plain": "{% for m in messages %}" + BODY + "{% endfor %}" + ASKING,
    "stripped": "{% for m in messages %}" + BODY.replace("content", "content | trim") + "{% endfor %}" + ASKING,
    "last": "{% for m in messages %}{% if loop.last %}!{% endif %}" + BODY + "{% endfor %}" + ASKING,
    "counted": "{{ messages | length }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKING,
    "tools": "{{ tools }}{% for m in messages %}" + BODY + "{% endfor %}" + ASKING,
    "asked": "{% for m in messages %}{% if add_generation_prompt %}?{% endif %}" + BODY + "{% endfor %}" + ASKING,
    "mistral": "{{ eos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('a role that is unknown') }}{% endif %}{% endfor %}",
    "smollm2": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nYou are "
    "helpful{{ eos_token }}\n{% endif %}" + BODY + "{% endfor %}" + ASKING,
}
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<|end|>")
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
WORDS = (" 4", "\n", "\n\n", "two", " plus", "  ", "é", "</think>", "<think>", "<|end|>", "_", "12")


def _of_trl() -> dict[str, str]:
    """TRL's templates of many models, if it is installed."""
    found = find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path("nowhere")
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


TEMPLATES = OWN | _of_trl()


@pytest.fixture(scope="session")
def merging() -> PreTrainedTokenizerFast:
    """A tokenizer with merges, so that where a text is cut has a say in its tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=list(ENDS), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["user assistant two plus two is 12\n\n\n is  4\n"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<s>")


def examples(seed: int) -> list[Example]:
    """Chats of one to eight turns, some with a system message, calls of tools, empty turns or two
    turns of one role behind each other; prompts in messages, and in text."""
    draw = random.Random(seed)
    found = []
    for at in range(40):
        turns: list[dict[str, Any]] = [{"role": "system", "content": "Be short."}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 8)):
            turns.append({"role": "user", "content": _text(draw)})
            if draw.random() < 0.1:
                turns.append({"role": "assistant", "content": "", "tool_calls": [CALL]})
                turns.append({"role": "tool", "content": "4", "name": "add"})
            turns += [{"role": "assistant", "content": _text(draw)}] * (2 if draw.random() < 0.05 else 1)
        tools = [TOOL] if draw.random() < 0.2 else None
        found.append(Example(turns[:-1], _text(draw), {}, f"row {at}", Chat(turns, draw.randrange(len(turns))), tools))
        found.append(Example(turns[:-1], _text(draw), {}, f"prompt {at}"))
        found.append(Example(_text(draw), _text(draw), {}, f"text {at}"))
    return found


def _text(draw: random.Random) -> str:
    return "".join(draw.choices(WORDS, k=draw.randint(0, 6)))


def literal(example: Example, tokenizer: PreTrainedTokenizerFast, template: str) -> tuple[list[int], list[int]]:
    """The tokens and labels of an example, one piece after another."""
    end = tokenizer.eos_token_id
    if example.chat is None:
        if isinstance(example.prompt, str) and template == "plain":
            prompt = tokenizer.encode(example.prompt)
        else:
            asked = (
                example.prompt if isinstance(example.prompt, list) else [{"role": "user", "content": example.prompt}]
            )
            prompt = tokenizer.encode(_alone(asked, None, True, tokenizer), add_special_tokens=False)
        answer = [*tokenizer.encode(example.completion, add_special_tokens=False), end]
        return prompt + answer, _first_ignored([IGNORED] * len(prompt) + answer)
    ids: list[int] = []
    labels: list[int] = []
    chat, before = example.chat, ""
    # Phi's templates write the end token once more behind a chat, as no part of its last turn.
    alone = _alone([{"role": "user", "content": "x"}], None, False, tokenizer)
    closes = alone.endswith(f"{tokenizer.eos_token}\n{tokenizer.eos_token}")
    called = example.tools or any("tool_calls" in turn for turn in chat.messages)
    for at in range(chat.learn_from, len(chat.messages)):
        if chat.messages[at]["role"] != "assistant":
            continue
        asked = _alone(chat.messages[:at], example.tools, True, tokenizer)
        answered = _alone(chat.messages[: at + 1], example.tools, False, tokenizer)
        if closes:
            answered = answered.removesuffix(tokenizer.eos_token)
        if not answered.startswith(asked) and chat.learnt == [len(chat.messages) - 1] and not called:
            prompt = tokenizer.encode(asked, add_special_tokens=False)
            answer = [*tokenizer.encode(example.completion, add_special_tokens=False), end]
            return prompt + answer, _first_ignored([IGNORED] * len(prompt) + answer)
        if not (asked.startswith(before) and answered.startswith(asked)):
            raise SvdtuneError("differently")
        prompt = tokenizer.encode(asked[len(before) :], add_special_tokens=False)
        answer = tokenizer.encode(answered[len(asked) :], add_special_tokens=False)
        if end not in answer:
            raise SvdtuneError("does not close")
        learnt = len(answer) - answer[::-1].index(end)
        answer = answer[:learnt] if at == len(chat.messages) - 1 else answer
        ids += prompt + answer
        labels += [IGNORED] * len(prompt) + answer[:learnt] + [IGNORED] * (len(answer) - learnt)
        before = answered
    return ids, _first_ignored(labels)


def _alone(messages: Any, tools: Any, asking: bool, tokenizer: PreTrainedTokenizerFast) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asking))
    except Exception as error:
        if "concatenate" in str(error):  # DeepSeek's adds a call's arguments to a text
            text = json.dumps(CALL["function"]["arguments"])
            call = {**CALL, "function": {**CALL["function"], "arguments": text}}
            messages = [turn | ({"tool_calls": [call]} if "tool_calls" in turn else {}) for turn in messages]
            return str(
                tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asking)
            )
        raise SvdtuneError(f"refuses its first {len(messages)} messages: {error}") from error


def _first_ignored(labels: list[int]) -> list[int]:
    return [IGNORED, *labels[1:]]


def _end_of(template: str) -> str:
    return next((end for end in ENDS if end in template), "<|end|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_together_is_as_alone(merging: PreTrainedTokenizerFast, name: str) -> None:
    tokenizer = copy.deepcopy(merging)
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATES[name], _end_of(TEMPLATES[name])
    for template in ("plain", "chat"):
        wanted, fit = [], []
        for example in examples(len(name)):
            try:
                row = literal(example, tokenizer, template)
                if template == "chat" or not isinstance(example.prompt, str):
                    check_written([example], tokenizer)
            except SvdtuneError:  # among others it is refused by its own name
                with pytest.raises(SvdtuneError, match=f"^{example.name}: the chat template"):
                    encode_all([example, *fit[-3:]], tokenizer, 10**6, template=template)
                continue
            wanted.append({"input_ids": row[0], "labels": row[1]})
            fit.append(example)
        if fit:
            assert list(encode_all(fit, tokenizer, 10**6, template=template)[0]) == wanted


def test_enough_of_the_templates_write_chats(merging: PreTrainedTokenizerFast) -> None:
    """The comparison above is of tokens, not of refusals alone."""
    written = 0
    for template in OWN.values():
        tokenizer = copy.deepcopy(merging)
        tokenizer.chat_template = template
        chats = [example for example in examples(5) if example.chat is not None]
        for chat in chats:
            try:
                encode_all([chat], tokenizer, 10**6)
                written += 1
            except SvdtuneError:
                continue
    assert written > 100


def test_a_class_that_makes_more_of_a_text_is_asked_for_each(merging: PreTrainedTokenizerFast) -> None:
    class Filling(PreTrainedTokenizerFast):
        def encode(self, text: Any, *args: Any, **kwargs: Any) -> list[int]:
            return super().encode(text.replace("<FILL>", "12"), *args, **kwargs)

    filling = Filling(tokenizer_object=merging.backend_tokenizer, eos_token="<|end|>")
    texts = [Example("<FILL>", "two", name="row 1"), Example("12", "two", name="row 2")]
    first, second = encode_all(texts, filling, 100)[0]
    assert first == second
    assert prompt_ids(texts[0], filling) == prompt_ids(texts[1], filling)


def test_cutting_that_a_tokenizer_was_set_to_is_not_used(merging: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(merging)
    tokenizer("two plus two", truncation=True, max_length=1)
    long = Example("two plus two plus two", "two plus two", name="row 1")
    rows = list(encode_all([long, long], tokenizer, 100)[0])
    assert rows == [dict(zip(("input_ids", "labels"), literal(long, merging, "plain"), strict=True))] * 2
