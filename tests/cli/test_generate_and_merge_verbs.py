"""`svdtune generate` and `svdtune merge` from the command line."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from typer.testing import CliRunner, Result

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.cli import app
from svdtune.evaluation.generation import complete_batch
from svdtune.export import find_source, open_source
from svdtune.models import load
from tiny import moved


def svdtune(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, words), "--device", "cpu"])


def save_adapter(config: PeftConfig, base: Path, folder: Path) -> Path:
    """An adapter whose every parameter differs from its start, as after training."""
    model = get_peft_model(load(base).model, config)
    moved(model, 0.05)
    model.save_pretrained(folder)
    return folder


def test_generate_prints_what_greedy_decoding_gives(tiny_folder: Path) -> None:
    loaded = load(tiny_folder)
    tokens = loaded.tokenizer.encode("Hello")
    expected = complete_batch(loaded.model, [tokens], 8, [0], 1)[0].tokens
    result = svdtune("generate", tiny_folder, "Hello", "--max-new-tokens", "8")
    assert result.exit_code == 0, result.output
    assert result.stdout == loaded.tokenizer.decode(expected) + "\n"


def test_generate_refuses_what_it_cannot_answer(tiny_folder: Path, tmp_path: Path) -> None:
    for words, message in [
        ((tiny_folder, "x" * 600), "do not fit in the model's 512 positions"),
        ((tiny_folder, ""), f"the value after {tiny_folder} is empty; give one"),
        ((tiny_folder, "Hi", "--template", "chat"), "no chat template"),
        ((tmp_path / "nowhere", "Hi"), "there is no model at"),
    ]:
        result = svdtune("generate", *words)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize(
    "config",
    [
        SorsaConfig(r=4),
        SaraConfig(r=3),
        MoSaraConfig(r=8, num_heads=1),
        LoraConfig(r=4, target_modules="all-linear"),
    ],
    ids=["sorsa", "sara", "mosara-one-head", "lora"],
)
def test_merged_checkpoint_gives_the_adapters_outputs(config: PeftConfig, tiny_folder: Path, tmp_path: Path) -> None:
    config.task_type = "CAUSAL_LM"
    adapter = save_adapter(config, tiny_folder, tmp_path / "adapter")
    result = svdtune("merge", adapter, "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert f"merged into {tmp_path / 'merged'} (float32)" in result.stdout
    ids = torch.tensor([[5, 60, 7, 200]])
    with torch.no_grad():
        adapted = open_source(find_source(adapter)).model(ids).logits
        merged = load(tmp_path / "merged").model(ids).logits
        base = load(tiny_folder).model(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - base).norm() > 1e-2 * base.norm()


def test_several_heads_do_not_merge_and_nothing_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(MoSaraConfig(r=8, num_heads=3, task_type="CAUSAL_LM"), tiny_folder, tmp_path / "adapter")
    result = svdtune("merge", adapter, "--output", tmp_path / "merged")
    assert result.exit_code == 2
    assert "head" in result.stderr
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_a_folder_in_use_and_a_model_without_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(SaraConfig(r=2), tiny_folder, tmp_path / "adapter")
    result = svdtune("merge", adapter, "--output", adapter)
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    result = svdtune("merge", tiny_folder, "--output", tmp_path / "merged")
    assert result.exit_code == 2
    assert "nothing to merge" in result.stderr


def test_an_answer_does_not_steer_the_terminal(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = load(tiny_folder).tokenizer.encode("a\x1b[2Jb")

    def answer(model, prompts, max_new_tokens, ends, pad, streamer) -> None:
        for token in [*prompts[0], *tokens]:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr("svdtune.evaluation.generation.complete_batch", answer)
    shown = svdtune("generate", tiny_folder, "q").stdout
    assert "\x1b" not in shown
    assert "a\\x1b[2Jb" in shown
