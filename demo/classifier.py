"""The classifier that measures the demo: which letter a picture shows, and features in which pictures can be compared.

python -m enat.demo.classifier --fonts work/fonts --out work/classifier
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fonts import CLASSES
from .letters import Glyphs, draw_pictures
from .training import Run, as_images, autocast, pick_device, warmup_cosine

FEATURES = 64


class Classifier(nn.Module):
    """64×64 RGB in [0, 1] → 64 features → 36 classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 64, 128, 128, 128)
        strides = (2, 2, 1, 2, 1, 2)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((3, *widths[:-1]), widths, strides, strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.features = nn.Linear(widths[-1] * 16, FEATURES)
        self.head = nn.Linear(FEATURES, len(CLASSES))

    def embed(self, images: Tensor) -> Tensor:
        """images [N, 3, 64, 64] in [0, 1] → features [N, 64]."""
        return self.features(self.trunk(images * 2 - 1).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.embed(images)))


def load_classifier(path: Path) -> Classifier:
    classifier = Classifier()
    classifier.load_state_dict(torch.load(path, weights_only=True))
    return classifier.eval()


@torch.inference_mode()
def measure(classifier: Classifier, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 64, 64, 3] → features float32 [N, 64] and the class seen in each [N]."""
    features, seen = [], []
    for start in range(0, len(pictures), 512):
        images = as_images(pictures[start : start + 512], torch.device("cpu"))
        embedded = classifier.embed(images)
        features.append(embedded.numpy())
        seen.append(classifier.head(F.relu(embedded)).argmax(1).numpy())
    return np.concatenate(features), np.concatenate(seen)


@click.command()
@click.option("--fonts", type=click.Path(exists=True, path_type=Path), required=True, help="Folder made by enat.demo.fonts.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; goes on where it stopped.")
@click.option("--pictures", default=1500, show_default=True, help="Training pictures a class.")
@click.option("--steps", default=1500, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--device", default=None, help="cpu or cuda; default: cuda where there is one.")
def main(fonts: Path, out: Path, pictures: int, steps: int, batch_size: int, device: str | None) -> None:
    """Train the classifier on rendered letters."""
    where = pick_device(device)
    data, labels = draw_pictures(Glyphs(fonts, "train"), pictures, seed=2)  # other pictures than the network's
    torch.manual_seed(0)
    classifier = Classifier().to(where)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, 100))
    run = Run(out, steps, classifier=classifier, optimizer=optimizer, schedule=schedule)
    classifier.train()
    for _ in run.remaining():
        chosen = torch.randint(len(data), (batch_size,)).numpy()
        images = as_images(data[chosen], where)
        with autocast(where):
            logits = classifier(images)
        wanted = torch.from_numpy(labels[chosen]).to(where)
        loss = F.cross_entropy(logits.float(), wanted, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.finish_step(loss=loss, accuracy=(logits.argmax(1) == wanted).float().mean())
    torch.save(classifier.state_dict(), out / "classifier.pth")


if __name__ == "__main__":
    main()
