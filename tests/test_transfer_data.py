"""Pictures from every kind of source: the same pixels, right labels, errors that name what is wrong."""

import csv
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.datasets import ImageFolder

from fastlora.transfer.data import (
    LabelledImages,
    cached_features,
    class_weights,
    find_corrupt,
    open_images,
    pretrained_transforms,
    readable,
    stratified_split,
)

CLASSES = {"cat": 5, "dog": 4, "emu": 6}


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for label, (name, count) in enumerate(CLASSES.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(100 * label + index).save(root / name / f"{index}.png")
    (root / ".hidden").mkdir()
    (root / "cat" / "notes.txt").write_text("no picture")
    return root


def pixels(images: LabelledImages) -> list[bytes]:
    return [np.asarray(images[index][0]).tobytes() for index in range(len(images))]


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("path", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


class Row:
    """What a Hugging Face data set is asked for here, without the package."""

    class Image:
        pass

    class ClassLabel:
        names = tuple(CLASSES)

    def __init__(self, images: LabelledImages) -> None:
        self.rows = [{"photo": images[i][0], "kind": images[i][1]} for i in range(len(images))]
        self.features = {"photo": self.Image(), "kind": self.ClassLabel()}
        self.column_names = ["photo", "kind"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def sources(folder: Path) -> Iterator[tuple[str, Any]]:
    images = open_images(folder)
    yield "folder", folder
    rows = [
        (f"pictures/{name}", images.classes[label])
        for name, label in zip(images.names, images.labels, strict=True)
    ]
    yield "csv", write_csv(folder.parent / "list.csv", rows)
    yield "hugging-face", Row(images)
    yield "torchvision", ImageFolder(str(folder), allow_empty=True)
    yield "itself", images


def test_every_source_gives_the_same(folder: Path) -> None:
    wanted = pixels(open_images(folder))
    (folder / ".hidden").rmdir()
    for kind, source in sources(folder):
        images = open_images(source)
        assert images.classes == tuple(CLASSES), kind
        assert images.labels == (0,) * 5 + (1,) * 4 + (2,) * 6, kind
        assert pixels(images) == wanted, kind


def test_data_sets_of_tensors() -> None:
    x, y = torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 1, 0])
    images = open_images(TensorDataset(x, y))
    assert images.labels == (0, 1, 1, 0)
    assert images.classes == ("0", "1")
    assert torch.equal(images[2][0], x[2])


def test_a_real_hugging_face_data_set(folder: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="reads a Hugging Face data set, which is optional")
    source = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert sorted(open_images(source).labels) == sorted(open_images(folder).labels)


def test_numbers_as_classes_keep_their_order(folder: Path) -> None:
    rows = [(f"pictures/cat/{index}.png", name) for index, name in enumerate(["9", "10", "9"])]
    assert open_images(write_csv(folder.parent / "n.csv", rows)).classes == ("9", "10")


def test_grey_and_transparent_pictures_become_rgb(folder: Path) -> None:
    picture(1).convert("L").save(folder / "cat" / "0.png")
    picture(1).convert("RGBA").save(folder / "cat" / "1.png")
    images = open_images(folder)
    assert {images[index][0].mode for index in range(2)} == {"RGB"}


def test_a_loader_with_workers(folder: Path) -> None:
    _, evaluate = pretrained_transforms("resnet18", image_size=16)
    images = open_images(folder).subset(range(0, 15, 2)).with_transform(evaluate)
    batches = list(DataLoader(images, 4, num_workers=1))
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.tensor(images.labels))
    assert torch.equal(batches[0][0][1], images[1][0])


def test_corrupt_pictures_are_told_by_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "emu" / "2.png").write_bytes(b"hello")
    images, done = open_images(folder), list[tuple[int, int]]()
    assert list(find_corrupt(images, on_done=lambda n, total: done.append((n, total)))) == [6, 11]
    assert done[-1] == (15, 15)
    with pytest.raises(ValueError, match=r"2 of 15 .*dog.1\.png.*emu.2\.png.*on_corrupt='skip'"):
        readable(images)
    with caplog.at_level(logging.WARNING, logger="fastlora"):
        kept = readable(images, on_corrupt="skip")
    assert "emu/2.png" in caplog.text
    assert len(kept) == 13
    assert find_corrupt(kept) == {}
    with pytest.raises(ValueError, match=r"expected a picture at dog.1\.png, but it can't be read"):
        images[6]
    with pytest.raises(ValueError, match="2 of 2 pictures"):
        readable(images.subset([6, 11]), on_corrupt="skip")
    with pytest.raises(ValueError, match="'refuse' or 'skip', got 'ignore'"):
        readable(images, on_corrupt="ignore")  # type: ignore[arg-type]


def test_classes_of_the_test_set_are_those_of_training(folder: Path) -> None:
    images = open_images(folder)
    test = images.subset(range(9, 15))
    assert test.with_classes(["emu", "yak"]).labels == (0,) * 6
    with pytest.raises(ValueError, match=r"that training has \(cat, dog\), got emu"):
        test.with_classes(["cat", "dog"])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_stratified_split(seed: int) -> None:
    labels = [0] * 50 + [1] * 20 + [2] * 3
    parts = stratified_split(labels, [0.7, 0.2, 0.1], seed=seed)
    assert sorted(index for part in parts for index in part) == list(range(73))
    counts = [[sum(labels[i] == c for i in part) for c in range(3)] for part in parts]
    assert counts == [[35, 14, 1], [10, 4, 1], [5, 2, 1]]
    assert parts == stratified_split(labels, [0.7, 0.2, 0.1], seed=seed)
    assert parts != stratified_split(labels, [0.7, 0.2, 0.1], seed=seed + 7)


def test_bad_splits() -> None:
    with pytest.raises(ValueError, match=r"at least 3 examples .* got 2 of class 1"):
        stratified_split([0, 0, 0, 1, 1], [0.6, 0.2, 0.2], seed=0)
    for fractions in ([1.0], [0.5, 0.6], [1.2, -0.2]):
        with pytest.raises(ValueError, match="positive fractions that sum to 1"):
            stratified_split([0, 0, 1, 1], fractions, seed=0)


def test_class_weights_balance() -> None:
    labels = [0] * 6 + [1] * 3 + [2]
    weights = class_weights(labels, 3)
    sums = torch.zeros(3).index_add_(0, torch.tensor(labels), weights[torch.tensor(labels)])
    torch.testing.assert_close(sums, torch.full((3,), 10 / 3))
    with pytest.raises(ValueError, match="expected examples of each of 4 classes"):
        class_weights(labels, 4)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "vit_b_16", "mobilenet_v2"])
def test_evaluation_is_the_models_own(name: str) -> None:
    _, evaluate = pretrained_transforms(name)
    own = models.get_model_weights(name).DEFAULT.transforms()
    torch.testing.assert_close(evaluate(picture(0, (300, 260))), own(picture(0, (300, 260))))


def test_timms_evaluation_is_the_models_own() -> None:
    timm = pytest.importorskip("timm", reason="the transform is timm's")
    _, evaluate = pretrained_transforms("timm:resnet18")
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("resnet18").to_dict())
    own = timm.data.create_transform(**config)
    torch.testing.assert_close(evaluate(picture(0, (300, 260))), own(picture(0, (300, 260))))


def test_training_transforms_vary_and_flip_only_if_asked() -> None:
    train, _ = pretrained_transforms("resnet18", image_size=32)
    torch.manual_seed(0)
    assert not torch.equal(train(picture(0)), train(picture(0)))
    assert train(picture(0)).shape == (3, 32, 32)
    assert "Flip" in repr(train)
    assert "Flip" not in repr(pretrained_transforms("resnet18", flip=False)[0])


class Counting(nn.Module):
    """Features that count how often they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.layer(x.mean((2, 3)))
        return y


def test_features_are_computed_once(folder: Path, tmp_path: Path) -> None:
    _, evaluate = pretrained_transforms("resnet18", image_size=16)
    images, model, cache = open_images(folder).with_transform(evaluate), Counting(), tmp_path / "cache"

    def compute() -> tuple[Tensor, Tensor]:
        return cached_features(model, model, images, cache, batch_size=4)

    features, labels = compute()
    assert (model.calls, labels.tolist()) == (4, list(images.labels))
    expected = model(torch.stack([images[i][0] for i in range(15)]))
    torch.testing.assert_close(features, expected.detach())
    model.calls = 0
    assert torch.equal(compute()[0], features)
    assert model.calls == 0
    # a head trains on what was read
    nn.Linear(4, 2)(compute()[0]).sum().backward()
    # other pixels under the same name, other weights, a damaged file: computed anew
    picture(77).save(folder / "cat" / "0.png")
    assert not torch.equal(compute()[0], features)
    with torch.no_grad():
        model.layer.weight.add_(1)
    model.calls = 0
    changed = compute()[0]
    assert model.calls == 4
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(compute()[0], changed)


def test_bad_sources(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found nothing at .*nowhere"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures .* found none in .*empty"):
        open_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="got the file"):
        open_images(folder / "cat" / "0.png")
    with pytest.raises(TypeError, match="got int"):
        open_images(3)
    with pytest.raises(ValueError, match="two classes or more in TensorDataset, got 1"):
        open_images(TensorDataset(torch.zeros(2, 3, 4, 4), torch.tensor([1, 1])))
    with pytest.raises(ValueError, match=r"labels of 0 or more, got -1"):
        open_images(TensorDataset(torch.zeros(3, 3, 4, 4), torch.tensor([0, 1, -1])))
    (folder / "fox").mkdir()
    with pytest.raises(ValueError, match=r"found none in fox \(empty\); fill or remove"):
        open_images(folder)


def test_bad_lists(folder: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "bad.csv", [("pictures/cat/0.png", "a"), ("gone.png", "b")])
    with pytest.raises(FileNotFoundError, match=r"the 2 pictures .* 1 are not there, 'gone.png' first"):
        open_images(path)
    path = write_csv(tmp_path / "columns.csv", [("x", "y")], ("one", "two"))
    with pytest.raises(ValueError, match="got one, two; name it with image_column"):
        open_images(path)
    rows = [(f"pictures/cat/{i}.png", str(i % 2)) for i in range(4)]
    path = write_csv(tmp_path / "own.csv", rows, ("one", "two"))
    assert open_images(path, image_column="one", label_column="two").labels == (0, 1, 0, 1)
