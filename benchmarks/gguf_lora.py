"""Adapters in llama.cpp as `svdtune export --to gguf` writes them: greedy tokens beside PEFT's, and
the file beside that of llama.cpp's own converter.

    python benchmarks/gguf_lora.py --llama-cpp CHECKOUT --out benchmarks/results/gguf-lora.jsonl

needs `llama-cpp-python` and `sentencepiece` (LLAMA_CPP_LIB_PATH names a folder with libllama, where
it was installed without one). SmolLM2-135M in fp32 on both sides. The adapters are random, and
large enough that answers differ from the model's own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig, export_lora
from svdtune.models.smollm2 import fetch_smollm2

PROMPT = "A singular value decomposition of a matrix"
TOKENS = 16
# The threshold gives every layer a rank of its own, which the converter cannot write.
CONTENDERS = {
    "sara": (SaraConfig(r=8, target_modules="all-linear"), 0.12),
    "sara-threshold": (SaraConfig(threshold=0.02, target_modules="all-linear"), 0.12),
    "mosara": (MoSaraConfig(threshold=0.5, num_heads=1), 1.0),
    "sorsa": (SorsaConfig(r=8), 0.02),
}


def converted(llama_cpp_folder: Path, script: str, *words: str | Path) -> None:
    """Run one of llama.cpp's converters."""
    command = [sys.executable, str(llama_cpp_folder / script), *map(str, words)]
    subprocess.run(command, check=True, capture_output=True)


def generated_by_llama_cpp(base: Path, prompt: list[int], adapter: Path | None = None) -> list[int]:
    """Greedy tokens after a prompt."""
    lora = None if adapter is None else str(adapter)
    model = llama_cpp.Llama(str(base), lora_path=lora, n_ctx=128, logits_all=False, verbose=False, n_threads=2)
    return [
        token for token, _ in zip(model.generate(prompt, temp=0.0, repeat_penalty=1.0), range(TOKENS), strict=False)
    ]


@torch.inference_mode()
def generated_by_peft(model: Any, prompt: list[int]) -> list[int]:
    """The same of a model in PyTorch."""
    given = torch.tensor([prompt])
    made = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=TOKENS
    )
    return made[0, len(prompt) :].tolist()


def same_tensors(ours: Path, theirs: Path) -> bool:
    """Whether two files hold the same tensors, to the bit."""
    first, second = ({t.name: t.data for t in gguf.GGUFReader(path).tensors} for path in (ours, theirs))
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def main() -> None:
    """A line an adapter."""
    options = argparse.ArgumentParser()
    options.add_argument("--llama-cpp", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    folder = fetch_smollm2()
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    lines = []
    with tempfile.TemporaryDirectory() as work:
        base = Path(work, "base.gguf")
        converted(given.llama_cpp, "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", base)
        alone = generated_by_llama_cpp(base, prompt)
        for name, (config, scale) in CONTENDERS.items():
            adapter, lora, ours, theirs = (
                Path(work, f"{name}{ending}") for ending in ("", "-lora", ".gguf", "-2.gguf")
            )
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config).eval()
            torch.manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += scale * torch.randn_like(parameter)
            model.save_pretrained(adapter)
            ranks = export_lora(adapter, ours, to="gguf").ranks.values()
            export_lora(adapter, lora, uniform=len(set(ranks)) > 1)
            converted(given.llama_cpp, "convert_lora_to_gguf.py", lora, "--base", folder, "--outfile", theirs)
            wanted, found = generated_by_peft(model, prompt), generated_by_llama_cpp(base, prompt, ours)
            line = {"adapter": name, "ranks": f"{min(ranks)}-{max(ranks)}", "tokens": TOKENS}
            line["equal_to_peft"] = sum(a == b for a, b in zip(wanted, found, strict=True))
            line["equal_to_base"] = sum(a == b for a, b in zip(alone, found, strict=True))
            line["tensors_as_converter"] = same_tensors(ours, theirs) if len(set(ranks)) == 1 else None
            lines.append(json.dumps(line | {"llama_cpp": llama_cpp.__version__}))
            print(lines[-1], flush=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
