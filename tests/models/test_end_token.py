"""The end token: one everywhere, or a refusal that names what disagrees."""

from pathlib import Path

import pytest

from svdtune.errors import SvdtuneError
from svdtune.models import LoadedModel, check_end_token, load, set_end_token

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + 'END' }}{% endfor %}"


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load(tiny_folder)


def test_agreement_gives_the_id(loaded: LoadedModel) -> None:
    assert check_end_token(loaded.model, loaded.tokenizer) == loaded.tokenizer.eos_token_id == 0


@pytest.mark.parametrize("place", ["config", "generation_config"])
def test_another_end_token_in_either_config_is_refused(loaded: LoadedModel, place: str) -> None:
    getattr(loaded.model, place).eos_token_id = 7
    with pytest.raises(SvdtuneError, match=rf"(model\.)?{place}\.eos_token_id = 7 .*model\.end_token"):
        check_end_token(loaded.model, loaded.tokenizer)


def test_a_list_of_stops_agrees_if_it_holds_the_trained_one(loaded: LoadedModel) -> None:
    loaded.model.generation_config.eos_token_id = [5, 0]
    assert check_end_token(loaded.model, loaded.tokenizer) == 0
    loaded.model.generation_config.eos_token_id = [5, 6]
    with pytest.raises(SvdtuneError, match="disagree"):
        check_end_token(loaded.model, loaded.tokenizer)


def test_a_model_config_without_end_token_is_refused(loaded: LoadedModel) -> None:
    loaded.model.config.eos_token_id = None
    with pytest.raises(SvdtuneError, match=r"model\.config\.eos_token_id = none"):
        check_end_token(loaded.model, loaded.tokenizer)


def test_a_tokenizer_without_end_token_is_refused(loaded: LoadedModel) -> None:
    loaded.tokenizer.eos_token = None
    with pytest.raises(SvdtuneError, match="has no end token"):
        check_end_token(loaded.model, loaded.tokenizer)


def test_a_chat_template_must_end_a_turn_with_it(loaded: LoadedModel) -> None:
    loaded.tokenizer.chat_template = TEMPLATE.replace("END", "!")
    # plain text does not use the template
    assert check_end_token(loaded.model, loaded.tokenizer) == 0
    with pytest.raises(SvdtuneError, match=r"end of an assistant's turn in the chat template = \d+ '!'"):
        check_end_token(loaded.model, loaded.tokenizer, chat=True)
    loaded.tokenizer.chat_template = TEMPLATE.replace("END", "<|end|>\n")
    assert check_end_token(loaded.model, loaded.tokenizer, chat=True) == 0


def test_setting_it_makes_all_sides_agree(loaded: LoadedModel) -> None:
    loaded.model.generation_config.eos_token_id = 7
    token = loaded.tokenizer.convert_ids_to_tokens(9)
    assert set_end_token(loaded.model, loaded.tokenizer, token) == 9
    assert check_end_token(loaded.model, loaded.tokenizer) == 9
    assert loaded.tokenizer.pad_token == "<|pad|>"


def test_padding_that_was_the_end_token_moves_along(loaded: LoadedModel) -> None:
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    set_end_token(loaded.model, loaded.tokenizer, "!")
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id


def test_an_end_token_of_several_tokens_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(SvdtuneError, match="'stop' is 4 to this tokenizer"):
        set_end_token(loaded.model, loaded.tokenizer, "stop")
