"""A tiny model and a few rows for every task: recipes/make_data.py's, and those of the rest."""

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from recipes import make_data

SIDE = 56


class Case(NamedTuple):
    """A task as a recipe names it.

    Attributes:
        task: Its name.
        made: What makes model and data: a task of `make_data`, or a function of a folder.
        given: What ``pipeline`` is given, as keyword arguments or one positional one.
        data: Keys of the section ``data``.
    """

    task: str
    made: Any
    given: Any = None
    data: str = ""


def bert(folder, cls, vocabulary, **config):
    """A tiny BERT of whole words, with a mask."""
    torch.manual_seed(0)
    tokenizer = make_data.word_tokenizer(vocabulary, mask_token="<mask>")
    small = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 24}
    own = transformers.BertConfig(
        **small,
        num_hidden_layers=2,
        max_position_embeddings=64,
        vocab_size=len(tokenizer),
        **config,
    )
    getattr(transformers, cls)(own).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def words(folder, cls, make_row, **config):
    """Rows of made sentences, for a tiny BERT."""
    sentences = make_data.brown(None)
    vocabulary = sorted({word for pairs in sentences for pair in pairs for word in pair})
    bert(folder, cls, [*vocabulary, "who"], **config)
    rows(folder, make_row, sentences)


def rows(folder, make_row, sentences):
    (folder / "data").mkdir(parents=True)
    for seed, split in enumerate(("train", "test")):
        chance = random.Random(seed)
        num = (240, 60)[seed] if make_row is plain else (24, 12)[seed]
        made = [make_row(chance.choice(sentences), chance) for _ in range(num)]
        text = "\n".join(json.dumps(row) for row in made)
        (folder / "data" / f"{split}.jsonl").write_text(text)


def plain(pairs, chance):
    return {"text": " ".join(word for word, _ in pairs)}


def labelled(pairs, chance):
    return {**plain(pairs, chance), "label": (pairs[1][0] > "m" and "late") or "early"}


def tagged(pairs, chance):
    return {"tokens": [word for word, _ in pairs], "tags": [f"B-{tag}" for _, tag in pairs]}


def asked(pairs, chance):
    text = " ".join(word for word, _ in pairs)
    answer = pairs[1][0]
    answers = {"text": [answer], "answer_start": [text.index(answer)]}
    return {"question": "who", "context": text, "answers": answers}


def llama(folder):
    torch.manual_seed(0)
    sentences = make_data.brown(None)
    vocabulary = sorted({word for pairs in sentences for word, _ in pairs})
    tokenizer = make_data.word_tokenizer(vocabulary, end=False)
    config = transformers.LlamaConfig(
        **make_data.VIT,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows(folder, plain, sentences)


def vit(folder, cls):
    from datasets import Dataset, Features, Image, Value

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **make_data.VIT, image_size=24, patch_size=8, num_labels=10, num_channels=3
    )
    getattr(transformers, cls)(config).save_pretrained(folder / "model")
    size = {"height": 24, "width": 24}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split, num in (("train", 40), ("test", 12)):
        images, labels = make_data.digits(split)
        pairs = zip(images[:num], labels[:num], strict=True)
        made = [{"image": make_data.png(image), "label": int(label)} for image, label in pairs]
        features = Features({"image": Image(), "label": Value("int64")})
        table = Dataset.from_list(made, features=features)
        table.to_parquet(str(folder / "data" / f"{split}.parquet"))


def image(side=SIDE):
    from PIL import Image

    return Image.new("RGB", (side, side), (90, 20, 200))


def noise():
    return torch.randn(8000, generator=torch.Generator().manual_seed(0)).numpy()


TEXT = "a bag stop the coat"
CASES = {
    "image-classification": Case(
        "image-classification", lambda f: vit(f, "ViTForImageClassification"), image()
    ),
    "image-feature-extraction": Case(
        "image-feature-extraction", lambda f: vit(f, "ViTModel"), image()
    ),
    "self, images": Case("self", lambda f: vit(f, "ViTForImageClassification")),
    "self, texts": Case("self", lambda f: words(f, "BertForMaskedLM", plain)),
    "text-classification": Case(
        "text-classification",
        lambda f: words(
            f,
            "BertForSequenceClassification",
            labelled,
            id2label={0: "early", 1: "late"},
            label2id={"early": 0, "late": 1},
        ),
        TEXT,
    ),
    "token-classification": Case(
        "token-classification",
        lambda f: words(
            f,
            "BertForTokenClassification",
            tagged,
            id2label={0: "B-at", 1: "B-nn", 2: "B-vb"},
            label2id={"B-at": 0, "B-nn": 1, "B-vb": 2},
        ),
        TEXT,
    ),
    "question-answering": Case(
        "question-answering", lambda f: words(f, "BertForQuestionAnswering", asked)
    ),
    "fill-mask": Case(
        "fill-mask",
        lambda f: words(f, "BertForMaskedLM", plain),
        "a bag <mask> the coat",
        "max_length: 8",
    ),
    "text-generation": Case("text-generation", llama, TEXT, "max_length: 8"),
    "feature-extraction": Case(
        "feature-extraction", lambda f: words(f, "BertModel", plain), TEXT, "num_train: 40"
    ),
    "sentence-similarity": Case("sentence-similarity", "sentence-similarity"),
    "object-detection": Case("object-detection", "object-detection", image()),
    "image-segmentation": Case("image-segmentation", "image-segmentation", image()),
    "depth-estimation": Case("depth-estimation", "depth-estimation", image()),
    "text2text-generation": Case("text2text-generation", "text2text-generation"),
    "automatic-speech-recognition": Case(
        "automatic-speech-recognition", "automatic-speech-recognition", noise()
    ),
    "automatic-speech-recognition, seq2seq": Case(
        "automatic-speech-recognition", "whisper", noise()
    ),
    "audio-classification": Case("audio-classification", "audio-classification", noise()),
    "zero-shot-image-classification": Case(
        "zero-shot-image-classification",
        "zero-shot-image-classification",
        {"image": image(), "candidate_labels": ["a bag", "a coat"], "hypothesis_template": "{}"},
    ),
    "image-text-to-text": Case(
        "image-text-to-text",
        "image-text-to-text",
        {"images": image(), "text": "<image>\nwhat is left\n"},
    ),
    "time-series-forecasting": Case("time-series-forecasting", "time-series-forecasting"),
}


def make(case: Case, folder: Path) -> Path:
    """Model and data of a case in a folder."""
    if callable(case.made):
        case.made(folder)
        return folder
    from datasets import disable_progress_bars

    disable_progress_bars()
    args = argparse.Namespace(images=None, brown=None, espeak=None, side=SIDE)
    make_data.make(case.made, folder, args, (24, 12))
    return folder
