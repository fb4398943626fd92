"""Target vectors: what a layer should hand on at a subject's last token for the target to follow.

Source: Meng et al. (2022), equation 4 (ROME); Meng et al. (2023), section 4.3 (MEMIT). Many edits are
optimised at a time, each as if alone, from cached states of the layers below.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from locft.errors import TrainingError
from locft.methods.memory.requests import Request, pad
from locft.methods.memory.site import TOKENS_PER_PASS, Site, Splits
from locft.model.packing import lay_out
from locft.model.split import Split, Tail
from locft.progress import progress

_CLOSE_ENOUGH = 0.05  # a loss under which an edit is done


@dataclass(frozen=True, kw_only=True)
class Search:
    """How target vectors are looked for.

    Attributes:
        at: ``block`` adds to what the layer returns (MEMIT), ``mlp`` to what its MLP's down projection
            does (ROME).
        num_passes: The most passes; an edit takes a step after each but the last.
        lr: Adam's learning rate.
        decay: What the length of the added vector costs, beside that of the state.
        clamp: The longest that the added vector may be, beside the state.
        kl: What a change of "SUBJECT is a" costs.
    """

    at: Literal["block", "mlp"]
    num_passes: int
    lr: float
    decay: float
    clamp: float
    kl: float = 0.0625


def find_targets(
    splits: Splits,
    site: Site,
    requests: Sequence[Request],
    search: Search,
    per_pass: int = TOKENS_PER_PASS,
) -> Tensor:
    """Find what is to be added at each edit's subject.

    Args:
        splits: The model, as it is before this batch of edits.
        site: Where.
        requests: The edits.
        search: How.
        per_pass: How many tokens to run at a time; it changes the time, not the result.

    Returns:
        (N, D) float64, on the CPU: what to add to the state at the site, in the order of the edits.

    Raises:
        TrainingError: A loss is not finite.
    """
    split = splits.at(site.layer + (search.at == "block"))
    order = sorted(range(len(requests)), key=lambda index: _width(requests[index]))
    found: dict[int, Tensor] = {}
    with progress("looking for target vectors", len(requests), "edits") as step:
        for chunk in _chunks(order, requests, per_pass):
            vectors = _optimise(split, site, [requests[index] for index in chunk], search)
            found |= dict(zip(chunk, vectors, strict=True))
            step(len(chunk))
    return torch.stack([found[index] for index in range(len(requests))])


def _width(request: Request) -> int:
    return max(len(row.ids) for row in (request.bare, *request.prefixed, request.essence))


def _chunks(order: Sequence[int], requests: Sequence[Request], per_pass: int) -> Iterator[list[int]]:
    """Put edits of like length together."""
    chunk: list[int] = []
    for index in order:  # the longest last
        rows = 2 + len(requests[index].prefixed)
        if chunk and (len(chunk) + 1) * rows * _width(requests[index]) > per_pass:
            yield chunk
            chunk = []
        chunk.append(index)
    yield chunk


class _Passes:
    """Passes over the rows of some edits: of each edit its rows with the target, then its essence."""

    def __init__(self, split: Split, requests: Sequence[Request]) -> None:
        self.split = split
        self.num_rows = 2 + len(requests[0].prefixed)
        rows = [row for one in requests for row in (one.bare, *one.prefixed, one.essence)]
        # Nothing is predicted from the last token, which is an end of sequence; the essence has none.
        padded = pad(rows, split.model.device)
        self.ids, self.lookup = padded.ids, padded.lookup
        self.targets = [
            (row.target_start - 1, row.ids[row.target_start :])
            for one in requests
            for row in (one.bare, *one.prefixed)
        ]
        packed = lay_out(self.ids.cpu()).to(split.model.device)
        hidden = split.prefix(packed)
        self.hidden = hidden.view(*self.ids.shape, *hidden.shape[1:])

    def logits(self, tail: Tail, active: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the rows of some of the edits.

        Args:
            tail: Runs the layers from the split on.
            active: The edits.

        Returns:
            (M, V) logits at the target tokens of all rows, (M,) the target tokens, (M,) the share of
            each in its edit's loss, and (A, V) logits at the essences' subjects.
        """
        device = self.ids.device
        length = self.ids.shape[1]
        rows = [edit * self.num_rows + row for edit in active for row in range(self.num_rows)]
        asked: list[int] = []
        labels: list[int] = []
        shares: list[float] = []
        num_templates = self.num_rows - 1
        for place, edit in enumerate(active):
            for row in range(num_templates):
                first, tokens = self.targets[edit * num_templates + row]
                begin = (place * self.num_rows + row) * length + first
                asked += range(begin, begin + len(tokens))
                labels += tokens
                shares += [1 / (num_templates * len(tokens))] * len(tokens)
        num_targets = len(asked)
        last = torch.arange(1, len(active) + 1, device=device) * self.num_rows - 1
        essences = last * length + self.lookup[rows][last]
        packed = lay_out(self.ids[rows].cpu()).to(device)
        logits = tail(
            packed,
            self.hidden[rows].flatten(0, 1),
            torch.cat([torch.tensor(asked, device=device), essences]),
        )
        return (
            logits[:num_targets],
            torch.tensor(labels, device=device),
            torch.tensor(shares, device=device),
            logits[num_targets:],
        )

    def places(self, active: Sequence[int]) -> Tensor:
        """Give the place (A * rows,) of the subject's last token in each row, among all their tokens."""
        rows = torch.tensor(
            [edit * self.num_rows + row for edit in active for row in range(self.num_rows)],
            device=self.ids.device,
        )
        return torch.arange(len(rows), device=rows.device) * self.ids.shape[1] + self.lookup[rows]


def _optimise(split: Split, site: Site, requests: Sequence[Request], search: Search) -> Tensor:
    """Find the vectors (N, D) of edits that are run at a time."""
    passes = _Passes(split, requests)
    num = len(requests)
    state: dict[str, Tensor] = {}  # what is to be added where, in this pass; and what was there

    def add(states: Tensor) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        if "first" not in state:
            state["first"] = flat[state["places"]].detach().float()
        added = flat.index_add(0, state["places"], state["vectors"].to(flat.dtype))
        return added.view_as(states)

    active = list(range(num))
    width = site.matrix.shape[0]
    vectors = torch.zeros(num, width, device=split.model.device)
    means, squares = torch.zeros_like(vectors), torch.zeros_like(vectors)
    kept: Tensor | None = None
    with ExitStack() as undo:
        tail = undo.enter_context(split.tail())
        undo.callback(_listen(split, site, search.at, add).remove)
        for number in range(search.num_passes):
            now = vectors[active].requires_grad_()
            state["places"] = passes.places(active)
            state["vectors"] = now.repeat_interleave(passes.num_rows, dim=0)
            logits, labels, shares, essences = passes.logits(tail, active)
            scores = torch.log_softmax(logits, dim=1, dtype=torch.float32)
            scores = scores.gather(1, labels[:, None])[:, 0]
            owners = _owners(passes, active).to(labels.device)
            likelihood = torch.zeros(len(active), device=labels.device).index_add(
                0, owners, -scores * shares
            )
            after = torch.log_softmax(essences, dim=1, dtype=torch.float32)
            if kept is None:
                kept = after.detach()
                first = state["first"].view(num, passes.num_rows, -1)[:, 0]
                lengths = first.norm(dim=1)
            divergence = (after.exp() * (after - kept[active])).sum(dim=1)
            penalty = _norm(now) / lengths[active] ** 2
            losses = likelihood + search.kl * divergence + search.decay * penalty
            if not losses.isfinite().all():
                raise TrainingError(
                    f"no target vector for layer {site.layer}: the loss is not finite in pass "
                    f"{number + 1}. Try a lower learning rate (lr)"
                )
            if number == search.num_passes - 1:
                break
            going = [place for place, loss in enumerate(losses.tolist()) if loss >= _CLOSE_ENOUGH]
            if not going:
                break
            [gradient] = torch.autograd.grad(losses.sum(), now)
            active = [active[place] for place in going]
            _step(vectors, means, squares, gradient[going], active, number + 1, search.lr)
            norms = vectors[active].norm(dim=1, keepdim=True)
            most = search.clamp * lengths[active][:, None]
            vectors[active] = torch.where(norms > most, vectors[active] * most / norms, vectors[active])
    return vectors.double().cpu()


def _norm(vectors: Tensor) -> Tensor:
    """Give lengths (A,) whose gradient at zero is zero."""
    squares = (vectors**2).sum(dim=1)
    return torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)


def _owners(passes: _Passes, active: Sequence[int]) -> Tensor:
    """Say which edit each target token belongs to, as a place among the active ones."""
    templates = passes.num_rows - 1
    return torch.tensor(
        [
            place
            for place, edit in enumerate(active)
            for row in range(templates)
            for _ in passes.targets[edit * templates + row][1]
        ]
    )


def _step(
    vectors: Tensor,
    means: Tensor,
    squares: Tensor,
    gradient: Tensor,
    active: Sequence[int],
    number: int,
    lr: float,
) -> None:
    """Take a step of Adam for some of the vectors; each has taken part in all before."""
    means[active] = torch.lerp(gradient, means[active], _BETAS[0])
    squares[active] = torch.lerp(gradient**2, squares[active], _BETAS[1])
    mean = means[active] / (1 - _BETAS[0] ** number)
    square = squares[active] / (1 - _BETAS[1] ** number)
    vectors[active] -= lr * mean / (square.sqrt() + _EPSILON)


_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


def _listen(split: Split, site: Site, at: str, add: Callable[[Tensor], Tensor]) -> Any:
    """Let `add` change what is handed on at the site."""
    if at == "mlp":
        return site.module.register_forward_hook(lambda _, __, out: add(out))

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (add(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": add(kwargs["hidden_states"])}

    return split.layers.modules[split.layer].register_forward_pre_hook(enter, with_kwargs=True)
