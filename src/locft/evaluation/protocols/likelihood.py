"""Protocol ``likelihood``: CounterFact's scores, which compare the new answer with the old one."""

from collections.abc import Sequence

from locft.evaluation.protocols.base import Measurable, Protocol
from locft.evaluation.scoring import Item, Result


def measure(model: Measurable, items: Sequence[Item]) -> list[Result]:
    """Ask whether the new answer is likelier than the old one, by mean log-likelihood per token.

    Efficacy: after the prompt. Paraphrase: after a rephrase. Neighbourhood: after a locality prompt the
    old answer is likelier than the new one; that says something where the old answer is right there, as
    it is in CounterFact. A tie counts as not likelier.

    Source: Meng et al., Locating and Editing Factual Associations in GPT (NeurIPS 2022, arXiv
    2202.05262), section 3.3: efficacy, paraphrase and neighborhood scores, with means as in its code.
    """
    found = model.continuations(
        [(item.prompt, text) for item in items for text in (item.target, item.old or "")]
    )
    results: list[Result] = []
    for item in items:
        new = found[item.prompt, item.target].mean_nll
        old = found[item.prompt, item.old or ""].mean_nll
        if new is None or old is None:
            results.append(Result(score=None))
            continue
        is_likelier = old < new if item.kind == "locality" else new < old
        results.append(Result(score=float(is_likelier), details={"nll_target": new, "nll_old": old}))
    return results


PROTOCOL = Protocol(
    name="likelihood",
    measure=measure,
    score_names={
        "reliability": "efficacy",
        "generalization": "paraphrase",
        "locality": "neighbourhood",
    },
    meanings={
        "efficacy": "prompts after which the target is likelier than the old answer",
        "paraphrase": "rephrases after which the target is likelier than the old answer",
        "neighbourhood": "other prompts after which the old answer is likelier than the target",
    },
    match="likelier by mean negative log-likelihood per token",
    needs_logits=True,
    needs_old=True,
)
