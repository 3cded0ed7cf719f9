"""The end token: one token for the tokenizer, the model's config, its generation config and the
text trained on.

Where they disagree a model learns to stop at one token and is stopped at another, and its scores
collapse silently. Nothing here guesses: `check_end_token` refuses, and `set_end_token` makes all of
them agree on the token it is told.
"""

from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from svdtune.errors import SvdtuneError

_PROBE = "svdtune-end-of-turn"


def check_end_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> int:
    """Return the id of the one end token, or refuse.

    `config.eos_token_id` and `generation_config.eos_token_id` may be lists (generation then stops
    at any of them): they agree if the tokenizer's end token, which is the one trained on, is among
    them.

    Args:
        model: the model that will be trained or generate.
        tokenizer: its tokenizer.
        chat: the text comes from the tokenizer's chat template, so that an assistant's turn must
            end with it too.

    Raises:
        SvdtuneError: if any two of them disagree, or the tokenizer has no end token at all.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise SvdtuneError(
            "the tokenizer has no end token, so that nothing could teach the model to stop; "
            "name one with `model.end_token` (svdtune.models.set_end_token)"
        )
    generation = getattr(model, "generation_config", None)
    rows = [("tokenizer.eos_token", [end], True)]
    for name, config in (("model.config", model.config.get_text_config()), ("generation_config", generation)):
        ids = _as_list(getattr(config, "eos_token_id", None))
        # A generation config without an end token falls back to the model's; a model's without one
        # never stops.
        rows.append((f"{name}.eos_token_id", ids, end in ids or (not ids and name == "generation_config")))
    if chat:
        turn = _end_of_turn(tokenizer)
        rows.append(("end of an assistant's turn in the chat template", turn, turn[:1] == [end]))
    if all(agrees for _, _, agrees in rows):
        return end
    listing = "; ".join(f"{name} = {_show(ids, tokenizer)}" for name, ids, _ in rows)
    raise SvdtuneError(
        f"the end tokens disagree: {listing}. The model would learn to stop at one and be stopped at another. "
        f"Say which is right with `model.end_token` (svdtune.models.set_end_token)"
    )


def set_end_token(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Make `token` the end token of the tokenizer, the model's config and its generation config;
    return its id.

    A padding token equal to the old end token moves along, so that padding stays what it was: never
    attended to.

    Raises:
        SvdtuneError: if the tokenizer does not have `token` as one token.
    """
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise SvdtuneError(f"the end token must be one token; {token!r} is {len(ids)} to this tokenizer: {ids}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = token
    tokenizer.eos_token = token
    if model is not None:
        model.config.get_text_config().eos_token_id = ids[0]
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = ids[0]
    return ids[0]


def _as_list(ids: int | Iterable[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template puts after the words of an assistant's last turn."""
    if tokenizer.chat_template is None:
        raise SvdtuneError("the tokenizer has no chat template; use text prompts with `data.template: plain`")
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert isinstance(text, str)  # no tokens were asked for
    return tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False)


def _show(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ids) or "none"
