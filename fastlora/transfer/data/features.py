"""Features of a frozen backbone, computed once and kept: a probe on them trains in seconds."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastlora._core.files import write_file
from fastlora.transfer.data.images import LabelledImages


def cached_features(
    features: Callable[[Tensor], Tensor],
    model: nn.Module,
    images: LabelledImages,
    folder: Path,
    *,
    batch_size: int = 32,
    head: nn.Module | None = None,
    precision: str = "no",
    on_done: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features of all pictures, read from ``folder`` if they are there.

    A cache belongs to the model's weights, the names, labels and pixels of the pictures, what they are
    transformed by and the precision: a change of any of them computes anew. Pictures must not be augmented.

    Args:
        features: Maps a batch ``[B, 3, H, W]`` to features ``[B, F]``, such as
            :meth:`TransferLearningModel.features`.
        model: The model whose weights the features come from; put into eval mode.
        images: Pictures with a transform to tensors.
        folder: Holds one file for each cache; made if it isn't there.
        batch_size: Pictures at a time.
        head: Part of ``model`` that the features don't depend on; it may have changed since.
        precision: Name of the precision that ``features`` multiplies in, Accelerate's ``"bf16"``, say; it
            tells caches apart and changes nothing itself. ``"no"`` is the weights' own.
        on_done: Called with how many pictures are done, of how many.

    Returns:
        Features ``[N, F]`` on the CPU, and labels ``[N]`` (int64).

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> from torchvision.datasets import FakeData
        >>> from torchvision.transforms.functional import to_tensor
        >>> from fastlora.transfer.data import open_images
        >>> images = open_images(FakeData(4, (3, 8, 8), num_classes=2)).with_transform(to_tensor)
        >>> model = nn.Flatten()
        >>> features, labels = cached_features(model, model, images, folder)
        >>> features.shape
        torch.Size([4, 192])
    """
    path = folder / f"{_key(model, head, images, precision)}.safetensors"
    stored = _read(path)
    if stored is None:
        stored = {"features": _compute(features, model, images, batch_size, on_done)}
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, save(stored))
    return stored["features"], torch.tensor(images.labels)


def _compute(
    features: Callable[[Tensor], Tensor],
    model: nn.Module,
    images: LabelledImages,
    batch_size: int,
    on_done: Callable[[int, int], None] | None,
) -> Tensor:
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[Tensor] = []
    with torch.no_grad():
        for batch, _ in DataLoader(images, batch_size):
            found.append(features(batch.to(device)).cpu())
            if on_done is not None:
                on_done(sum(map(len, found)), len(images))
    return torch.cat(found)


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError:
        # a damaged cache is only worth computing anew
        return None


def _key(model: nn.Module, head: nn.Module | None, images: LabelledImages, precision: str) -> str:
    digest = hashlib.sha256()
    left_out = {id(tensor) for tensor in head.state_dict(keep_vars=True).values()} if head else set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in left_out:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    described = [images.classes, images.labels, images.names, repr(images.transform), precision]
    digest.update(json.dumps(described).encode())
    for index in range(len(images)):
        picture = np.asarray(images.read(index))
        digest.update(f"{picture.dtype} {picture.shape}".encode() + picture.tobytes())
    return digest.hexdigest()[:32]
