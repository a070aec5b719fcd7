"""A language model: each token from those before it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import LanguageModelTask

if TYPE_CHECKING:
    from sosp_hub.data.source import OpenData
    from sosp_hub.data.split import Split


@register
class TextGeneration(LanguageModelTask):
    """Texts as windows of tokens of equal length, for decoders."""

    name: ClassVar[str] = "text-generation"
    aliases: ClassVar[tuple[str, ...]] = ("causal-lm",)
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "accuracy", "loss")
    counted: ClassVar[str] = "tokens"
    criterion: ClassVar[Mapping[str, Any]] = {"name": "fisher"}

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """Windows of ``data.max_length`` tokens."""
        from sosp_hub.data.texts import WindowSplit, windows_of

        del augment
        return WindowSplit(windows_of(data, name, processor))

    def example_inputs(self, loaded: Any, batch_size: int, num_tokens: int) -> dict[str, Any]:
        """Tokens without padding, and no cache."""
        from sosp_hub.tasks.examples import text_inputs

        inputs = text_inputs(loaded, batch_size, num_tokens)
        return {"input_ids": inputs["input_ids"], "use_cache": False}

    def use(self) -> list[str]:
        """Twenty tokens more."""
        return [
            'inputs = tokenizer("The weather today is", return_tensors="pt")',
            "tokens = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(tokens[0]))",
        ]
