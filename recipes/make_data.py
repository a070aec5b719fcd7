"""Small models and data for the recipes in ``recipes/made``.

``python recipes/make_data.py TASK FOLDER [--images FOLDER] [--brown FOLDER] [--espeak COMMAND]``

Writes ``FOLDER/model`` (a tiny model of a real family, random weights, with its processor) and
``FOLDER/data`` (``train.parquet``, ``test.parquet``). What is real and what is made, for each task:

object-detection, image-segmentation, image-text-to-text, zero-shot-image-classification
    Real Fashion-MNIST things (``--images``: the folder of its idx files) put on larger black
    canvases, so that boxes, masks and positions are true.
depth-estimation
    The same things at made distances: one that is twice as far away is half as large and dimmer,
    and nearer ones hide farther ones.
text2text-generation
    Real sentences of the Brown corpus (``--brown``) and their own part-of-speech tags.
automatic-speech-recognition
    Words spoken by espeak-ng (``--espeak``: the command), brought to 16 kHz, in noise.
audio-classification
    Synthesised tones of known instruments: sine, square, saw and triangle waves of random pitch
    and length in noise. Nothing of it was recorded.
time-series-forecasting
    Made series: two seasons, a trend and noise.
sentence-similarity
    Real pairs of Brown sentences; the score is the share of words that they have in common, which
    is a made stand-in for a judgement.
question-answering
    Real sentences of the Brown corpus; the question is which word follows one of them, and so made.
"""

import argparse
import gzip
import io
import random
import shlex
import subprocess
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, Features, Image, Value

CLASSES = ("shirt", "trouser", "pullover", "dress", "coat", "sandal", "blouse", "sneaker")
CLASSES += ("bag", "boot")
Things = tuple[np.ndarray, np.ndarray]
"""Images (n, side, side) of whole numbers, and their classes."""


# Things on canvases ------------------------------------------------------------------------------


def fashion(folder: str, split: str) -> Things:
    """Fashion-MNIST."""
    stem = {"train": "train", "test": "t10k"}[split]
    files = (Path(folder).expanduser() / f"{stem}-{kind}.gz" for kind in _IDX)
    images, labels = (np.frombuffer(gzip.decompress(f.read_bytes()), np.uint8) for f in files)
    return images[16:].reshape(-1, 28, 28), labels[8:]


_IDX = "images-idx3-ubyte", "labels-idx1-ubyte"


def digits(split: str) -> Things:
    """scikit-learn's digits, for machines without Fashion-MNIST."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = (bunch.images * (255 / 16)).astype(np.uint8).repeat(3, 1).repeat(3, 2)
    part = slice(0, 1400) if split == "train" else slice(1400, None)
    return images[part], bunch.target[part]


def composed(
    things: Things, chance: random.Random, side: int, most: int
) -> tuple[np.ndarray, list[tuple[int, int, int, np.ndarray]]]:
    """One to ``most`` things that do not overlap: canvas; class, left, top, pixels of each."""
    images, labels = things
    size = images.shape[1]
    cells = [
        (x, y) for x in range(0, side - size + 1, size) for y in range(0, side - size + 1, size)
    ]
    canvas, placed = np.zeros((side, side), np.uint8), []
    slack = min(side % size, size // 4)
    for x, y in chance.sample(cells, chance.randint(1, min(most, len(cells)))):
        number = chance.randrange(len(images))
        left, top = x + chance.randint(0, slack), y + chance.randint(0, slack)
        canvas[top : top + size, left : left + size] = images[number]
        placed.append((int(labels[number]), left, top, images[number]))
    return canvas, placed


def detection(things: Things, chance: random.Random, side: int) -> dict[str, Any]:
    """Boxes around the pixels of each thing."""
    canvas, placed = composed(things, chance, side, 3)
    boxes = []
    for _, left, top, pixels in placed:
        rows, columns = (pixels > 0).any(1).nonzero()[0], (pixels > 0).any(0).nonzero()[0]
        low, near = int(rows[0]), int(columns[0])
        box = (left + near, top + low, int(columns[-1]) - near + 1, int(rows[-1]) - low + 1)
        boxes.append([float(number) for number in box])
    names = [CLASSES[label] for label, *_ in placed]
    return {"image": png(canvas), "objects": {"bbox": boxes, "category": names}}


def segmentation(things: Things, chance: random.Random, side: int) -> dict[str, Any]:
    """A thing's class and one where it is, 0 elsewhere."""
    canvas, placed = composed(things, chance, side, 3)
    mask = np.zeros_like(canvas)
    for label, left, top, pixels in placed:
        size = len(pixels)
        mask[top : top + size, left : left + size][pixels > 30] = label + 1
    return {"image": png(canvas), "annotation": png(mask)}


def depth(things: Things, chance: random.Random, side: int) -> dict[str, Any]:
    """Three things, the nearest in front."""
    images, _ = things
    canvas, far = np.zeros((side, side), np.float32), np.full((side, side), 4.0, np.float32)
    for distance in sorted((chance.uniform(1, 3) for _ in range(3)), reverse=True):
        image = torch.from_numpy(images[chance.randrange(len(images))].astype(np.float32))
        size = max(4, round(min(2 * image.shape[0], side) / (2 * distance)))
        thing = torch.nn.functional.interpolate(image[None, None], (size, size), mode="area")
        pixels = thing[0, 0].numpy()
        left, top = chance.randint(0, side - size), chance.randint(0, side - size)
        there = pixels > 30
        canvas[top : top + size, left : left + size][there] = pixels[there] / distance
        far[top : top + size, left : left + size][there] = distance
    return {"image": png(canvas.astype(np.uint8)), "depth_map": far.tolist()}


def two_things(things: Things, chance: random.Random, side: int) -> tuple[np.ndarray, str, str]:
    """Canvas, and the names of what is left and right."""
    images, labels = things
    first, second = (chance.randrange(len(images)) for _ in range(2))
    canvas, size = np.zeros((side, side), np.uint8), images.shape[1]
    top = (side - size) // 2
    canvas[top : top + size, :size] = images[first]
    canvas[top : top + size, side - size :] = images[second]
    return canvas, CLASSES[labels[first]], CLASSES[labels[second]]


def caption(things: Things, chance: random.Random, side: int) -> dict[str, Any]:
    """What is left of what."""
    canvas, left, right = two_things(things, chance, side)
    return {"image": png(canvas), "text": f"a {left} left of a {right}"}


def question(things: Things, chance: random.Random, side: int) -> dict[str, Any]:
    """What is left, or right."""
    canvas, left, right = two_things(things, chance, side)
    where = chance.choice(("left", "right"))
    answer = left if where == "left" else right
    return {"image": png(canvas), "source": f"what is {where}", "target": answer}


def png(pixels: np.ndarray) -> dict[str, Any]:
    """As a table holds an image."""
    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


# Texts -------------------------------------------------------------------------------------------


def brown(folder: str | None) -> list[list[tuple[str, str]]]:
    """Sentences as words with their tags, made coarse; without the corpus they are made up."""
    sentences = []
    if folder is None:
        chance, kinds = random.Random(0), {"nn": CLASSES, "vb": WORDS, "at": ("a", "the")}
        order = "at", "nn", "vb", "at", "nn"
        return [[(chance.choice(kinds[tag]), tag) for tag in order] for _ in range(400)]
    for path in sorted(Path(folder).expanduser().glob("c[a-r][0-9][0-9]")):
        for line in path.read_text().splitlines():
            pairs = [pair.rpartition("/") for pair in line.split()]
            if 4 <= len(pairs) <= 16:
                sentences.append([(word.lower(), tag[:2]) for word, _, tag in pairs if word])
    return sentences


def tagging(
    sentences: list[list[tuple[str, str]]], chance: random.Random, _: int
) -> dict[str, Any]:
    """A sentence and its tags."""
    words = chance.choice(sentences)
    return {
        "source": " ".join(word for word, _ in words),
        "target": " ".join(tag for _, tag in words),
    }


def alike(sentences: list[list[tuple[str, str]]], chance: random.Random, _: int) -> dict[str, Any]:
    """A sentence with another, or with what is left of it."""
    first = [word for word, _ in chance.choice(sentences)]
    if chance.random() < 0.5:
        second = [word for word, _ in chance.choice(sentences)]
    else:
        second = [word for word in first if chance.random() < 0.7] or first
    shared = len(set(first) & set(second)) / len(set(first) | set(second))
    return {"sentence1": " ".join(first), "sentence2": " ".join(second), "score": shared}


def following(
    sentences: list[list[tuple[str, str]]], chance: random.Random, _: int
) -> dict[str, Any]:
    """A sentence, and which word follows one that stands in it once."""
    words: list[str] = []
    while not (once := [i for i, word in enumerate(words[:-1]) if words.count(word) == 1]):
        words = [word for word, _ in chance.choice(sentences)]
    at = chance.choice(once)
    answers = {"text": [words[at + 1]], "answer_start": [len(" ".join(words[: at + 1])) + 1]}
    return {
        "question": f"what follows {words[at]} ?", "context": " ".join(words), "answers": answers,
    }  # fmt: skip


# Sounds and series -------------------------------------------------------------------------------


WORDS = ("red", "green", "blue", "seven", "nine", "open", "close", "stop")
RATE = 16_000


def spoken(command: str) -> dict[str, np.ndarray]:
    """Each word by espeak-ng, at 16 kHz."""
    from scipy.signal import resample_poly

    waves = {}
    for word in WORDS:
        done = subprocess.run(
            [*shlex.split(command), "-s", "175", "--stdout", word], capture_output=True, check=True
        )
        with wave.open(io.BytesIO(done.stdout)) as file:
            values = np.frombuffer(file.readframes(10**8), "<i2").astype(np.float32) / 2**15
            rate = file.getframerate()
        loud = np.abs(values) > 0.01
        values = values[loud.argmax() : len(values) - loud[::-1].argmax()]
        waves[word] = resample_poly(values, RATE, rate).astype(np.float32)
    return waves


def beeped() -> dict[str, np.ndarray]:
    """Each letter of each word as a tone of its own, for machines without espeak-ng."""
    times = np.arange(RATE // 20) / RATE
    return {
        word: np.concatenate(
            [np.sin(2 * np.pi * (200 + 60 * (ord(c) - 97)) * times) for c in word]
        ).astype(np.float32)
        for word in WORDS
    }


def speech(waves: dict[str, np.ndarray], chance: random.Random, num: int) -> dict[str, Any]:
    """Up to ``num`` words."""
    words = [chance.choice(WORDS) for _ in range(chance.randint(1, num))]
    noise = np.random.default_rng(chance.randrange(2**31))
    pause = np.zeros(RATE // 20, np.float32)
    values = np.concatenate([part for word in words for part in (waves[word], pause)])
    values = values * chance.uniform(0.4, 1.0) + noise.normal(0, 0.003, len(values))
    return {"audio": wav(values), "text": " ".join(words)}


def tone(_: Any, chance: random.Random, num: int) -> dict[str, Any]:
    """A fourth of them of each kind."""
    label = chance.choice(("sine", "square", "saw", "triangle"))
    times = np.arange(int(RATE * chance.uniform(0.3, 0.5)) // num) / RATE
    phase = (times * chance.uniform(200, 800) + chance.random()) % 1
    values = {
        "sine": np.sin(2 * np.pi * phase),
        "square": np.sign(phase - 0.5),
        "saw": 2 * phase - 1,
        "triangle": 4 * np.abs(phase - 0.5) - 1,
    }[label]
    noise = np.random.default_rng(chance.randrange(2**31)).normal(0, 0.3, len(values))
    return {"audio": wav(0.5 * values + 0.5 * noise), "label": label}


def wav(values: np.ndarray) -> dict[str, Any]:
    """As a table holds a recording."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((np.clip(values, -1, 1) * 32767).astype("<i2").tobytes())
    return {"bytes": file.getvalue(), "path": None}


def seasons(_: Any, chance: random.Random, length: int) -> dict[str, Any]:
    """As many times as ``length``."""
    times = np.arange(length)
    noise = np.random.default_rng(chance.randrange(2**31)).normal(0, 0.1, length)
    periods = chance.uniform(6, 10), chance.uniform(15, 25)
    waves = sum(np.sin(2 * np.pi * (times / p + chance.random())) for p in periods)
    values = waves + chance.uniform(-0.02, 0.02) * times + chance.uniform(-2, 2) + noise
    return {"target": values.astype(np.float32).tolist()}


# Models ------------------------------------------------------------------------------------------


def word_tokenizer(words: list[str], end: bool = True, **marks: str) -> Any:
    """Whole words, with an end where it is asked for; texts pad on the right."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<unk>", "<s>", "</s>", *marks.values()]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        inner.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
        extra_special_tokens=marks,
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


CAPTION_WORDS = ["a", "left", "right", "of", "what", "is", *CLASSES]
VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}


def yolos(side: int) -> tuple[Any, list[Any]]:
    """0.18 M parameters."""
    config = transformers.YolosConfig(
        **VIT, image_size=[side, side], patch_size=8, num_detection_tokens=8, num_labels=10
    )
    size = {"height": side, "width": side}
    own = transformers.YolosImageProcessor(size=size, **NORMAL)
    return spread(transformers.YolosForObjectDetection(config)), [own]


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Draws weights anew, so that a narrow detector learns in minutes.

    transformers begins with zeros for all places and detection tokens, so that none differs from
    another, and with weights of 0.02, which suit a width of 768 and are too small for 64.
    """
    for name, weight in model.named_parameters():
        if name.endswith(("position_embeddings", "tokens")):
            torch.nn.init.normal_(weight, std=0.5)
        elif weight.ndim > 1:
            torch.nn.init.xavier_uniform_(weight.data.flatten(1))
    return model


def segformer(side: int) -> tuple[Any, list[Any]]:
    """0.13 M parameters."""
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[32, 64],
        patch_sizes=[5, 3],
        strides=[2, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=64,
        num_labels=11,
    )
    own = transformers.SegformerImageProcessor(size={"height": side, "width": side}, **NORMAL)
    return transformers.SegformerForSemanticSegmentation(config), [own]


def glpn() -> tuple[Any, list[Any]]:
    """0.21 M parameters."""
    config = transformers.GLPNConfig(
        num_encoder_blocks=4,
        depths=[1, 1, 1, 1],
        sr_ratios=[4, 2, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 3, 4],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=32,
        max_depth=5,
    )
    return transformers.GLPNForDepthEstimation(config), [transformers.GLPNImageProcessor()]


def t5(vocabulary: list[str]) -> tuple[Any, list[Any]]:
    """A T5 of whole words."""
    tokenizer = word_tokenizer(vocabulary)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config), [tokenizer]


def bert(vocabulary: list[str], cls: str = "BertModel") -> tuple[Any, list[Any]]:
    """A BERT of whole words."""
    tokenizer = word_tokenizer(vocabulary)
    config = transformers.BertConfig(
        **VIT, vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0
    )
    return getattr(transformers, cls)(config), [tokenizer]


def wav2vec2(cls: str) -> tuple[Any, list[Any]]:
    """0.18 M parameters; letters with CTC, or classes."""
    features = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    convolutions = {
        "conv_dim": [32] * 5,
        "conv_stride": [5, 4, 4, 2, 2],
        "conv_kernel": [10, 8, 4, 4, 4],
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
    }
    if cls == "Wav2Vec2ForSequenceClassification":
        config = transformers.Wav2Vec2Config(
            **VIT, **convolutions, classifier_proj_size=32, num_labels=4
        )
        return transformers.Wav2Vec2ForSequenceClassification(config), [features]
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    own = transformers.Wav2Vec2Processor(features, letter_tokenizer(letters))
    config = transformers.Wav2Vec2Config(
        **VIT,
        **convolutions,
        vocab_size=len(letters),
        initializer_range=0.1,  # 0.02 suits a width of 768; with it CTC stays at blanks
    )
    return transformers.Wav2Vec2ForCTC(config), [own]


def letter_tokenizer(letters: list[str]) -> Any:
    """One token a letter."""
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
        return transformers.Wav2Vec2CTCTokenizer(str(file))


def whisper() -> tuple[Any, list[Any]]:
    """0.2 M parameters; one token a letter."""
    from tokenizers.pre_tokenizers import ByteLevel

    features = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=3)
    marks = "startoftranscript", "notimestamps", "0.00"
    tokenizer: Any = transformers.WhisperTokenizer(
        vocab={letter: i for i, letter in enumerate([*sorted(ByteLevel.alphabet()), _END])},
        merges=[],
        pad_token=_END,
        model_max_length=64,
        additional_special_tokens=[f"<|{mark}|>" for mark in marks],
    )
    start, end = tokenizer.prefix_tokens[0], tokenizer.eos_token_id
    own = transformers.WhisperProcessor(features, tokenizer)
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=20,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=150,
        max_target_positions=448,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config), [own]


_END = "<|endoftext|>"


def clip(side: int) -> tuple[Any, list[Any]]:
    """0.22 M parameters."""
    tokenizer = word_tokenizer(CAPTION_WORDS)
    size = {"height": side, "width": side}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    config = transformers.CLIPConfig(
        text_config={
            **VIT,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        vision_config={**VIT, "image_size": side, "patch_size": 8},
        projection_dim=32,
    )
    own = transformers.CLIPProcessor(images, tokenizer)
    return transformers.CLIPModel(config), [own]


def llava(side: int) -> tuple[Any, list[Any]]:
    """0.37 M parameters."""
    tokenizer = word_tokenizer(CAPTION_WORDS, end=False, image_token="<image>")
    size = {"height": side, "width": side}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    own = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VIT, image_size=side, patch_size=8),
        text_config=transformers.LlamaConfig(
            **VIT,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        ),
        vision_feature_layer=-1,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // 8) ** 2,
    )
    return transformers.LlavaForConditionalGeneration(config), [own]


def patchtst(channels: int = 1) -> tuple[Any, list[Any]]:
    """18 k parameters: 48 times before, 12 after."""
    config = transformers.PatchTSTConfig(
        num_input_channels=channels,
        context_length=48,
        prediction_length=12,
        patch_length=8,
        patch_stride=8,
        d_model=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=64,
        scaling="std",
        loss="mse",
        use_cls_token=False,
    )
    return transformers.PatchTSTForPrediction(config), []


# The tasks ---------------------------------------------------------------------------------------


def write(
    folder: Path,
    model: Any,
    processors: list[Any],
    row: Callable[[random.Random, str], dict[str, Any]],
    num: tuple[int, int],
) -> None:
    """Writes a model and so many rows of train and test."""
    model.save_pretrained(folder / "model")
    for processor in processors:
        processor.save_pretrained(folder / "model")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(zip(("train", "test"), num, strict=True)):
        chance = random.Random(seed)
        rows = [row(chance, split) for _ in range(count)]
        table = Dataset.from_list(rows)
        blob = {"bytes": Value("binary"), "path": Value("string")}
        features = {
            name: Image() if name in ("image", "annotation") else blob if name == "audio" else kind
            for name, kind in table.features.items()
        }
        table = Dataset.from_list(rows, features=Features(features))
        table.to_parquet(str(folder / "data" / f"{split}.parquet"))


def make(task: str, folder: Path, args: argparse.Namespace, num: tuple[int, int]) -> None:
    """Model and data of a task, with seed 0."""
    torch.manual_seed(0)
    side = args.side
    on_canvas = {
        "object-detection": (detection, lambda: yolos(side)),
        "image-segmentation": (segmentation, lambda: segformer(side)),
        "depth-estimation": (depth, glpn),
        "zero-shot-image-classification": (caption, lambda: clip(side)),
        "image-text-to-text": (question, lambda: llava(side)),
    }
    if task in on_canvas:
        make_row, build = on_canvas[task]
        things = {
            split: fashion(args.images, split) if args.images else digits(split)
            for split in ("train", "test")
        }
        write(folder, *build(), lambda chance, split: make_row(things[split], chance, side), num)
    elif task in ("text2text-generation", "sentence-similarity", "question-answering"):
        sentences = brown(args.brown)
        part = {"train": sentences[::2], "test": sentences[1::2]}
        vocabulary = sorted(
            {word for pairs in part["train"][:2000] for pair in pairs for word in pair}
        )
        one, build = {
            "text2text-generation": (tagging, t5),
            "sentence-similarity": (alike, bert),
            "question-answering": (following, partial(bert, cls="BertForQuestionAnswering")),
        }[task]
        write(folder, *build(vocabulary), lambda chance, split: one(part[split], chance, 0), num)
    elif task in ("automatic-speech-recognition", "whisper"):
        waves = spoken(args.espeak) if args.espeak else beeped()
        build = whisper if task == "whisper" else lambda: wav2vec2("Wav2Vec2ForCTC")
        write(folder, *build(), lambda chance, _: speech(waves, chance, 2), num)
    elif task == "audio-classification":
        model = wav2vec2("Wav2Vec2ForSequenceClassification")
        write(folder, *model, lambda chance, _: tone(None, chance, 1), num)
    elif task == "time-series-forecasting":
        write(folder, *patchtst(), lambda chance, _: seasons(None, chance, 200), num)


TASKS = (
    "object-detection",
    "image-segmentation",
    "depth-estimation",
    "zero-shot-image-classification",
    "image-text-to-text",
    "text2text-generation",
    "sentence-similarity",
    "question-answering",
    "automatic-speech-recognition",
    "whisper",
    "audio-classification",
    "time-series-forecasting",
)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", help="folder of Fashion-MNIST; without it digits are taken")
    parser.add_argument("--brown", help="folder of the Brown corpus")
    parser.add_argument("--espeak", help="command of espeak-ng; without it tones stand for letters")
    parser.add_argument("--side", type=int, default=64, help="pixels of a canvas")
    parser.add_argument("--num", type=int, nargs=2, default=(2000, 400), help="rows of the splits")
    args = parser.parse_args()
    make(args.task, args.folder, args, tuple(args.num))


if __name__ == "__main__":
    main()
