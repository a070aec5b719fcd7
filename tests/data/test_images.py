import numpy as np
import pytest
import torch
from PIL import Image

from sosp_hub.data.images import FileSplit, PixelSplit, shift_and_flip
from sosp_hub.data.loading import load_split
from sosp_hub.data.source import open_data
from sosp_hub.errors import DataError
from sosp_hub.recipe.schema import DataSection
from tests.compare import assert_close

IMAGES = "image-classification"


def test_digits_are_always_split_alike():
    first = open_data(DataSection(id="sklearn/digits"), IMAGES, seed=0)
    other = open_data(DataSection(id="sklearn/digits"), IMAGES, seed=7)
    assert (len(first.train), len(first.test)) == (1438, 359)
    assert first.info.num_labels == 10
    assert first.info.image_shape == (1, 8, 8)
    assert_close(other.test.pixels, first.test.pixels, relative=0)


@pytest.mark.parametrize("key", ["train", "test"])
def test_digits_have_no_other_split(key):
    with pytest.raises(DataError, match=rf"data\.{key}: .*'tset'.*train and test"):
        open_data(DataSection(id="sklearn/digits", **{key: "tset"}), IMAGES)


def test_digits_keep_every_image_once():
    from sklearn.datasets import load_digits

    data = open_data(DataSection(id="sklearn/digits"), IMAGES)
    rows = torch.cat([data.train.pixels, data.test.pixels]).flatten(1)
    expected = torch.from_numpy(load_digits().data * 255 / 16).round()
    found = sorted(map(tuple, rows.tolist()))
    assert found == sorted(map(tuple, expected.to(torch.uint8).tolist()))


def test_idx_folder_equals_what_was_written(idx_folder):
    data = open_data(DataSection(path=str(idx_folder)), IMAGES)
    expected = np.random.default_rng(0).integers(0, 256, (12, 8, 8))
    assert_close(data.train.pixels[:, 0], torch.from_numpy(expected).to(torch.uint8), relative=0)
    assert list(data.train.labels) == [i % 3 for i in range(12)]
    assert (len(data.test), data.info.num_labels) == (5, 3)
    assert_close(torch.tensor(data.info.mean), torch.tensor([expected.mean() / 255]))


@pytest.mark.parametrize("damage", ["truncated", "magic", "missing", "count", "not gzip"])
def test_damaged_idx_folder_names_the_file(idx_folder, write_idx, damage):
    images = idx_folder / "train-images-idx3-ubyte.gz"
    labels = idx_folder / "train-labels-idx1-ubyte"
    match damage:
        case "truncated":
            labels.write_bytes(labels.read_bytes()[:-1])
            named = str(labels)
        case "magic":
            write_idx(labels, [0] * 12, header=bytes([0, 0, 9, 1]))
            named = str(labels)
        case "missing":
            labels.unlink()
            named = "train-labels-idx1-ubyte"
        case "count":
            write_idx(labels, [0, 1])
            named = "12 images but 2 labels"
        case "not gzip":
            images.write_bytes(b"hello")
            named = str(images)
    with pytest.raises(DataError, match="data") as error:
        open_data(DataSection(path=str(idx_folder)), IMAGES)
    assert named in str(error.value)


def test_image_folder_without_splits_holds_out_a_share(image_folder, caplog):
    with caplog.at_level("INFO", "sosp_hub"):
        data = open_data(DataSection(path=str(image_folder(num=10))), IMAGES)
    assert "20 % of it are held out" in caplog.text
    assert data.info.class_names == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (16, 4)
    levels = torch.cat([data.train.pixels, data.test.pixels])[:, 0, 0, 0].tolist()
    assert sorted(levels) == sorted([*range(10), *range(20, 30)])  # each image in one of the two
    assert [level >= 20 for level in levels] == [*data.train.labels, *data.test.labels]


def test_image_folder_with_splits(tmp_path, image_folder):
    image_folder(tmp_path / "set/train", num=3)
    image_folder(tmp_path / "set/val", num=2)
    data = open_data(DataSection(path=str(tmp_path / "set"), test="val"), IMAGES)
    assert (len(data.train), len(data.test)) == (6, 4)
    with pytest.raises(DataError, match=r"no split 'test'; it has train, val"):
        open_data(DataSection(path=str(tmp_path / "set")), IMAGES)


def test_split_folders_are_never_taken_for_classes(tmp_path, image_folder):
    image_folder(tmp_path / "set/train", num=3)
    image_folder(tmp_path / "set/test", num=2)
    with pytest.raises(DataError, match=r"data\.train: .*no split 'trian'; it has test, train"):
        open_data(DataSection(path=str(tmp_path / "set"), train="trian"), IMAGES)
    classes = open_data(DataSection(path=str(tmp_path / "set"), train="all", test=None), IMAGES)
    assert classes.info.class_names == ("test", "train")  # asked for: nothing is held out by name


def test_class_that_train_lacks(tmp_path, image_folder):
    image_folder(tmp_path / "set/train")
    image_folder(tmp_path / "set/test", classes=("cat", "wolf"))
    with pytest.raises(DataError, match="'wolf' that are none of the 2 classes"):
        open_data(DataSection(path=str(tmp_path / "set")), IMAGES)


def test_unreadable_image_is_named(image_folder):
    folder = image_folder()
    (folder / "cat/9.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cat/9\.png"):
        open_data(DataSection(path=str(folder)), IMAGES)


def test_images_of_many_sizes_are_opened_when_asked_for(image_folder, processing):
    folder = image_folder(mode="L")
    Image.new("L", (30, 9), 77).save(folder / "dog/odd.png")
    data = open_data(DataSection(path=str(folder), test=None), IMAGES)
    assert data.info.image_shape is None
    split = load_split(data, "train", processing())
    assert isinstance(split, FileSplit)
    images, labels = split.__getitems__([0, 5])
    expected = [np.asarray(data.train.open(i)).mean() for i in (0, 5)]
    assert_close(images[:, 0, 0, 0], torch.tensor(expected))
    assert labels.tolist() == [data.train.labels[0], data.train.labels[5]]


@pytest.mark.parametrize(("limit", "num"), [(5, 5), (1000, 12)])
def test_limits_draw_a_seeded_subset(idx_folder, limit, num):
    section = DataSection(path=str(idx_folder), num_train=limit)
    pixels = [open_data(section, IMAGES, seed=seed).train.pixels for seed in (0, 0, 1)]
    assert len(pixels[0]) == num
    assert_close(pixels[1], pixels[0], relative=0)
    assert torch.equal(pixels[2], pixels[0]) == (num == 12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("wanted", [(1, 8, 10), (3, 8, 10), (3, 16, 20)])
def test_batch_equals_the_images_one_by_one(image_folder, processing, channels, wanted):
    """Oracle: PIL converts, torch resizes each image on a scale of 0 to 1, numpy normalises."""
    folder = image_folder(mode="L" if channels == 1 else "RGB")
    data = open_data(DataSection(path=str(folder)), IMAGES)
    assert data.info.image_shape == (channels, 8, 10)
    mean, std = (0.1, 0.2, 0.3)[: wanted[0]], (0.5, 0.6, 0.7)[: wanted[0]]
    split = load_split(data, "train", processing(shape=wanted, mean=mean, std=std))
    assert isinstance(split, PixelSplit)
    images, labels = split.__getitems__([4, 1])
    for image, i in zip(images, (4, 1), strict=True):
        tensor = data.train.pixels[i].double() / 255
        if channels == 3 and wanted[0] == 1:
            weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
            tensor = (tensor * weights.view(3, 1, 1)).sum(0, keepdim=True)
        tensor = tensor.expand(wanted[0], -1, -1)
        tensor = torch.nn.functional.interpolate(
            tensor[None], wanted[1:], mode="bilinear", antialias=True
        )[0]
        shape = (-1, 1, 1)
        expected = (tensor - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
        assert_close(image, expected)
    assert labels.tolist() == [data.train.labels[4], data.train.labels[1]]


def test_transformers_take_a_dict_and_their_own_order_of_labels(idx_folder, processing):
    data = open_data(DataSection(path=str(idx_folder)), IMAGES)
    split = load_split(data, "train", processing(key="pixel_values", label_order=(2, 0, 1)))
    batch = split.__getitems__([0, 1, 2])
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["labels"].tolist() == [2, 0, 1]


def test_augmented_image_is_one_of_all_shifts_and_mirrors():
    pixels = torch.randint(1, 256, (400, 2, 8, 16), dtype=torch.uint8)
    shifted = shift_and_flip(pixels)
    padded = torch.nn.functional.pad(pixels, (2, 2, 1, 1))
    chosen = set()
    for before, after in zip(padded, shifted, strict=True):
        fits = [
            (mirrored, y, x)
            for mirrored in (False, True)
            for y in range(3)
            for x in range(5)
            if torch.equal(after.flip(2) if mirrored else after, before[:, y : y + 8, x : x + 16])
        ]
        assert len(fits) == 1
        chosen.add(fits[0])
    assert len(chosen) == 2 * 3 * 5


def test_text_model_on_images(idx_folder, letters):
    data = open_data(DataSection(path=str(idx_folder)), IMAGES)
    with pytest.raises(DataError, match="holds images"):
        load_split(data, "train", letters())
