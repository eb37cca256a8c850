"""Trains the orientation network and writes model.onnx.

    python train.py SOURCE_A_FOLDER [OUTPUT_FILE]

Needs torch and onnx, which the algorithm itself does not. SOURCE_A_FOLDER holds chest X-rays as JPEG in subfolders. Every picture
is taken to be upright; its seven other turns and mirror images, and the negative of each, are made here. One picture in five (by
file, so no turned copy crosses over) is kept aside to say when to stop. Seed 7; a rerun on the same machine gives the same file.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

PACKAGE = Path(__file__).parents[1]
sys.path.insert(0, str(PACKAGE / "code"))
from chest_xray_measures import SIDE, grey, shrunk  # noqa: E402

SEED = 7
EPOCHS = 150
CHANNELS = (8, 16, 24, 32)
TURNS = 8


def main() -> None:
    """Train, keep the best epoch by the pictures set aside, write the ONNX file."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    rng = np.random.default_rng(SEED)
    pictures = read(Path(sys.argv[1]))
    order = rng.permutation(len(pictures))
    kept_aside, used = pictures[order[: len(order) // 5]], pictures[order[len(order) // 5 :]]
    network = fit(used, kept_aside, rng)
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else PACKAGE / "model.onnx"
    onnx.save(as_onnx(network), target)


def read(folder: Path) -> NDArray[np.float32]:
    """Every JPEG below ``folder`` as (pictures, 192, 192): larger than the network's side, so that cuts can be made."""
    made = []
    for path in sorted(folder.rglob("*.jpg")):
        small = Image.fromarray(grey(np.asarray(Image.open(path)), False)).resize((192, 192), Image.Resampling.BOX)
        made.append(np.asarray(small, dtype=np.float32))
    return np.stack(made)


def turned(picture: NDArray[np.float32], turn: int) -> NDArray[np.float32]:
    """Turn 0..7: mirrored when 4 or more, then turned counter-clockwise by 90 degrees (turn mod 4) times."""
    return np.rot90(picture[:, ::-1] if turn >= 4 else picture, turn % 4)


def varied(picture: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Another cut, tilt, gamma, noise and a black border: what differs between machines, not between turns."""
    rows, columns = picture.shape
    image = Image.fromarray(picture).rotate(float(rng.normal(0, 4)), Image.Resampling.BILINEAR)
    top, bottom, left, right = (int(share * rows) for share in rng.uniform(-0.06, 0.1, 4))
    image = image.crop((left, top, columns - right, rows - bottom))
    small = shrunk(np.asarray(image, dtype=np.float32))
    small = small ** float(np.exp(rng.normal(0, 0.35)))
    noise: NDArray[np.float32] = (small + rng.normal(0, 0.02, small.shape)).astype(np.float32)
    return np.clip(noise, 0, 1)


def batch(pictures: NDArray[np.float32], rng: np.random.Generator | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every picture once in a random turn and maybe negative (rng), or in all sixteen ways as it is (None)."""
    made, turns, negatives = [], [], []
    for picture in pictures:
        ways = [(int(rng.integers(TURNS)), int(rng.integers(2)))] if rng else [(turn, n) for turn in range(TURNS) for n in (0, 1)]
        small = varied(picture, rng) if rng else shrunk(picture)
        for turn, negative in ways:
            made.append(turned(1 - small if negative else small, turn))
            turns.append(turn)
            negatives.append(negative)
    stacked = torch.from_numpy(np.stack(made).copy())[:, None]
    return stacked, torch.tensor(turns), torch.tensor(negatives, dtype=torch.float32)


class Network(nn.Module):
    """Four convolutions with pooling, then turn (8 logits) and negative (1 logit)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, *CHANNELS)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.last = nn.Linear(CHANNELS[-1] * (SIDE // 2 ** len(CHANNELS)) ** 2, TURNS + 1)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, 1, 64, 64) → (n, 8) and (n,) logits."""
        x = x - 0.5
        for convolution in self.convolutions:
            x = torch.max_pool2d(torch.relu(convolution(x)), 2)
        out = self.last(self.dropout(x.flatten(1)))
        return out[:, :TURNS], out[:, TURNS]


def fit(used: NDArray[np.float32], kept_aside: NDArray[np.float32], rng: np.random.Generator) -> Network:
    """The network of the epoch that did best on the pictures kept aside."""
    network = Network()
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=EPOCHS * 24)
    best, best_loss = {name: value.clone() for name, value in network.state_dict().items()}, float("inf")
    for epoch in range(EPOCHS):
        network.train()
        x, turn, negative = (torch.cat(parts) for parts in zip(*(batch(used, rng) for _ in range(4)), strict=True))
        for chosen in torch.randperm(len(x)).tensor_split(24):
            loss = _loss(network, x[chosen], turn[chosen], negative[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            aside = float(_loss(network, *batch(kept_aside, None)))
        if aside < best_loss:
            best, best_loss = {name: value.clone() for name, value in network.state_dict().items()}, aside
            sys.stderr.write(f"epoch {epoch} loss {aside:.4f}\n")
    network.load_state_dict(best)
    return network


def _loss(network: Network, x: torch.Tensor, turn: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    turns, negatives = network(x)
    return nn.functional.cross_entropy(turns, turn) + nn.functional.binary_cross_entropy_with_logits(negatives, negative)


def as_onnx(network: Network) -> onnx.ModelProto:
    """The network as an ONNX graph, written node by node: input ``picture``, outputs ``turn`` (n, 8) and ``negative`` (n, 1)."""
    nodes = [helper.make_node("Sub", ["picture", "half"], ["x0"])]
    weights = [numpy_helper.from_array(np.array(0.5, np.float32), "half")]
    for index, convolution in enumerate(network.convolutions):
        for name, value in (("w", convolution.weight), ("b", convolution.bias)):
            weights.append(numpy_helper.from_array(value.detach().numpy(), f"{name}{index}"))
        nodes += [
            helper.make_node(
                "Conv", [f"x{index}", f"w{index}", f"b{index}"], [f"c{index}"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]
            ),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"]),
            helper.make_node("MaxPool", [f"r{index}"], [f"x{index + 1}"], kernel_shape=[2, 2], strides=[2, 2]),
        ]
    weights += [
        numpy_helper.from_array(network.last.weight.detach().numpy(), "w"),
        numpy_helper.from_array(network.last.bias.detach().numpy(), "b"),
        numpy_helper.from_array(np.array([TURNS, 1], np.int64), "parts"),
    ]
    nodes += [
        helper.make_node("Flatten", [f"x{len(network.convolutions)}"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["both"], transB=1),
        helper.make_node("Split", ["both", "parts"], ["turns", "negatives"], axis=1),
        helper.make_node("Softmax", ["turns"], ["turn"], axis=1),
        helper.make_node("Sigmoid", ["negatives"], ["negative"]),
    ]
    picture = helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["n", 1, SIDE, SIDE])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("turn", TURNS), ("negative", 1))
    ]
    graph = helper.make_graph(nodes, "chest-xray-orientation", [picture], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="caregrid")
    onnx.checker.check_model(model)
    return model


if __name__ == "__main__":
    main()
