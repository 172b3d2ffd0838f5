"""Train a torchvision network with QCFS on your own images, convert it, and evaluate it by T.

    python examples/train_qcfs.py --data /path/to/imagenet --model resnet18 --levels 8
    python examples/train_qcfs.py --data /path/to/cifar10 --format cifar10 --model vgg16_bn --levels 4 --image-size 32

`--data` has train/ and val/ folders with one folder of images per class. With --format cifar10 it is the extracted
python version of CIFAR-10 (data_batch_1 .. 5, test_batch).

The hyper-parameters are the paper's (Bu et al., ICLR 2022, section 6): SGD with momentum 0.9, weight decay 5e-4, a
cosine schedule, theta starting at 8.0, learning rate 0.1, 300 epochs for CIFAR and 120 for ImageNet, L = 4 for CIFAR-10
and 8 for ImageNet.

A run writes last.pt after each epoch. Started again, it goes on from there.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

import qcfs_fast

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


class ImageFolder(Dataset):
    """Images at root/class/image; cropped and flipped at random in training, cropped at the centre otherwise."""

    def __init__(self, root: Path, size: int, training: bool) -> None:
        if not root.is_dir():
            raise SystemExit(f"{root} does not exist; --data needs train/ and val/ with one folder per class")
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir())
        self.files = [
            (p, i)
            for i, c in enumerate(self.classes)
            for p in sorted((root / c).rglob("*"))
            if p.suffix.lower() in ENDINGS
        ]
        if not self.files:
            raise SystemExit(f"{root} holds no images ({', '.join(sorted(ENDINGS))})")
        self.size, self.training = size, training

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        path, label = self.files[index]
        with Image.open(path) as image:
            image = image.convert("RGB")
            side = round(self.size * 1.14)
            scale = side / min(image.size)
            image = image.resize([max(self.size, round(d * scale)) for d in image.size], Image.Resampling.BILINEAR)
            spare = [d - self.size for d in image.size]
            x, y = (int(torch.randint(s + 1, ())) if self.training else s // 2 for s in spare)
            image = image.crop((x, y, x + self.size, y + self.size))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        if self.training and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], label


def cifar10(root: Path) -> tuple[Dataset, Dataset]:
    """The python version of CIFAR-10: five training files and one for testing."""

    def read(name: str):
        try:
            with open(root / name, "rb") as f:
                batch = pickle.load(f, encoding="bytes")  # the data set's own format; use only files you trust
        except OSError as error:
            raise SystemExit(f"{root / name}: {error}; --data needs the extracted cifar-10-batches-py") from error
        return torch.from_numpy(np.array(batch[b"data"])).reshape(-1, 3, 32, 32), torch.tensor(batch[b"labels"])

    def dataset(names: list[str]) -> TensorDataset:
        images, labels = zip(*(read(n) for n in names), strict=True)
        x = torch.cat(images).float() / 255
        return TensorDataset(
            (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], torch.cat(labels)
        )

    return dataset([f"data_batch_{i}" for i in range(1, 6)]), dataset(["test_batch"])


def augment(x: torch.Tensor, cifar: bool) -> torch.Tensor:
    """Crop and flip CIFAR images at random after padding them by four; ImageFolder does its own per image."""
    if not cifar:
        return x
    padded = F.pad(x, (4, 4, 4, 4))
    i, j = (int(v) for v in torch.randint(9, (2,)))
    x = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
    flip = torch.rand(len(x)) < 0.5
    return torch.where(flip[:, None, None, None], x.flip(3), x)


@torch.no_grad()
def accuracy(network, loader: DataLoader, device: torch.device, steps: list[int] | None = None) -> list[float]:
    """Share of right labels. With `steps` the network is an SNN, and one pass answers for each of these T."""
    right, seen = np.zeros(len(steps) if steps else 1), 0
    for x, y in tqdm(loader, desc="evaluating", leave=False):
        x, y = x.to(device), y.to(device)
        outputs = [network(x)] if steps is None else network(x, T=max(steps), per_step=True)[[t - 1 for t in steps]]
        right += [int((o.argmax(1) == y).sum()) for o in outputs]
        seen += len(y)
    return list(right / max(seen, 1))


def loaders(o: argparse.Namespace) -> tuple[DataLoader, DataLoader, int]:
    """Batches to train on, batches to test on, and the number of classes."""
    if o.format == "cifar10":
        train_set, test_set = cifar10(o.data)
        classes = 10
    else:
        train_set, test_set = (
            ImageFolder(o.data / "train", o.image_size, True),
            ImageFolder(o.data / "val", o.image_size, False),
        )
        if train_set.classes != test_set.classes:
            raise SystemExit("train/ and val/ have different class folders")
        classes = len(train_set.classes)
    train_loader = DataLoader(
        train_set, o.batch, shuffle=True, num_workers=o.workers, drop_last=len(train_set) > o.batch
    )
    test_loader = DataLoader(test_set, o.batch, num_workers=o.workers)
    return train_loader, test_loader, classes


def train(model: torch.nn.Module, loader: DataLoader, o: argparse.Namespace, device: torch.device) -> None:
    """Train the epochs that last.pt does not hold yet."""
    epochs = o.epochs or (120 if o.image_size >= 224 else 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=o.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    state_file, first = o.output / "last.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        for part, key in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[key])
        first = state["epoch"]
        print(f"going on after epoch {first}")
    for epoch in range(first, epochs):
        model.train()
        bar = tqdm(loader, desc=f"epoch {epoch + 1}/{epochs}")
        for x, y in bar:
            loss = F.cross_entropy(model(augment(x, o.format == "cifar10").to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        schedule.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save({**state, "epoch": epoch + 1}, state_file.with_suffix(".part"))
        state_file.with_suffix(".part").replace(state_file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--format", choices=["folder", "cifar10"], default="folder")
    parser.add_argument("--model", default="resnet18", help="a torchvision model name")
    parser.add_argument("--weights", default=None, help="torchvision weights to start from, for example DEFAULT")
    parser.add_argument("--levels", type=int, default=8, help="L (default 8; 4 for CIFAR-10)")
    parser.add_argument("--threshold", type=float, default=8.0, help="initial theta (default 8.0)")
    parser.add_argument(
        "--calibrate", action="store_true", help="set thresholds from data first (for pretrained weights)"
    )
    parser.add_argument("--epochs", type=int, default=None, help="default 300, or 120 at 224 pixels")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("qcfs-run"))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    o = parser.parse_args(arguments)

    try:
        import torchvision
    except ImportError as error:
        raise SystemExit("this example needs torchvision: pip install 'qcfs-fast[vision]'") from error
    if not hasattr(torchvision.models, o.model):
        raise SystemExit(f"torchvision has no model {o.model!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_loader, test_loader, classes = loaders(o)

    options = {"aux_logits": False, "init_weights": True} if o.model == "googlenet" and o.weights is None else {}
    network = getattr(torchvision.models, o.model)(
        weights=o.weights, **({} if o.weights else {"num_classes": classes}), **options
    )
    model = qcfs_fast.prepare(network.train(), levels=o.levels, threshold=o.threshold).to(device)
    if o.calibrate:
        qcfs_fast.calibrate(model, (b for _, b in zip(range(8), train_loader, strict=False)))
    o.output.mkdir(parents=True, exist_ok=True)
    train(model, train_loader, o, device)

    model.eval()
    print(f"ANN (QCFS, L = {o.levels}): {accuracy(model, test_loader, device)[0]:.2%}")
    shape = (3, o.image_size, o.image_size)
    snn = qcfs_fast.convert(model, T=4, max_T=max([32, *o.steps]), input_shape=shape).to(device)
    for T, share in zip(o.steps, accuracy(snn, test_loader, device, o.steps), strict=True):
        print(f"SNN, T = {T:3d}: {share:.2%}")
    snn.save(o.output / "snn.safetensors")
    print(f"wrote {o.output / 'snn.safetensors'}")


if __name__ == "__main__":
    main()
