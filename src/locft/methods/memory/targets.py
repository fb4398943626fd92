"""Target vectors: what a layer should hand on at a subject's last token for the target to follow.

Source: Meng et al. (2022), equation 4 (ROME); Meng et al. (2023), section 4.3 (MEMIT). Many edits are
optimised at a time, each as if alone, from cached states of the layers below.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from locft.errors import ConfigError, TrainingError
from locft.methods.base import EditorPlan
from locft.methods.memory.requests import Request
from locft.methods.memory.site import Site, Splits
from locft.model.attention import Past, States, behind, kept_states
from locft.model.packing import Packed, lay_out_ends, merge_prefixes
from locft.model.split import Split
from locft.progress import progress

_CLOSE_ENOUGH = 0.05  # a loss under which an edit is done
_TOKENS_PER_PASS = 1024


@dataclass(frozen=True, kw_only=True)
class Search:
    """How target vectors are looked for.

    Attributes:
        at: ``block`` adds to what the layer returns (MEMIT), ``mlp`` to what its MLP's down projection
            does (ROME).
        num_passes: The most passes; an edit takes a step after each but the last.
        lr: Adam's learning rate.
        is_relative: Whether it counts in root mean squares of the state that the vector is added to.
        decay: What the length of the added vector costs, beside that of the state.
        clamp: The longest that the added vector may be, beside the state.
        kl: What a change of "SUBJECT is a" costs.
        in_bfloat16: Whether a float32 model's products have bfloat16 factors meanwhile.
    """

    at: Literal["block", "mlp"]
    num_passes: int
    lr: float
    decay: float
    clamp: float
    is_relative: bool = False
    kl: float = 0.0625
    in_bfloat16: bool = False


def search_of(plan: EditorPlan, at: Literal["block", "mlp"]) -> Search:
    """Say how target vectors are looked for, by an editor's settings.

    Raises:
        ConfigError: `step` is neither ``relative`` nor ``absolute``.
    """
    settings = plan.settings
    if settings["step"] not in ("relative", "absolute"):
        raise ConfigError(f"step is {settings['step']!r}: expected relative or absolute")
    return Search(
        at=at,
        num_passes=settings["passes"],
        lr=plan.lr,
        is_relative=settings["step"] == "relative",
        decay=settings["decay"],
        clamp=settings["clamp"],
        in_bfloat16=plan.in_bfloat16,
    )


def find_targets(
    splits: Splits,
    site: Site,
    requests: Sequence[Request],
    search: Search,
    per_pass: int = _TOKENS_PER_PASS,
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
    order = sorted(range(len(requests)), key=lambda index: _num_live(requests[index]))
    found: dict[int, Tensor] = {}
    with progress("looking for target vectors", len(requests), "edits") as step:
        for chunk in _chunks(order, requests, per_pass):
            vectors = _optimise(split, site, [requests[index] for index in chunk], search)
            found |= dict(zip(chunk, vectors, strict=True))
            step(len(chunk))
    return torch.stack([found[index] for index in range(len(requests))])


@dataclass(frozen=True)
class _Line:
    """A row as it is run: without tokens from which nothing is predicted that counts.

    Attributes:
        ids: Its tokens.
        lookup: Index of the subject's last token.
        labels: What is to be predicted, at its last places; nothing for the essence.
    """

    ids: tuple[int, ...]
    lookup: int
    labels: tuple[int, ...]


def _lines_of(request: Request) -> list[_Line]:
    """Give an edit's rows with the target, then its essence."""
    with_target = (request.bare, *request.prefixed)
    lines = [_Line(row.ids[:-1], row.lookup, row.ids[row.target_start :]) for row in with_target]
    essence = request.essence
    return [*lines, _Line(essence.ids[: essence.lookup + 1], essence.lookup, ())]


def _num_live(request: Request) -> int:
    """Count an edit's tokens that the vector can reach."""
    return sum(len(line.ids) - line.lookup for line in _lines_of(request))


def _chunks(order: Sequence[int], requests: Sequence[Request], per_pass: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    num_tokens = 0
    for index in order:
        more = _num_live(requests[index])
        if chunk and num_tokens + more > per_pass:
            yield chunk
            chunk, num_tokens = [], 0
        chunk.append(index)
        num_tokens += more
    yield chunk


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """What is run of A edits, R rows each.

    Attributes:
        packed: The rows, from where they are run on.
        hidden: (N, ...) the states of their nodes at the split.
        past: What stands before them, if they are not run whole.
        lookups: (A R,) the nodes at which subjects end.
        asked: (M,) the nodes that predict target tokens, then (A,) those at which essences end.
        labels: (M,) the target tokens.
        owners: (M,) the edit of each, as a place among the A.
        shares: (M,) its share in that edit's loss.
    """

    packed: Packed
    hidden: Tensor
    past: Past | None
    lookups: Tensor
    asked: Tensor
    labels: Tensor
    owners: Tensor
    shares: Tensor


class _Passes:
    """Passes over the rows of some edits.

    What stands in a row before the subject's last token stays as it is: it is run once, and attention
    keeps what it makes of it. That is two thirds of the tokens where subjects come late. A family
    that cannot be packed has its rows run whole.
    """

    def __init__(self, split: Split, requests: Sequence[Request]) -> None:
        self.split = split
        self.num_rows = 2 + len(requests[0].prefixed)
        self.lines = [line for one in requests for line in _lines_of(one)]
        ids = [line.ids for line in self.lines]
        # No vector is added yet, so what rows begin with alike is one.
        packed, _ = merge_prefixes(ids).pack(range(len(ids)))
        self.whole = packed.to(split.model.device)
        self.hidden = split.prefix(self.whole)
        self.states: States | None = None
        if split.packs(self.whole):
            with torch.no_grad(), split.tail() as tail, kept_states() as self.states:
                tail(self.whole, self.hidden, self.whole.home.new_zeros(1))

    def of(self, active: Sequence[int]) -> _Pass:
        """Lay the rows of some of the edits out."""
        device = self.split.model.device
        numbers = [edit * self.num_rows + row for edit in active for row in range(self.num_rows)]
        lines = [self.lines[number] for number in numbers]
        starts = [0 if self.states is None else line.lookup for line in lines]
        lengths = [len(line.ids) - start for line, start in zip(lines, starts, strict=True)]
        ends = list(accumulate(lengths))  # of each row's nodes
        packed = lay_out_ends([line.ids for line in lines], starts).to(device)
        rows = torch.arange(len(lines)).repeat_interleave(torch.tensor(lengths)).to(device)
        grid = self.whole.grid[torch.tensor(numbers, device=device)]
        hidden = self.hidden[grid[rows, packed.positions]]
        grid[rows, packed.positions] = len(self.whole.ids) + torch.arange(len(rows), device=device)
        asked: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        shares: list[float] = []
        for place, (end, line) in enumerate(zip(ends, lines, strict=True)):
            count = len(line.labels)
            asked += range(end - count, end)
            labels += line.labels
            owners += [place // self.num_rows] * count
            shares += [1 / (count * (self.num_rows - 1)) for _ in line.labels]
        lookups = [end - len(line.ids) + line.lookup for end, line in zip(ends, lines, strict=True)]
        essences = lookups[self.num_rows - 1 :: self.num_rows]
        return _Pass(
            packed=packed,
            hidden=hidden,
            past=None if self.states is None else Past(self.states, grid),
            lookups=torch.tensor(lookups, device=device),
            asked=torch.tensor([*asked, *essences], device=device),
            labels=torch.tensor(labels, device=device),
            owners=torch.tensor(owners, device=device),
            shares=torch.tensor(shares, device=device),
        )


def _optimise(split: Split, site: Site, requests: Sequence[Request], search: Search) -> Tensor:
    """Find the vectors (N, D) of edits that are run at a time."""
    passes = _Passes(split, requests)
    num, device = len(requests), split.model.device
    state: dict[str, Tensor] = {}  # what is to be added where, in this pass; and what was there

    def add(states: Tensor) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        if "first" not in state:
            state["first"] = flat[state["places"]].detach().float()
        added = flat.index_add(0, state["places"], state["vectors"].to(flat.dtype))
        return added.view_as(states)

    active = list(range(num))
    now = passes.of(active)
    vectors = torch.zeros(num, site.matrix.shape[0], device=device)
    means, squares = torch.zeros_like(vectors), torch.zeros_like(vectors)
    kept: Tensor | None = None
    with ExitStack() as undo:
        tail = undo.enter_context(split.tail(in_bfloat16=search.in_bfloat16))
        undo.callback(_listen(split, site, search.at, add).remove)
        for number in range(search.num_passes):
            added = vectors[active].requires_grad_()
            state["places"] = split.places(now.packed).to(device)[now.lookups]
            state["vectors"] = added.repeat_interleave(passes.num_rows, dim=0)
            with behind(now.past):
                logits = tail(now.packed, now.hidden, now.asked)
            num_labels = len(now.labels)
            surprise = cross_entropy(logits[:num_labels].float(), now.labels, reduction="none")
            likelihood = surprise.new_zeros(len(active)).index_add(0, now.owners, surprise * now.shares)
            after = torch.log_softmax(logits[num_labels:], dim=1, dtype=torch.float32)
            if kept is None:
                kept = after.detach()
                first = state["first"].view(num, passes.num_rows, -1)[:, 0]
                lengths = first.norm(dim=1)
                rates = torch.full_like(lengths, search.lr)
                if search.is_relative:
                    rates *= lengths / first.shape[1] ** 0.5
            divergence = (after.exp() * (after - kept[active])).sum(dim=1)
            penalty = _norm(added) / lengths[active] ** 2
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
            [gradient] = torch.autograd.grad(losses.sum(), added)
            if len(going) < len(active):
                active = [active[place] for place in going]
                now = passes.of(active)
            _step(vectors, means, squares, gradient[going], active, number + 1, rates)
            norms = vectors[active].norm(dim=1, keepdim=True)
            most = search.clamp * lengths[active][:, None]
            vectors[active] = torch.where(norms > most, vectors[active] * most / norms, vectors[active])
    return vectors.double().cpu()


def _norm(vectors: Tensor) -> Tensor:
    """Give lengths (A,) whose gradient at zero is zero."""
    squares = (vectors**2).sum(dim=1)
    return torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)


def _step(
    vectors: Tensor,
    means: Tensor,
    squares: Tensor,
    gradient: Tensor,
    active: Sequence[int],
    number: int,
    rates: Tensor,
) -> None:
    """Take a step of Adam for some of the vectors; each has taken part in all before."""
    means[active] = torch.lerp(gradient, means[active], _BETAS[0])
    squares[active] = torch.lerp(gradient**2, squares[active], _BETAS[1])
    mean = means[active] / (1 - _BETAS[0] ** number)
    square = squares[active] / (1 - _BETAS[1] ** number)
    vectors[active] -= rates[active][:, None] * mean / (square.sqrt() + _EPSILON)


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
