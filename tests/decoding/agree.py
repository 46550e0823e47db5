"""Comparison of the results of the decoder and of the oracle."""

import numpy as np

from illada_jax.config import DecodeConfig
from illada_jax.decoding import Decoder
from tests import reference
from tests.decoding.toys import IDS

NEAR = 1e-5


def assert_agree(networks, settings: DecodeConfig, prompts, infill: bool = False, max_length: int = 96,
                 exact_ties: bool = True, **arguments) -> int:
    """Asserts that all rows equal the oracle's; returns how many may differ because of a near-tie (design law 3).

    On tables equal candidates are equal in both programs (`exact_ties`); on networks they are near-ties too.
    """
    logits_fn, network = networks
    decoder = Decoder(logits_fn, settings, IDS, max_length, **arguments)
    results = decoder.generate(prompts, infill)
    near_ties = 0
    for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        trace = reference.decode(network, prompt, settings, IDS, row, infill)
        if trace.closest < NEAR or (trace.tied and not exact_ties):
            near_ties += 1
            continue
        start = 0 if infill else len(prompt)
        written = trace.canvas[start:]
        ends = {IDS.eos, *settings.stop_ids} if not infill else set()
        end = next((n for n, id_ in enumerate(written) if id_ in ends), len(written))
        assert result.tokens == written[:end], f"row {row}"
        assert result.reveal_step == trace.reveal_step[start : start + end], f"row {row}"
        stopped_by = "length" if end == len(written) else "eos" if written[end] == IDS.eos else "stop_id"
        assert result.stopped_by == ("filled" if infill else stopped_by), f"row {row}"
        assert result.nfe == trace.steps * (2 if settings.cfg_scale else 1), f"row {row}"
        np.testing.assert_allclose(result.log_probs, trace.log_prob[start : start + end], rtol=1e-4, atol=1e-5)
    return near_ties
