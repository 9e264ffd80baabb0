"""Quantizing a small convolutional network of handwritten digits: digits.csv.

    python docs/results/digits.py          # 2 minutes on one idle core; writes the CSV
    python docs/results/digits.py table    # prints the table of docs/qat.md from the CSV

The data are scikit-learn's digits, 1,797 real scans of 8x8 pixels that come with the package: the
same 600 of them for testing whatever the seed, 1,197 for training. A seed decides the initial
weights and the order of the batches. Per seed, one network is trained in full precision and its
batch norms are folded; then, from that one network and for each width of the weights:

    ptq     scales from the weights, activation ranges from 512 training images; no training
    qat     the same, then trained on with fake quantization, at a tenth of the learning rate

and, as a control, trained on in full precision for as many steps at the same rate (fp+). Weights:
symmetric integers with a scale per row, or ternary by absmean. Activations: 8-bit, static, affine.
The first convolution and the last linear layer stay in full precision, as is the default. Every
quantized model is converted to integers, and its outputs on the test images compared, bit for bit,
with those of the fake-quantized one.
"""

import copy
import csv
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.qat import Recipe, calibrate, convert, fold_batch_norm, prepare, size_report

ROOT = Path(__file__).parent.parent.parent
CSV = Path(__file__).parent / "digits.csv"
SEEDS = (0, 1, 2)
TEST_IMAGES, BATCH, CALIBRATION = 600, 64, 512
EPOCHS, MORE_EPOCHS = 30, 15
LR = 3e-3


def recipes() -> dict[str, Recipe]:
    """The recipes, by the name of the weights."""
    static = {"activations": "static", "activation_symmetric": False, "granularity": "row"}
    named = {f"int{bits}": Recipe(weights="int", bits=bits, **static) for bits in (8, 4, 3, 2)}
    return named | {"ternary": Recipe(weights="absmean", **static)}


class Digits(NamedTuple):
    """Images fp32 ``[n, 1, 8, 8]`` in [-1, 1] and labels int64 ``[n]``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits() -> Digits:
    """The data, always split the same way."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits((images[train], labels[train]), (images[test], labels[test]))


def network() -> nn.Sequential:
    """Three convolutions with batch norm, two linear layers: 40 thousand weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def train(model: nn.Module, data: Digits, epochs: int, lr: float) -> nn.Module:
    """AdamW with a cosine decay to 0, in place; leaves the model in evaluation mode."""
    images, labels = data.train
    steps = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH)[: len(labels) // BATCH]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, data: Digits) -> Tensor:
    """Logits of the test images, fp32 ``[n, 10]``."""
    return model.eval()(data.test[0])


def accuracy(logits: Tensor, data: Digits) -> float:
    """Share of the test images whose largest logit is the label's."""
    return round((logits.argmax(1) == data.test[1]).double().mean().item(), 4)


def pretrain(seed: int, data: Digits, epochs: int = EPOCHS) -> nn.Module:
    """The network in full precision, trained and its batch norms folded."""
    torch.manual_seed(seed)
    return fold_batch_norm(train(network(), data, epochs, LR))


def quantized(
    model: nn.Module, recipe: Recipe, data: Digits, epochs: int, seed: int
) -> tuple[nn.Module, nn.Module]:
    """A copy of the model, calibrated, trained for ``epochs`` (0: PTQ), and its integer form."""
    fake = prepare(copy.deepcopy(model), recipe)
    calibrate(fake, data.train[0][:CALIBRATION].split(BATCH))
    torch.manual_seed(seed)
    if epochs:
        train(fake, data, epochs, LR / 10)
    return fake.eval(), convert(copy.deepcopy(fake)).eval()


def measure(seed: int, data: Digits) -> list[dict[str, str | int | float]]:
    """All rows of a seed."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    head = {"commit": commit, "torch": torch.__version__, "seed": seed}
    model = pretrain(seed, data)
    more = copy.deepcopy(model)
    torch.manual_seed(seed)
    train(more, data, MORE_EPOCHS, LR / 10)
    rows: list[dict[str, str | int | float]] = [
        head | {"weights": "fp32", "method": method, "accuracy": accuracy(outputs(m, data), data)}
        for method, m in (("fp", model), ("fp+", more))
    ]
    for weights, recipe in recipes().items():
        for method, epochs in (("ptq", 0), ("qat", MORE_EPOCHS)):
            fake, integer = quantized(model, recipe, data, epochs, seed)
            expected, found = outputs(fake, data), outputs(integer, data)
            rows.append(
                head
                | {
                    "weights": weights,
                    "method": method,
                    "accuracy": accuracy(expected, data),
                    "integer_accuracy": accuracy(found, data),
                    "equal_outputs": int((expected == found).all(1).sum()),
                    "images": len(found),
                    "fp32_bytes": size_report(fake).total.fp32,
                    "stored_bytes": size_report(integer).total.stored,
                }
            )
    return rows


def table() -> str:
    """The table of docs/qat.md, from the CSV: medians over the seeds, and their range."""
    with CSV.open() as file:
        rows = list(csv.DictReader(file))

    def values(weights: str, method: str, key: str = "accuracy") -> list[float]:
        found = [r for r in rows if (r["weights"], r["method"]) == (weights, method)]
        return sorted(float(row[key]) for row in found)

    def percent(accuracies: list[float]) -> str:
        low, high = 100 * accuracies[0], 100 * accuracies[-1]
        return f"{100 * statistics.median(accuracies):.1f}% ({low:.1f} to {high:.1f})"

    lines = [
        "| weights | PTQ | QAT | the same in integers | outputs equal, bit for bit | bytes |",
        "|---|---|---|---|---|---|",
    ]
    fp32 = statistics.median(values("int8", "ptq", "fp32_bytes"))
    lines.append(f"| fp32 | {percent(values('fp32', 'fp'))} | | | | {fp32:,.0f} |")
    lines.append(f"| fp32, trained as long as QAT | {percent(values('fp32', 'fp+'))} | | | | |")
    for weights in dict.fromkeys(row["weights"] for row in rows if row["weights"] != "fp32"):
        both = [int(v) for m in ("ptq", "qat") for v in values(weights, m, "equal_outputs")]
        images = [int(v) for m in ("ptq", "qat") for v in values(weights, m, "images")]
        stored = statistics.median(values(weights, "qat", "stored_bytes"))
        lines.append(
            f"| {weights} | {percent(values(weights, 'ptq'))} | {percent(values(weights, 'qat'))} "
            f"| {percent(values(weights, 'qat', 'integer_accuracy'))} "
            f"| {sum(both):,} of {sum(images):,} | {stored:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all, or print the table."""
    if sys.argv[1:] == ["table"]:
        print(table())
        return
    data = digits()
    rows = [row for seed in SEEDS for row in measure(seed, data)]
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    print(table())


if __name__ == "__main__":
    main()
