"""What `step.py` compares: the frozen base, the methods of svdtune and PEFT, the papers' literal
forms, and some of them on a base in 4 bits."""

from collections.abc import Callable
from dataclasses import dataclass

import peft
from torch import Tensor, nn

import svdtune
from svdtune.methods.mosara import reference as mosara_reference
from svdtune.methods.sara import reference as sara_reference
from svdtune.methods.sorsa import reference as sorsa_reference
from svdtune.training.compilation import blocks_of

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]


def as_it_is(model: nn.Module) -> nn.Module:
    return model


@dataclass
class Contender:
    """One line of the table: how a base model becomes the thing that is trained."""

    name: str
    config: Callable[[dict], peft.PeftConfig] | None = None
    prepare: Callable[[nn.Module], nn.Module] = as_it_is
    regularized: bool = False
    trains: bool = True
    bits: str | None = None  # of `QUANTIZED`


def frozen(model: nn.Module) -> nn.Module:
    """The floor: nothing trained, gradients flowing to the embeddings' outputs."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def in_nf4(model: nn.Module) -> nn.Module:
    """The model with the linear layers of its blocks in 4 bits, as Transformers loads them for
    QLoRA."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for block in blocks_of(model):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                weight = layer.weight.data
                new = Linear4bit(
                    weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4"
                )
                new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
                block.set_submodule(name, new.to(weight.device))
    model.is_loaded_in_4bit = True  # by which PEFT's LoRA knows
    return model


def in_int4(model: nn.Module) -> nn.Module:
    """The model with the linear layers of its blocks in 4 bits by torchao, in groups of 128."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    for block in blocks_of(model):
        quantize_(block, Int4WeightOnlyConfig(group_size=128))
    return model


QUANTIZED = {"nf4": ("bitsandbytes", in_nf4), "int4": ("torchao", in_int4)}
"""By a contender's `bits`: the package that it needs, and what quantizes the base."""


def literal(model: nn.Module) -> nn.Module:
    """The model with every adapted layer computing its paper's equation as written."""
    for layer in model.modules():
        if not hasattr(layer, "fused"):
            continue

        def fused(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object, layer: nn.Module = layer) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            if layer.method == "sorsa":
                y = sorsa_reference.sorsa_linear(flat, weight, bias, *layer.product("default"))
            elif layer.method == "sara":
                y = sara_reference.sara_linear(flat, weight, bias, *layer.product("default")[:3])
            else:
                y = mosara_reference.mosara_linear(flat, weight, bias, *layer._tensors("default"))
            return y.view(*x.shape[:-1], -1)

        layer.fused = fused
    return model


def lora(**settings):
    return lambda shape: peft.LoraConfig(r=shape["r"], lora_alpha=shape["r"], target_modules=ALL_LINEAR, **settings)


def sorsa(**settings):
    return lambda shape: svdtune.SorsaConfig(r=shape["r"], target_modules=ALL_LINEAR, **settings)


def sara(shape):
    return svdtune.SaraConfig(r=shape["r"], target_modules=ALL_LINEAR)


def mosara(shape):
    return svdtune.MoSaraConfig(r=shape["top"], num_heads=5, target_modules=QV)


def contenders() -> list[Contender]:
    """Every line, the floor first and last: the two floors show how far the machine drifted in
    between."""

    return [
        Contender("floor", prepare=frozen, trains=False),
        Contender("sorsa-delta", sorsa(), regularized=True),
        Contender("sorsa-delta-without-regularizer", sorsa(gamma=0.0)),
        Contender("sorsa-delta-dropout", sorsa(dropout=0.05), regularized=True),
        Contender("sorsa-literal", sorsa(), literal, regularized=True),
        Contender("lora", lora()),
        Contender("lora-dropout", lora(lora_dropout=0.05)),
        Contender("pissa", lora(init_lora_weights="pissa_niter_16")),
        Contender("dora", lora(use_dora=True)),
        Contender(
            "adalora",
            lambda shape: peft.AdaLoraConfig(
                init_r=shape["r"], target_r=shape["r"], total_step=10**6, target_modules=ALL_LINEAR
            ),
        ),
        Contender("full", trains=True),
        Contender("lora-qv-r8", lambda shape: peft.LoraConfig(r=8, lora_alpha=8, target_modules=QV)),
        Contender("sara-qv", lambda shape: svdtune.SaraConfig(r=shape["k"], target_modules=QV)),
        Contender(
            "vera-qv-r1024",
            lambda shape: peft.VeraConfig(r=min(1024, 4 * shape["top"]), target_modules=QV),
        ),
        Contender("mosara-qv-5-heads", mosara),
        Contender("sara-all", sara),
        *(
            Contender(f"{name}-{bits}", config, prepare, regularized, trains, bits)
            for bits in QUANTIZED
            for name, config, prepare, regularized, trains in (
                ("floor", None, frozen, False, False),
                ("lora", lora(), as_it_is, False, True),
                ("sorsa-delta", sorsa(), as_it_is, True, True),
                ("sara-all", sara, as_it_is, False, True),
                ("mosara-qv-5-heads", mosara, as_it_is, False, True),
            )
        ),
        Contender("floor-again", prepare=frozen, trains=False),
    ]
