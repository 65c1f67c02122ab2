"""Lightning on fastlora's own layers, beside PEFT's: a timm vision transformer learns digits by LoRA.

pip install "fastlora-triton[examples]"
python examples/digits_with_lightning.py --epochs 3
"""

import argparse
import logging
import time

import lightning
import timm
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastlora


class Classifier(lightning.LightningModule):
    """A classifier, of which what requires gradients is trained."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        """Take the model."""
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross-entropy of a batch."""
        pictures, labels = batch
        loss = F.cross_entropy(self.model(pictures), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Accuracy of a batch."""
        pictures, labels = batch
        right = (self.model(pictures).argmax(dim=1) == labels).float().mean()
        self.log("accuracy", right, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's 1,797 digits as pictures of 32 × 32 pixels, a fifth held out."""
    found = load_digits()
    grey = torch.from_numpy(found.images).float()[:, None] / 16
    pictures = F.interpolate(grey, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, rest = order[: len(order) // 5], order[len(order) // 5 :]
    return TensorDataset(pictures[rest], labels[rest]), TensorDataset(pictures[first], labels[first])


def adapted(body: nn.Module, *, fused: bool) -> nn.Module:
    """LoRA on every linear layer and a trained head, by fastlora or by PEFT."""
    if fused:
        return fastlora.apply_lora(body, rank=16, alpha=32.0, modules_to_save=["head"])
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["head"])
    return get_peft_model(body, config)


def train(arguments: argparse.Namespace, *, fused: bool) -> tuple[float, float]:
    """Seconds a step and accuracy of one run."""
    lightning.seed_everything(0, verbose=False)
    train, test = digits()
    body = timm.create_model(
        "vit_tiny_patch16_224", pretrained=arguments.pretrained, img_size=32, patch_size=4, num_classes=10
    )
    model = Classifier(adapted(body, fused=fused), lr=1e-3)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs,
        max_steps=arguments.max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(model, DataLoader(train, 32, shuffle=True))
    seconds = (time.perf_counter() - started) / trainer.global_step
    scores = trainer.validate(model, DataLoader(test, 128), verbose=False)
    return seconds, scores[0]["accuracy"]


def main() -> None:
    """Train with PEFT's layers, then with ours, and say how well and how fast."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--pretrained", action="store_true", help="Download ImageNet weights.")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, fused in (("PEFT", False), ("fastlora", True)):
        seconds, accuracy = train(arguments, fused=fused)
        print(f"{name}: {seconds:.3f} s a step, {accuracy:.1%} right")


if __name__ == "__main__":
    main()
