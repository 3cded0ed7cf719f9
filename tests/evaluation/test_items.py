"""Prompts for evaluation are training's prompts, and every item has something to be graded
against."""

import pytest
from transformers import PreTrainedTokenizerFast

from svdtune.data import encode, read_rows, to_examples
from svdtune.errors import SvdtuneError
from svdtune.evaluation import to_items

ROWS = [{"question": "2+2?", "solution": "#### 4", "answer": 4}, {"question": "1+1?", "solution": " ", "answer": 2}]


@pytest.mark.parametrize("template", ["plain", "Q: {prompt}\nA:"])
def test_prompt_tokens_are_those_of_training(tiny_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    examples = to_examples(read_rows("arithmetic", "test", limit=3), "question", "solution")
    for item, example in zip(to_items(examples, tiny_tokenizer, template), examples, strict=True):
        encoded = encode(example, tiny_tokenizer, 1000, template=template)
        masked = [token for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label == -100]
        assert list(item.tokens) == masked
        assert item.prompt == template.replace("plain", "{prompt}").replace("{prompt}", example.prompt)
        assert item.reference == example.completion


def test_the_reference_can_be_a_field_of_its_own(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    items = to_items(to_examples(ROWS, "question"), tiny_tokenizer, answer="answer")
    assert [item.reference for item in items] == ["4", "2"]
    assert [item.id for item in items] == ["the data row 1", "the data row 2"]


def test_an_item_without_a_reference_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SvdtuneError, match="the data row 2: its completion is empty"):
        to_items(to_examples(ROWS, "question", "solution"), tiny_tokenizer)
    with pytest.raises(SvdtuneError, match=r"'answr'.*did you mean 'answer'"):
        to_items(to_examples(ROWS, "question"), tiny_tokenizer, answer="answr")
