"""Prompts by name; `data.template` takes one of these names, or a text of one's own."""

from svdtune.registry import Registry

# Texts with "{prompt}" where the question goes, and perhaps "{eos}" for the tokenizer's end token.
TEMPLATES: Registry[str] = Registry("data")


def template_names() -> list[str]:
    """What `data.template` may be besides a text with {prompt} in it."""
    return ["plain", "chat", *TEMPLATES]


def is_template(text: str) -> bool:
    """Whether `text` can be a recipe's template: plain, chat, a name above, or a text with {prompt}
    in it."""
    return text in ("plain", "chat") or "{prompt}" in text or text in TEMPLATES
