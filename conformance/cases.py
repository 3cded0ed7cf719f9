"""Our configurations in the form of PEFT's tables of test cases, and the tests that do not apply,
each with the reason."""

import re
from typing import Any

from svdtune import MoSaraConfig, SaraConfig, SorsaConfig

# The settings that differ most from each other in code: one of each method first, which is what
# --fast runs.
VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "SARA": (SaraConfig, {"r": 2}),
    "Mo-SARA": (MoSaraConfig, {"r": 2, "num_heads": 1}),
    "SORSA": (SorsaConfig, {"r": 2}),
    "SARA threshold": (SaraConfig, {"threshold": 0.1}),
    "SARA spectral, no lambda": (SaraConfig, {"r": 2, "init": "spectral", "use_lambda": False}),
    "Mo-SARA three heads": (MoSaraConfig, {"threshold": 0.3, "num_heads": 3}),
    "Mo-SARA front": (MoSaraConfig, {"r": 1, "num_heads": 2, "v_position": "front"}),
    "SORSA dropout": (SorsaConfig, {"r": 2, "dropout": 0.1}),
}
FAST_VARIANTS = 3
METHODS = {"SARA": SaraConfig, "Mo-SARA": MoSaraConfig, "SORSA": SorsaConfig}

_MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", {"target_modules": ["lin1"]}),
    ("MLP 3", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP 4", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "rank_pattern": {"conv1d": 1}}),
    (
        "Conv1D 2",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "rank_pattern": {"conv1d": 1}, "modules_to_save": ["emb"]},
    ),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"], "rank_pattern": {"conv1d": 1}}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d 2", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d groups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
]


def custom_models(fast: bool) -> list[tuple]:
    """Rows (name, model, configuration class, settings) for TEST_CASES."""
    return [
        (f"{model_name} {name}", model, cls, settings | own)
        for name, (cls, own) in _chosen(fast)
        for model_name, model, settings in _MODELS
    ]


def decoders(fast: bool) -> list[tuple]:
    """Rows (configuration class, settings) for ALL_CONFIGS."""
    common = {"task_type": "CAUSAL_LM", "target_modules": None}
    return [(cls, common | own) for _, (cls, own) in _chosen(fast)]


def active_adapters(fast: bool) -> list[tuple]:
    """Rows (name, tuner, configuration class, settings, settings) for
    MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES."""
    rows = []
    for name, (cls, own) in _chosen(fast):
        own = own | {"init_weights": False}
        first, second = own | {"target_modules": ["lin0"]}, own | {"target_modules": ["lin1"]}
        rows += [(f"{name} same", cls.method, cls, first, first), (f"{name} different", cls.method, cls, first, second)]
    return rows


def _chosen(fast: bool) -> list[tuple[str, tuple[type, dict[str, Any]]]]:
    return list(VARIANTS.items())[: FAST_VARIANTS if fast else None]


# Names of LoRA's that a test may use and still be about any method: `like_lora` turns them into
# ours.
ONLY_LORAS = {"LoraConfig", "lora_alpha", "lora_dropout", "init_lora_weights", "lora_only", "lora_config", "lora_path"}


def like_lora(cls: type, **settings: Any):
    """Our configuration for what a test asks of LoRA; what only LoRA has is left out."""
    settings = {name: value for name, value in settings.items() if name not in ("lora_alpha", "alpha_pattern")}
    settings["r"] = min(settings.get("r", 2), 2)  # the layers of these tests are that small
    settings["dropout"] = settings.pop("lora_dropout", 0.0)
    settings["init_weights"] = settings.pop("init_lora_weights", True) is not False
    if settings.get("bias") == "lora_only":
        settings["bias"] = f"{cls.method}_only"
    if cls is MoSaraConfig:
        settings["num_heads"] = 1
    return cls(**settings)


# What a failure says that is no fault of ours, and the reason to count it as skipped.
EXCUSES = {
    "low_cpu_mem_usage=True reads no weights": "starts an adapter without reading weights, which a threshold needs",
    "outgoing traffic has been disabled": "asks the hub for a model or adapter",
    "adapt torch.nn.Linear, transformers' Conv1D": "targets layers that the three methods do not adapt, and refuse",
}

# What is skipped, by a regular expression on "file::test[parameters] as METHOD", and why. The first
# match counts.
_FROZEN = "takes every parameter named after the adapter for a trained one; these have frozen factors beside them"
_MIXED = "PeftMixedModel is closed to methods from outside PEFT; adapters exported to LoRA do mix"
_LORA_SETTINGS = "trainable_token_indices and target_parameters are settings of LoRA"
_LORA = "about what LoRA alone has: its variants, scaling, initialisations, own layers or parameter counts"
_LOUD_START = "expects no change at the start; SARA's own start is random (its start from the spectrum is tested)"
SKIPPED: list[tuple[str, str]] = [
    (r"test_disable_adapters(_with_merging)?\[.* SARA(-| threshold)", _LOUD_START),
    (
        r"test_parameters_after_loading_model\[(MLP 3|Conv2d 2)",
        "its learning rate of 0.5 (lowered for PEFT's own methods) gives NaN",
    ),
    (r"test_loading_model_(with_modules_to_save_)?requires_grad_set_correctly.*(MoSara|Sorsa)", _FROZEN),
    (r"[Mm]ixed", _MIXED),
    (
        r"trainable_?tokens|trainble_tokens|target_param|TestTargetedParameter|inside_auxiliary",
        _LORA_SETTINGS,
    ),
    (
        r"TestKasa|dora|lora_embed_scale|TestCorda|TestEva|TestLora|TestLily|TestHotSwapping|TestScaling|TestWeightTying",
        _LORA,
    ),
    (r"TestLoadPeftKeyMapping|TestDynamicDispatch|alpha_pattern|test_module_matching_lora|test_nb_params", _LORA),
    (
        r"TestRankAndAlphaPattern",
        "its layers are 1×1, so no rank but 1 exists; rank_pattern is tested in our own tests",
    ),
    (r"active_adapters_merge_and_unmerge.*dropout", "compares outputs in training mode, where dropout changes them"),
    (r"test_realistic_example as SORSA", "expects LoRA's default targets; SORSA's are all linear layers"),
    (r"save_pretrained\w*_pickle", "svdtune saves and loads safetensors alone"),
    (
        r"add_weighted_adapter|same_modules_to_save_merging",
        "a weighted sum is no adapter again; svdtune.combine makes one",
    ),
    (r"duplicate_name_without_mutation\[True", _MIXED),
    (r"token_indices", _LORA_SETTINGS),
    (
        r"test_warn_for_tied_embeddings_merge",
        "warns that merging changes the embeddings; merging one of ours leaves them alone (tested in our own tests)",
    ),
    (r"test_non_existing_model_card", "measures PEFT's template of a card by its length; svdtune writes its own card"),
    (r"test_disable_adapter_with_bias_warns", "for LoRA and BOFT only, says the test"),
]


def reason_to_skip(test: str) -> str | None:
    """Why a test does not apply to our methods, None where it does."""
    return next((reason for pattern, reason in SKIPPED if re.search(pattern, test)), None)
