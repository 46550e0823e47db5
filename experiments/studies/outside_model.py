"""The scorers on an outside network: the masked language model of chemical reactions inside rxnmapper.

  pip install torch==2.13.0 && pip install --no-deps rxnmapper==0.4.3
  python experiments/studies/outside_model.py

An ALBERT of 0.8 M parameters, trained to fill in masked pieces of reactions (Schwaller et al., 2021). Its forward pass
is written here in JAX as a `logits_fn`; nothing else is needed, as decoder and scorers take any network. The context is
the reactants, the candidates are the true product and corruptions of it: one piece replaced by another common one, or
two neighbours swapped. A score is right if it ranks the truth above the corruption.
"""

import importlib.util
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from illada_jax.decoding import SpecialIds
from illada_jax.scoring import ScoreConfig, Scorer
from illada_jax.scoring.log_probs import LogProbEvaluator, Query

MODEL = "models/transformers/albert_heads_8_uspto_all_1310k"
LAYERS, HEADS, MAX_LENGTH, EPS = 12, 8, 512, 1e-12
CORRUPTIONS = 10  # of each kind for each product
COMMON = ["c", "C", "O", "N", "n", "F", "Cl", "Br", "S", "(", ")", "=", "1", "2"]
# Textbook reactions: ester, amides, ethers, couplings, protections, oxidations, reductions, substitutions, nitration.
REACTIONS = (
    "CC(=O)O.CCO>>CCOC(C)=O",
    "O=C(O)c1ccccc1.CO>>COC(=O)c1ccccc1",
    "O=C(Cl)c1ccccc1.NCc1ccccc1>>O=C(NCc1ccccc1)c1ccccc1",
    "CC(=O)Cl.Nc1ccccc1>>CC(=O)Nc1ccccc1",
    "O=C(O)c1ccc(Br)cc1.C1COCCN1>>O=C(c1ccc(Br)cc1)N1CCOCC1",
    "Oc1ccccc1.BrCc1ccccc1.O=C([O-])[O-].[K+].[K+]>>c1ccc(COc2ccccc2)cc1",
    "COc1ccc(O)cc1.CI.O=C([O-])[O-].[K+].[K+]>>COc1ccc(OC)cc1",
    "Brc1ccccc1.OB(O)c1ccc(F)cc1.O=C([O-])[O-].[Na+].[Na+]>>Fc1ccc(-c2ccccc2)cc1",
    "Brc1ccncc1.OB(O)c1ccccc1.O=C([O-])[O-].[Na+].[Na+]>>c1ccc(-c2ccncc2)cc1",
    "CC(C)(C)OC(=O)NCc1ccccc1.O=C(O)C(F)(F)F>>NCc1ccccc1",
    "CC(C)(C)OC(=O)N1CCN(c2ccccc2)CC1.Cl>>c1ccc(N2CCNCC2)cc1",
    "CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCCc1ccccc1>>CC(C)(C)OC(=O)NCCc1ccccc1",
    "OCc1ccccc1.O=[Mn]=O>>O=Cc1ccccc1",
    "O=Cc1ccc(Cl)cc1.[BH4-].[Na+]>>OCc1ccc(Cl)cc1",
    "CC(=O)c1ccccc1.[BH4-].[Na+]>>CC(O)c1ccccc1",
    "O=[N+]([O-])c1ccc(F)cc1.[H][H].[Pd]>>Nc1ccc(F)cc1",
    "O=[N+]([O-])c1ccc(F)cc1.C1CCNCC1>>O=[N+]([O-])c1ccc(N2CCCCC2)cc1",
    "Fc1cccnc1F.CC(C)S.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "COC(=O)c1ccc(C)cc1.O.[OH-].[Na+]>>Cc1ccc(C(=O)O)cc1",
    "CCOC(=O)CCc1ccccc1.O.[OH-].[Li+]>>O=C(O)CCc1ccccc1",
    "O=Cc1ccccc1.C1COCCN1.CC(=O)O[BH-](OC(C)=O)OC(C)=O.[Na+]>>c1ccc(CN2CCOCC2)cc1",
    "CS(=O)(=O)Cl.Nc1ccc(Br)cc1>>CS(=O)(=O)Nc1ccc(Br)cc1",
    "O=S(=O)(Cl)c1ccccc1.C1CCNC1>>O=S(=O)(c1ccccc1)N1CCCC1",
    "N#Cc1ccc(Br)cc1.OB(O)c1ccccc1.O=C([O-])[O-].[K+].[K+]>>N#Cc1ccc(-c2ccccc2)cc1",
    "O=C=Nc1ccccc1.NC1CCCCC1>>O=C(Nc1ccccc1)NC1CCCCC1",
    "O=C(O)CCCc1ccccc1.O=S(Cl)Cl>>O=C(Cl)CCCc1ccccc1",
    "OCCc1ccccc1.BrP(Br)Br>>BrCCc1ccccc1",
    "Cc1ccccc1.O=C1CCC(=O)N1Br>>BrCc1ccccc1",
)


def logits_fn(params, tokens_BT, positions_BT, segments_BT, query_columns_BQ, cache):
    """ALBERT: one layer twelve times, norms after the residual sums; see `decoding.query.LogitsFn`."""
    def linear(x, name):
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"][None, None]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + EPS)
        return x * params[f"{name}.weight"][None, None] + params[f"{name}.bias"][None, None]

    enter, layer = "albert.embeddings", "albert.encoder.albert_layer_groups.0.albert_layers.0"
    x_BTE = params[f"{enter}.word_embeddings.weight"][tokens_BT]
    x_BTE += params[f"{enter}.position_embeddings.weight"][positions_BT]
    x_BTE += params[f"{enter}.token_type_embeddings.weight"][:1][None]
    x_BTD = linear(norm(x_BTE, f"{enter}.LayerNorm"), "albert.encoder.embedding_hidden_mapping_in")
    bias_BTT = jnp.where(segments_BT[:, :, None] == segments_BT[:, None, :], 0.0, -1e9)

    def once(_, x_BTD):
        q, k, v = (linear(x_BTD, f"{layer}.attention.{part}").reshape(*x_BTD.shape[:2], HEADS, -1)
                   for part in ("query", "key", "value"))
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(q.shape[-1]) + bias_BTT[:, None]
        out_BTD = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores_BNTS), v).reshape(x_BTD.shape)
        x_BTD = norm(x_BTD + linear(out_BTD, f"{layer}.attention.dense"), f"{layer}.attention.LayerNorm")
        hidden_BTF = jax.nn.gelu(linear(x_BTD, f"{layer}.ffn"), approximate=False)
        return norm(x_BTD + linear(hidden_BTF, f"{layer}.ffn_output"), f"{layer}.full_layer_layer_norm")

    x_BTD = jax.lax.fori_loop(0, LAYERS, once, x_BTD)
    x_BQD = jnp.take_along_axis(x_BTD, query_columns_BQ[:, :, None], axis=1)
    x_BQE = norm(jax.nn.gelu(linear(x_BQD, "predictions.dense"), approximate=False), "predictions.LayerNorm")
    return linear(x_BQE, "predictions.decoder"), cache


def load() -> tuple[Partial, dict[str, int]]:
    """The network and its vocabulary, without importing rxnmapper."""
    found = importlib.util.find_spec("rxnmapper")
    if found is None or importlib.util.find_spec("torch") is None:
        sys.exit("error: pip install torch==2.13.0 && pip install --no-deps rxnmapper==0.4.3")
    import torch

    directory = pathlib.Path(found.origin).parent / MODEL
    state = torch.load(directory / "pytorch_model.bin", map_location="cpu", weights_only=True)
    pieces = (directory / "vocab.txt").read_text().split("\n")
    return (Partial(logits_fn, {name: jnp.asarray(x.numpy()) for name, x in state.items()}),
            {piece: number for number, piece in enumerate(pieces)})


def tokenise(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Ids of the pieces of a reaction."""
    return [vocabulary[piece] for piece in re.findall(r"\[[^\]]+\]|Br|Cl|>>|.", text)]


def corruptions(product: list[int], common: list[int], rng: np.random.Generator) -> tuple[list, list]:
    """(With one piece replaced, with two different neighbours swapped), as many of each as there are, at most."""
    replaced = [[*product[:at], other, *product[at + 1 :]] for at in range(len(product)) for other in common
                if other != product[at]]
    swapped = [[*product[:at], product[at + 1], product[at], *product[at + 2 :]] for at in range(len(product) - 1)
               if product[at] != product[at + 1]]
    return tuple([group[i] for i in rng.permutation(len(group))[:CORRUPTIONS]] for group in (replaced, swapped))


def pseudo_likelihood(evaluator: LogProbEvaluator, pairs: list[tuple[list[int], list[int]]],
                      ids: SpecialIds) -> list[float]:
    """Σ log p(piece | all others), each masked alone."""
    queries = []
    for context, candidate in pairs:
        row = np.array([ids.bos, *context, *candidate, ids.eos], np.int32)
        queries += [Query(row, np.array([at]), 1 + len(context)) for at in range(1 + len(context), len(row) - 1)]
    results = iter(evaluator(queries))
    return [sum(float(next(results).log_probs_Q[0]) for _ in candidate) for _, candidate in pairs]


def main() -> None:
    """Prints the table."""
    network, vocabulary = load()
    ids = SpecialIds(mask=vocabulary["[MASK]"], eos=vocabulary["[SEP]"], bos=vocabulary["[CLS]"], pad=0,
                     vocab_size=len(vocabulary))
    rng, common = np.random.default_rng(0), [vocabulary[piece] for piece in COMMON]
    pairs, kinds = [], []
    for reaction in REACTIONS:
        before, _, product = reaction.partition(">>")
        context, product = tokenise(f"{before}>>", vocabulary), tokenise(product, vocabulary)
        groups = corruptions(product, common, rng)
        pairs += [(context, candidate) for candidate in (product, *groups[0], *groups[1])]
        kinds.append([len(group) for group in groups])
    evaluator = LogProbEvaluator(network, ids, MAX_LENGTH, batch_size=64)
    common_settings = {"bos": True, "eos": True, "batch_size": 64}
    scorers = {
        "confidence": Scorer(network, ScoreConfig(**common_settings), ids, MAX_LENGTH),
        "Monte-Carlo, 1": Scorer(network, ScoreConfig("monte_carlo", 1, **common_settings), ids, MAX_LENGTH),
        "Monte-Carlo, 16": Scorer(network, ScoreConfig("monte_carlo", 16, **common_settings), ids, MAX_LENGTH)}
    values = {"pseudo-likelihood": pseudo_likelihood(evaluator, pairs, ids)}
    values |= {name: [score.value for score in scorer.score(pairs)] for name, scorer in scorers.items()}
    counts = {"pseudo-likelihood": evaluator.evaluations}
    counts |= {name: scorer.evaluator.evaluations for name, scorer in scorers.items()}
    print(f"{len(REACTIONS)} reactions; the true product above a corruption of it\n")
    print("| score | one piece replaced | neighbours swapped | best of all | evaluations a candidate |")
    print("|---|---|---|---|---|")
    for name, scores in values.items():
        left, above, best = iter(scores), ([], []), []
        for sizes in kinds:
            truth = next(left)
            rest = [[next(left) for _ in range(size)] for size in sizes]
            for kind, group in zip(above, rest, strict=True):
                kind.append(np.mean([truth > other for other in group]))
            best.append(truth > max(rest[0] + rest[1]))
        cells = [f"{np.mean(x):.3f} ± {np.std(x, ddof=1) / math.sqrt(len(x)):.3f}" for x in (*above, best)]
        print(f"| {name} | {' | '.join(cells)} | {counts[name] / len(pairs):.1f} |", flush=True)


if __name__ == "__main__":
    main()
