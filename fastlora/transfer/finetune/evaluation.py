"""How good a model is, class by class, and where it is most wrong."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora.transfer.data import LabelledImages
from fastlora.transfer.metrics import (
    accuracy,
    accuracy_interval,
    accuracy_standard_error,
    balanced_accuracy,
    confusion_matrix,
)

_WORST = 12


def evaluate(logits: Tensor, images: LabelledImages) -> dict[str, Any]:
    """Scores of logits ``[n, classes]``, as JSON.

    ``worst`` are the wrong answers that were given with the most confidence: of the true class the model
    held the least.
    """
    labels = torch.tensor(images.labels)
    confusion = confusion_matrix(labels, logits.argmax(dim=1), len(images.classes))
    return {
        "pictures": len(images),
        "accuracy": accuracy(confusion),
        "accuracy_standard_error": accuracy_standard_error(confusion),
        "accuracy_interval": list(accuracy_interval(confusion)),
        "balanced_accuracy": balanced_accuracy(confusion),
        "loss": float(F.cross_entropy(logits.double(), labels)),
        "classes": per_class(confusion, images.classes),
        "confusion": confusion.tolist(),
        "worst": _worst(logits, labels, images),
    }


def per_class(confusion: Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of pictures of each class; None where nothing is divided by.

    Example:
        >>> [row["recall"] for row in per_class(torch.tensor([[3, 1], [0, 4]]), ("cat", "dog"))]
        [0.75, 1.0]
    """
    rows = []
    for index, name in enumerate(classes):
        right, support = int(confusion[index, index]), int(confusion[index].sum())
        predicted = int(confusion[:, index].sum())
        rows.append(
            {
                "class": name,
                "precision": right / predicted if predicted else None,
                "recall": right / support if support else None,
                "f1": 2 * right / (predicted + support) if predicted + support else None,
                "pictures": support,
            }
        )
    return rows


def _worst(logits: Tensor, labels: Tensor, images: LabelledImages) -> list[dict[str, Any]]:
    probabilities = logits.double().softmax(dim=1)
    predictions = logits.argmax(dim=1)
    of_the_true = probabilities.gather(1, labels[:, None]).flatten()
    order = of_the_true.argsort(stable=True).tolist()
    wrong = [index for index in order if predictions[index] != labels[index]]
    return [
        {
            "index": index,
            "name": images.names[index],
            "true": images.classes[int(labels[index])],
            "predicted": images.classes[int(predictions[index])],
            "probability": float(probabilities[index, predictions[index]]),
            "probability_of_true": float(of_the_true[index]),
        }
        for index in wrong[:_WORST]
    ]
