"""A plain training loop around a timm model, with PEFT's LoRA accelerated: no framework at all.

pip install "fastlora-triton[examples]"
python examples/solar_cells_with_timm.py --steps 60
"""

import argparse
import time

import timm
import torch
from peft import LoraConfig, get_peft_model
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.nn import functional as F
from torchvision.transforms import v2

import fastlora
from fastlora.transfer.data import stratified_split
from fastlora.transfer.data.bundled import load_images


def train(arguments: argparse.Namespace, *, accelerated: bool) -> tuple[float, float]:
    """Seconds a step and accuracy of one run on photos of solar cells, functional or defective."""
    torch.manual_seed(0)
    cells = load_images("elpv", 96)
    chosen, held_out = stratified_split(cells.labels.tolist(), [0.8, 0.2], seed=0)
    as_seen = v2.Compose(
        [
            v2.RGB(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    base = timm.create_model(
        "vit_tiny_patch16_224", pretrained=arguments.pretrained, img_size=96, num_classes=len(cells.classes)
    )
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", modules_to_save=["head"]
    )
    model = get_peft_model(base, config)
    if accelerated:
        model = fastlora.accelerate(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=arguments.steps, t_in_epochs=False)
    model.train()
    started = time.perf_counter()
    for step in range(arguments.steps):
        rows = torch.tensor(chosen)[torch.randint(len(chosen), (32,))]
        loss = F.cross_entropy(model(as_seen(cells.images[rows])), cells.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step + 1)
    seconds = (time.perf_counter() - started) / arguments.steps
    model.eval()
    with torch.no_grad():
        parts = cells.images[held_out].split(64)
        answers = torch.cat([model(as_seen(part)).argmax(dim=1) for part in parts])
    return seconds, float((answers == cells.labels[held_out]).double().mean())


def main() -> None:
    """Train with PEFT's own layers, then with the fused ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pretrained", action="store_true", help="Download ImageNet weights.")
    arguments = parser.parse_args()
    for name, accelerated in (("PEFT", False), ("PEFT, accelerated", True)):
        seconds, accuracy = train(arguments, accelerated=accelerated)
        print(f"{name}: {seconds:.3f} s a step, {accuracy:.1%} right")


if __name__ == "__main__":
    main()
