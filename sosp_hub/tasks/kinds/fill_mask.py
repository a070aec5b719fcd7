"""A masked language model: hidden tokens from those on both sides."""

from typing import TYPE_CHECKING, Any, ClassVar

from sosp_hub.recipe.tasks import register
from sosp_hub.tasks.base import LanguageModelTask

if TYPE_CHECKING:
    from sosp_hub.data.source import OpenData
    from sosp_hub.data.split import Split


@register
class FillMask(LanguageModelTask):
    """Windows of tokens of which 15 % are masked, drawn once for each window (BERT's share)."""

    name: ClassVar[str] = "fill-mask"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "perplexity", "loss")
    counted: ClassVar[str] = "masked tokens"

    def split(self, data: "OpenData", name: str, processor: Any, *, augment: bool) -> "Split":
        """The same masks each time, by the recipe's seed."""
        from sosp_hub.data.texts import MaskedSplit, windows_of
        from sosp_hub.errors import ModelError

        del augment
        windows = windows_of(data, name, processor)
        mask = processor.tokenizer.mask_token_id
        if mask is None:
            raise ModelError(
                "model.task: the tokenizer has no mask token, so the model fills no masks; write "
                "model.task: text-generation"
            )
        return MaskedSplit(windows, mask, data.seed)

    def use(self) -> list[str]:
        """The likeliest token for a mask."""
        return [
            'inputs = tokenizer(f"The weather is {tokenizer.mask_token}.", return_tensors="pt")',
            "logits = model(**inputs).logits[inputs['input_ids'] == tokenizer.mask_token_id]",
            "print(tokenizer.decode(logits.argmax(-1)))",
        ]
