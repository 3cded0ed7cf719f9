"""What a process does that cannot import svdtune: it runs adapters in PEFT as it comes."""

import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class Absent:
    """The finder of a package that is not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "svdtune":
            raise ModuleNotFoundError("svdtune is kept out of this process")


def save_logits(folder: Path) -> None:
    """Write lora.pt beside every `lora` folder: its logits over the base model in `base`, or over
    the `residual` that lies in it beside the `adapter`."""
    sys.meta_path.insert(0, Absent())
    # what PEFT says of weights that are missing or left over
    warnings.simplefilter("error", UserWarning)
    # PEFT sets it itself for Conv1D
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
    tokens = torch.arange(1, 25).view(2, 12)
    for lora in sorted(folder.glob("*/lora")):
        apart = (lora / "residual").is_dir()
        base = AutoModelForCausalLM.from_pretrained(lora / "residual" if apart else folder / "base")
        model = PeftModel.from_pretrained(base, lora / "adapter" if apart else lora).eval()
        with torch.no_grad():
            torch.save(model(input_ids=tokens).logits, lora.parent / "lora.pt")
    assert "svdtune" not in sys.modules
