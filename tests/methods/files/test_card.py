"""The model card that is saved with an adapter says what it is, and its own lines load it;
push_to_hub sends it along."""

import re
from pathlib import Path

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig
from svdtune.methods.files.card import add_section, with_section
from tiny import tiny_llama

CONFIGS = {
    "sara": SaraConfig(threshold=0.3, task_type="CAUSAL_LM"),
    "mosara": MoSaraConfig(r=5, num_heads=2, task_type="CAUSAL_LM"),
    "sorsa": SorsaConfig(r=4, task_type="CAUSAL_LM"),
    "compact": SorsaConfig(r=4, compact=True, task_type="CAUSAL_LM"),
}
TOKENS = torch.arange(1, 25).view(2, 12)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, config):
    return get_peft_model(LlamaForCausalLM.from_pretrained(base), config)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_it_says_what_the_adapter_is_and_its_lines_load_it(name, base, tmp_path):
    model = adapted(base, CONFIGS[name])
    model.save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    method = CONFIGS[name].method
    assert {"svdtune", method} <= set(card.data.tags)
    assert card.data.base_model == str(base)
    assert card.text.startswith(("# SARA adapter for", "# Mo-SARA adapter for", "# SORSA adapter for"))
    assert card.data.library_name == "peft"
    assert "More Information Needed" not in card.text
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"| trained parameters | {trained:,} |" in card.text
    ranks = model.peft_config["default"].ranks.values()
    expected = f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else f"| rank | {max(ranks)} |"
    assert expected in card.text
    assert "- PEFT " in card.text
    assert "- svdtune " in card.text
    assert "layers.0" not in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    found = {}
    exec(code.replace("this-folder-or-repository", str(tmp_path / "adapter")), found)
    assert torch.equal(logits(found["model"]), logits(model))


def test_settings_that_differ_from_the_defaults_are_listed(base, tmp_path):
    adapted(base, SorsaConfig(r=4, gamma=0.5, target_modules=["q_proj"], dropout=0.1)).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "`gamma=0.5`" in text
    assert "`dropout=0.1`" in text
    assert "`target_modules=['q_proj']`" in text
    assert "reduction" not in text


def test_saving_again_keeps_what_somebody_wrote(base, tmp_path):
    model = adapted(base, SorsaConfig(r=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    add_section(tmp_path, "Training", "On three rows.")
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## Licence\n\nMIT\n")
    before = path.read_text().rstrip()
    model.save_pretrained(tmp_path)
    assert path.read_text().rstrip() == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWritten by me.\n")
    model.save_pretrained(tmp_path / "own")
    card = ModelCard.load(tmp_path / "own" / "README.md")
    assert card.data.license == "mit"
    assert card.text.startswith("# Mine\n\nWritten by me.\n")
    assert "| method | SORSA |" in card.text


def test_every_adapter_of_a_model_has_its_card(base, tmp_path):
    model = adapted(base, SorsaConfig(r=4, task_type="CAUSAL_LM"))
    model.add_adapter("second", SorsaConfig(r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert "| rank | 4 |" in (tmp_path / "README.md").read_text()
    assert "| rank | 2 |" in (tmp_path / "second" / "README.md").read_text()
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "second")


def test_sections():
    text = with_section("", "One", "1")
    assert text == "## One\n\n1\n\n"
    text = with_section(text + "### Framework versions\n\n- PEFT 1\n", "Two", "2")
    assert text == "## One\n\n1\n\n## Two\n\n2\n\n### Framework versions\n\n- PEFT 1\n"
    assert with_section(text, "One", "1!") == text.replace("1\n\n## Two", "1!\n\n## Two")


def test_push_to_hub_works_as_pefts(base, tmp_path, monkeypatch):
    """One commit with the whole adapter. (The card it sends is Transformers' own, for every PEFT
    method.)"""
    sent, original = {}, ModelCard.load

    class Hub:
        def create_repo(self, repo_id, **_):
            return RepoUrl(f"https://huggingface.co/{repo_id}")

        def create_commit(self, repo_id, operations, **_):
            sent[repo_id] = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}

    def load(where, *args, **kwargs):
        if where == "someone/adapter":
            raise EntryNotFoundError("there is no README.md")
        return original(where, *args, **kwargs)

    if not hasattr(transformers.utils.hub, "hf_api"):
        pytest.skip("this Transformers talks to the hub by other names")
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", load)
    model = adapted(base, SorsaConfig(r=4, task_type="CAUSAL_LM"))
    model.push_to_hub("someone/adapter")
    files = sent["someone/adapter"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    (tmp_path / "got").mkdir()
    for name, content in files.items():
        (tmp_path / "got" / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "got")
    assert torch.equal(logits(loaded), logits(model))
