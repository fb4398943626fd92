"""UltraEdit: one ridge regression for each matrix, from hidden states and gradients that are normalised.

Source: Gu et al. (2025), UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large
Language Models, equations 3 to 7. The running mean and variance of each feature are kept from batch to
batch. The published code counts the variance within a micro-batch as if it were one row smaller
(``variance=published``); ``exact`` is the variance of all rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from locft.data.encode import Encoded
from locft.errors import ConfigError
from locft.methods.base import Editing, Editor, EditorPlan
from locft.methods.memory.edit import choose_layers
from locft.methods.memory.forms import ridge_update
from locft.methods.memory.requests import Row, pad
from locft.methods.memory.site import Site, Splits, find_sites, restored
from locft.model.packing import lay_out
from locft.model.split import Split
from locft.progress import progress
from locft.train.objective import target_loss
from locft.types import Edit

# Qwen2.5-7B, gate and up.
_PUBLISHED_LAYERS = ((18, 28), (26, 28))
_EPSILON = torch.finfo(torch.float32).eps


class Normaliser:
    """The running mean and spread of features, over all rows so far.

    Args:
        num_features: How many features a row has.
        is_exact: Whether the spread is that of all rows; else as in the published code.
    """

    def __init__(self, num_features: int, *, is_exact: bool = False) -> None:
        self.num = 0
        self.mean = torch.zeros(num_features).double()
        self._squares = torch.zeros(num_features).double()
        self._is_exact = is_exact

    def add(self, rows: Tensor) -> None:
        """Take in a micro-batch (B, F), of two rows at least in the published way."""
        rows = rows.double()
        num, before = len(rows), self.num
        spread = rows.var(dim=0, correction=0 if self._is_exact else 1) * num
        gone = rows.mean(dim=0) - self.mean
        self._squares += spread + before * num / (before + num) * gone**2
        self.mean += num / (before + num) * gone
        self.num += num

    @property
    def deviation(self) -> Tensor:
        """(F,) the standard deviation of each feature."""
        return (self._squares / max(1, self.num - 1)).sqrt()

    def normalise(self, rows: Tensor) -> Tensor:
        """Give rows (B, F) with a mean of 0 and a deviation of 1."""
        return (rows.double() - self.mean) / (self.deviation + _EPSILON)


def steps_of(inputs: Tensor, gradients: Tensor, normaliser: Normaliser, rate: float) -> Tensor:
    """Give what each row's output is to change by: -rate |h|^2 g, of normalised h and g.

    Args:
        inputs: (T, K) h.
        gradients: (T, O) g, of the loss by the output.
        normaliser: Of [h, g].
        rate: How far to go.

    Returns:
        (T, O) float64.
    """
    rows = normaliser.normalise(torch.cat([inputs, gradients], dim=1))
    normal, directions = rows[:, : inputs.shape[1]], rows[:, inputs.shape[1] :]
    return -rate * (normal**2).sum(dim=1, keepdim=True) * directions


def _choose_sites(model: PreTrainedModel, settings: dict[str, Any]) -> list[Site]:
    """Find gate and up projections, or down projections, of the layers."""
    layers = choose_layers(model, settings["layers"], _PUBLISHED_LAYERS)
    if settings["module"] == "down":
        return [site for layer in layers for site in find_sites(model, layer, "mlp.down")]
    if settings["module"] != "up":
        raise ConfigError(f"module is {settings['module']!r}: expected up (gate and up) or down")
    sites = []
    for layer in layers:
        down = {site.name for site in find_sites(model, layer, "mlp.down")}
        sites += [site for site in find_sites(model, layer, "mlp") if site.name not in down]
    return sites


@contextmanager
def _open(model: PreTrainedModel, plan: EditorPlan) -> Iterator[Editing]:
    settings = dict(plan.settings)
    if settings["variance"] not in ("published", "exact"):
        raise ConfigError(f"variance is {settings['variance']!r}: expected published or exact")
    sites = _choose_sites(model, settings)
    split = Splits(model).at(sites[0].layer)
    normalisers: dict[tuple[int, ...], Normaliser] = {}

    def insert(edits: Sequence[Edit]) -> None:
        examples = sorted((plan.codec.encode(edit) for edit in edits), key=lambda one: len(one.ids))
        inputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        gradients: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        size = settings["micro_batch"]
        with progress("taking gradients", len(examples), "edits") as step:
            for first in range(0, len(examples), size):
                batch = examples[first : first + size]
                for site, rows, of_rows in _gradients(split, sites, batch):
                    inputs[site.name].append(rows)
                    gradients[site.name].append(of_rows)
                    shape = tuple(site.matrix.shape)
                    if shape not in normalisers:
                        is_exact = settings["variance"] == "exact"
                        normalisers[shape] = Normaliser(sum(shape), is_exact=is_exact)
                    normalisers[shape].add(torch.cat([rows, of_rows], dim=1))
                step(len(batch))
        # All of them at the same weights.
        for site in sites:
            rows = torch.cat(inputs[site.name])
            normaliser = normalisers[tuple(site.matrix.shape)]
            steps = steps_of(rows, torch.cat(gradients[site.name]), normaliser, settings["rate"])
            site.add(ridge_update(rows.double(), steps))

    with restored(sites):
        yield Editing(
            insert=insert,
            values=lambda: {site.name: site.parameter.detach().clone() for site in sites},
            num_parameters=sum(site.parameter.numel() for site in sites),
            notes={"matrices": [site.name for site in sites]},
        )


def _gradients(
    split: Split, sites: Sequence[Site], examples: Sequence[Encoded]
) -> list[tuple[Site, Tensor, Tensor]]:
    """Take inputs (T, K) and gradients by outputs (T, O) at the places that predict targets."""
    rows = [Row(ids=one.ids, target_start=one.target_start, lookup=0) for one in examples]
    padded = pad(rows, split.model.device)
    packed = lay_out(padded.ids.cpu()).to(split.model.device)
    length = padded.ids.shape[1]
    asked: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    for number, one in enumerate(examples):
        tokens = one.ids[one.target_start :]
        first = number * length + one.target_start - 1
        asked += range(first, first + len(tokens))
        labels += tokens
        owners += [number] * len(tokens)
    device = split.model.device
    places = split.places(packed)[torch.tensor(asked)].to(device)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str, args: tuple[Any, ...], out: Tensor) -> None:
        if not out.requires_grad:
            out.requires_grad_()  # the lowest ones: nothing below them has a gradient
        seen[name] = (args[0].detach(), out)

    hidden = split.prefix(packed)
    with ExitStack() as undo, torch.enable_grad():
        tail = undo.enter_context(split.tail())
        for site in sites:
            hook = site.module.register_forward_hook(
                lambda _, args, out, name=site.name: listen(name, args, out)
            )
            undo.callback(hook.remove)
        logits = tail(packed, hidden, torch.tensor(asked, device=device))
        loss = target_loss(
            logits, torch.tensor(labels, device=device), torch.tensor(owners, device=device), "token"
        )
        found = torch.autograd.grad(loss, [seen[site.name][1] for site in sites])
    return [
        (
            site,
            seen[site.name][0].reshape(-1, seen[site.name][0].shape[-1])[places].float().cpu(),
            gradient.reshape(-1, gradient.shape[-1])[places].float().cpu(),
        )
        for site, gradient in zip(sites, found, strict=True)
    ]


METHOD = Editor(
    name="ultraedit",
    title="one ridge regression for each matrix",
    open=_open,
    lr=1.0,
    settings={
        "layers": "auto",
        "module": "up",
        "rate": 1e-6,
        "micro_batch": 10,
        "variance": "published",
    },
    needs_subject=False,
    needs_text=False,
)
