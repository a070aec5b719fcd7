import json

import pytest
import torch

from sosp_hub.recipe.schema import ModelSection

WORDS = ["good", "bad", "film", "the", "a", "was"]


@pytest.fixture
def section():
    def make(library="timm", task="image-classification", **keys):
        return ModelSection(library=library, task=task, **keys)

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer of a few words, with the special tokens of a BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = [(word, words[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, pair)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=40,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def save(tmp_path, tokenizer_folder):
    """Saves a tiny model of a class, with the tokenizer beside it."""
    import shutil

    import transformers

    def make(kind, name="model", **config):
        cls = getattr(transformers, kind)
        torch.manual_seed(1)
        model = cls(cls.config_class(**{**SIZES[cls.config_class.model_type], **config})).eval()
        folder = tmp_path / name
        model.save_pretrained(folder)
        if cls.config_class.model_type != "vit":
            shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
        return folder, model

    return make


_TEXT = {"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {
    "bert": {**_TEXT, "intermediate_size": 32, "max_position_embeddings": 24},
    "llama": {**_TEXT, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8},
    "vit": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
        "patch_size": 4,
    },
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def in_cache():
    """Puts a folder into the hub's cache, as if it had been downloaded."""
    import shutil
    from pathlib import Path

    from huggingface_hub import constants

    made = []

    def put(folder, repo_id, card=None):
        root = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
        made.append(root)
        shutil.copytree(folder, root / "snapshots" / COMMIT)
        (root / "refs").mkdir()
        (root / "refs/main").write_text(COMMIT)
        if card is not None:
            (root / "snapshots" / COMMIT / "README.md").write_text(card)
        return root / "snapshots" / COMMIT

    yield put
    for root in made:
        shutil.rmtree(root)


CARD = "---\nlicense: mit\nlanguage: en\npipeline_tag: fill-mask\ntags: [x]\n---\n# A model\n"


@pytest.fixture
def card():
    return CARD


@pytest.fixture
def edit():
    """Changes keys of a JSON file."""

    def change(file, **keys):
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return change
