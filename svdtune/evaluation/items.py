"""What is evaluated: a prompt in tokens, and the reference that its completion is graded
against."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from svdtune.data import Example, prompt_ids
from svdtune.data.chats import answer_opening
from svdtune.data.encoding import written_turns
from svdtune.data.examples import check_fields
from svdtune.errors import SvdtuneError
from svdtune.evaluation.tasks import Reference


@dataclass(frozen=True)
class Item:
    """One question put to a model.

    Attributes:
        id: Its name in reports and error messages.
        prompt: The text, as the model reads it: its tokens in words.
        tokens: The same in token ids, whatever the tokenizer puts in front included.
        reference: What to grade a completion against.
        opening: What a completion may begin with that is no part of the answer, in token ids.
    """

    id: str
    prompt: str
    tokens: tuple[int, ...]
    reference: Reference
    opening: tuple[int, ...] = ()


def to_items(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str = "plain", answer: str | None = None
) -> list[Item]:
    """Tokenize prompts exactly as training does, and pick the reference of each.

    Args:
        examples: What to ask. Only the prompt is shown to the model.
        tokenizer: The model's.
        template: As training's: "plain", "chat", or a text with "{prompt}" in it.
        answer: The row's field that holds the reference; None takes the completion.

    Raises:
        SvdtuneError: If an example has no reference, or the template cannot be used.
    """
    items = []
    opening = tuple(answer_opening(tokenizer))
    for example in examples:
        if answer is not None:
            check_fields(example.row, [answer], example.name)
        found = example.completion if answer is None else example.row[answer]
        reference: Reference = found if isinstance(found, list | dict) else str(found)
        if not (reference.strip() if isinstance(reference, str) else reference):
            source = "completion" if answer is None else f"field {answer!r}"
            raise SvdtuneError(f"{example.name}: its {source} is empty, so there is nothing to grade against")
        tokens = prompt_ids(example, tokenizer, template)
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        assert isinstance(text, str)  # of one sequence
        written = written_turns(example, template) is not None  # by the chat template, which opens the answer
        items.append(Item(example.name, text, tuple(tokens), reference, opening if written else ()))
    return items


def check_items(items: Sequence[Item], max_new_tokens: int, context: int | None) -> None:
    """Refuse what cannot be evaluated, before the first token is generated.

    Raises:
        SvdtuneError: If there is no item, an item's prompt is empty, or a prompt leaves too little
            room.
    """
    if not items:
        raise SvdtuneError("there is nothing to evaluate: the data holds no items")
    if max_new_tokens < 1:
        raise SvdtuneError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for item in items:
        if not item.tokens:
            raise SvdtuneError(f"item {item.id}: its prompt is empty")
        if context is not None and len(item.tokens) + max_new_tokens > context:
            raise SvdtuneError(
                f"item {item.id}: its prompt has {len(item.tokens)} tokens, and max_new_tokens={max_new_tokens} more "
                f"do not fit in the model's {context} positions; lower max_new_tokens, or drop the item"
            )
