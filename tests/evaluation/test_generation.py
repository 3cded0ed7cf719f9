"""Batched, padded, cached generation against the plain loop: one prompt at a time, the whole text
at every step."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Cache,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from finch import FinchConfig, FinchForCausalLM
from svdtune.errors import SvdtuneError
from svdtune.evaluation import TransformersEngine, generation
from svdtune.evaluation.generation import (
    Decoding,
    complete_batch,
    end_token_ids,
    is_loop,
    plan_batches,
    reads_padding,
    until_end,
)
from svdtune.models import LoadedModel, load
from tiny import tiny_gpt2, tiny_llama

PROMPTS = [[5], [9, 40, 77, 12, 90, 33, 21], [101, 17, 5], [60, 60, 60, 60]]


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    """The tiny model with larger weights, so that its answers vary instead of repeating one
    token."""
    loaded = load(tiny_folder)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
    return loaded


def plain_loop(model: PreTrainedModel, prompt: list[int], steps: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_equals_the_plain_loop_and_stops_at_end_tokens(loaded: LoadedModel) -> None:
    plain = [plain_loop(loaded.model, prompt, 12) for prompt in PROMPTS]
    ends = [plain[1][4], plain[3][0]]
    assert len({token for tokens in plain for token in tokens}) > 6, "the model repeats itself: this would test nothing"
    for tokens, completion in zip(plain, complete_batch(loaded.model, PROMPTS, 12, ends, pad=1), strict=True):
        stop = next((position for position, token in enumerate(tokens) if token in ends), None)
        assert completion.tokens == tokens[:stop]
        assert completion.ended is (stop is not None)
    assert complete_batch(loaded.model, PROMPTS, 12, ends, pad=1)[3].tokens == []


_RECURRENT = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2}
MODELS = {
    "llama": (lambda: tiny_llama(vocab_size=258), False),
    "gpt2": (lambda: tiny_gpt2(vocab_size=258), False),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**_RECURRENT, state_size=4)), False),
    "falcon_mamba": (lambda: FalconMambaForCausalLM(FalconMambaConfig(**_RECURRENT, state_size=4)), False),
    "rwkv4": (lambda: RwkvForCausalLM(RwkvConfig(**_RECURRENT, rescale_every=0)), True),
    "rwkv6": (lambda: FinchForCausalLM(FinchConfig(**_RECURRENT, head_size=8)), True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_prompts_of_many_lengths_complete_as_alone_where_a_model_reads_padding(
    kind: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    build, reads = MODELS[kind]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    assert reads_padding(model) is reads
    engine = TransformersEngine(LoadedModel(model, tiny_tokenizer, kind))
    alone = [engine.complete([prompt], 6, Decoding(), [0]) for prompt in PROMPTS]
    assert len({token for (completion,) in alone for token in completion.tokens}) > 4, "repeats itself: tests nothing"
    ends = set(end_token_ids(model.generation_config, tiny_tokenizer))
    assert [completion for (completion,) in alone] == [until_end(plain_loop(model, p, 6), ends) for p in PROMPTS]
    assert engine.complete(PROMPTS, 6, Decoding(), [0] * 4) == [completion for (completion,) in alone]


class Counted:
    """`generate` of a model, which remembers (rows, new tokens at most, tokens read before the
    first new one) of each call."""

    def __init__(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self._generate = model.generate
        monkeypatch.setattr(model, "generate", self)

    def __call__(self, input_ids, generation_config, **kwargs):
        known = [value.get_seq_length() for value in kwargs.values() if isinstance(value, Cache)]
        self.calls.append((len(input_ids), generation_config.max_new_tokens, input_ids.shape[1] - sum(known)))
        return self._generate(input_ids=input_ids, generation_config=generation_config, **kwargs)


def test_rounds_give_the_same_completions_and_let_go_of_what_has_ended(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = complete_batch(loaded.model, PROMPTS, 12, [257], pad=1)
    ends = [whole[1].tokens[4], whole[3].tokens[0]]
    expected = complete_batch(loaded.model, PROMPTS, 12, ends, pad=1)
    monkeypatch.setattr(generation, "_ROUND", 2)
    counted = Counted(loaded.model, monkeypatch)
    assert complete_batch(loaded.model, PROMPTS, 12, ends, 1, in_rounds=True) == expected
    running = [sum(len(one.tokens) >= taken for one in expected) for taken in range(0, 12, 2)]
    assert len(counted.calls) > 2
    reads = [7, *[1] * 5]  # all of the longest prompt, and then the latest token alone
    assert counted.calls == list(zip(running, [2] * 6, reads, strict=True))[: len(counted.calls)]
    assert sum(rows * limit for rows, limit, _ in counted.calls) < 4 * 12


def test_what_is_drawn_or_searched_for_is_not_cut_up(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_ROUND", 2)
    counted = Counted(loaded.model, monkeypatch)
    for drawn in (Decoding(temperature=1.0), Decoding(beams=2)):
        complete_batch(loaded.model, PROMPTS, 12, [0], 1, decoding=drawn, in_rounds=True)
    assert counted.calls == [(4, 12, 7)] * 2


def test_a_cache_of_sliding_windows_is_not_cut_but_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(vocab_size=258, num_hidden_layers=2, sliding_window=4, **small)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12 if parameter.dim() == 2 else 1)
    whole = complete_batch(model, PROMPTS, 12, [257], pad=1)
    ends = [whole[1].tokens[4], whole[3].tokens[0]]
    expected = complete_batch(model, PROMPTS, 12, ends, pad=1)
    monkeypatch.setattr(generation, "_ROUND", 2)
    monkeypatch.setattr(generation, "_REREAD", 4)
    counted = Counted(model, monkeypatch)
    assert complete_batch(model, PROMPTS, 12, ends, 1, in_rounds=True) == expected
    assert [(limit, read) for _, limit, read in counted.calls] == [(2, 7), (2, 9), (4, 11), (4, 15)]


LOOP = "There are 3 days in a week. So there are 3 x 7 = 18 days in a week.\n\n"


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("", False),
        ("So " + 2 * LOOP, False),
        ("So " + 3 * LOOP, True),
        ("So " + 3 * LOOP + LOOP[:20], True),
        ("So " + 3 * LOOP + "x", False),
        ("0.3333333333333333", False),  # sixteen times one token is still an answer
        ("0." + 31 * "3", False),
        ("0." + 32 * "3", True),
        ("1. 15 - 1 = 14\n2. 15 + 1 = 16\n3. 16 + 1 = 17\n4. 17 + 1 = 18\n5. 18 + 1 = 19\n", False),
    ],
)
def test_a_loop_has_come_three_times_and_is_32_tokens_long(text: str, loop: bool) -> None:
    assert is_loop(list(text.encode())) is loop


def test_loops_are_cut_and_nothing_else_is(tiny_folder: Path) -> None:
    model = load(tiny_folder).model  # which soon repeats one token
    whole = complete_batch(model, PROMPTS, 100, [257], pad=1)
    assert all(len(completion.tokens) == 100 and is_loop(completion.tokens) for completion in whole)
    assert complete_batch(model, PROMPTS, 100, [257], 1, in_rounds=True) == whole
    cut = complete_batch(model, PROMPTS, 100, [257], 1, decoding=Decoding(stop_loops=True), in_rounds=True)
    for long, short in zip(whole, cut, strict=True):
        assert 32 <= len(short.tokens) < 100
        assert long.tokens[: len(short.tokens)] == short.tokens
        assert is_loop(short.tokens)
        assert not short.ended


def test_the_checkpoints_own_generation_settings_do_not_leak_in(loaded: LoadedModel) -> None:
    expected = [plain_loop(loaded.model, prompt, 12) for prompt in PROMPTS]
    own = loaded.model.generation_config
    own.repetition_penalty, own.suppress_tokens = 5.0, [expected[0][0]]
    never = min(set(range(258)).difference(*expected))
    found = complete_batch(loaded.model, PROMPTS, 12, [never], pad=1)
    assert [completion.tokens for completion in found] == expected
    assert loaded.model.generation_config is own


def test_batches_hold_every_prompt_once_longest_first() -> None:
    batches = plan_batches(PROMPTS, 3)
    assert batches == [[1, 3, 2], [0]]


def test_end_tokens_are_the_models_and_the_tokenizers(loaded: LoadedModel) -> None:
    assert end_token_ids(loaded.model.generation_config, loaded.tokenizer) == [0]
    loaded.model.generation_config.eos_token_id = [7, 3]
    assert end_token_ids(loaded.model.generation_config, loaded.tokenizer) == [0, 3, 7]
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    with pytest.raises(SvdtuneError, match="names an end token"):
        end_token_ids(loaded.model.generation_config, loaded.tokenizer)


def test_drawn_tokens_depend_on_the_seed_alone_and_leave_the_callers_random_numbers(loaded: LoadedModel) -> None:
    decoding = Decoding(samples=2, temperature=1.0)

    def draw(seed: int) -> list[list[int]]:
        return [c.tokens for c in complete_batch(loaded.model, PROMPTS, 8, [0], 1, decoding=decoding, seed=seed)]

    before = torch.random.get_rng_state()
    first = draw(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert draw(3) == first
    assert draw(4) != first


def test_drawing_from_the_likeliest_token_alone_is_greedy(loaded: LoadedModel) -> None:
    greedy = complete_batch(loaded.model, PROMPTS, 8, [0], 1)
    assert complete_batch(loaded.model, PROMPTS, 8, [0], 1, decoding=Decoding(temperature=1.0, top_p=1e-9)) == greedy


def test_beam_search_over_all_first_tokens_finds_the_likeliest_pair(loaded: LoadedModel) -> None:
    never = 2
    found = complete_batch(loaded.model, PROMPTS[:1], 2, [never], 1, decoding=Decoding(beams=258))[0].tokens
    with torch.no_grad():
        first = loaded.model(torch.tensor(PROMPTS[:1])).logits[0, -1].log_softmax(-1)
        second = (
            loaded.model(torch.tensor([[*PROMPTS[0], token] for token in range(258)])).logits[:, -1].log_softmax(-1)
        )
        whole = first[:, None] + second
        whole[never], whole[:, never] = -torch.inf, -torch.inf
    assert found == list(divmod(int(whole.argmax()), 258))


def test_no_ngram_is_repeated_where_that_is_asked_for(loaded: LoadedModel) -> None:
    tokens = complete_batch(loaded.model, [[5, 5]], 40, [0], 1, decoding=Decoding(no_repeat_ngram_size=1))[0].tokens
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize(
    "values",
    [
        {"samples": 0},
        {"temperature": -1},
        {"top_p": 0, "temperature": 1},
        {"samples": 2},
        {"top_p": 0.9},
        {"beams": 2, "temperature": 1},
        {"beams": 2, "stop_loops": True},
        {"temperature": 1, "stop_loops": True},
        {"length_penalty": 0.8},
        {"seed": -1},
    ],
)
def test_contradictions_are_refused(values: dict) -> None:
    with pytest.raises(SvdtuneError):
        Decoding(**values)
