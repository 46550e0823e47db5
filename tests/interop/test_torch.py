"""Live comparison with PyTorch: transformers' Llama for iLLaDA's layout, a plain implementation of LLaDA's.

Needs torch and transformers; the goldens (`test_importing.py`) hold the same without them.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the live comparison needs torch and transformers")
pytest.importorskip("transformers", reason="the live comparison needs torch and transformers")

from safetensors.torch import load_file  # noqa: E402

from illada_jax import interop  # noqa: E402
from illada_jax.config import Config, ModelConfig  # noqa: E402
from illada_jax.data.tokenizers import ByteTokenizer  # noqa: E402
from illada_jax.interop.exporting import export_model  # noqa: E402
from illada_jax.interop.families import FAMILIES  # noqa: E402
from illada_jax.training.saved_model import LoadedModel, open_saved_model, save_model  # noqa: E402
from tests.fixtures import make_checkpoints  # noqa: E402
from tests.interop import torch_oracles  # noqa: E402
from tests.interop.util import golden, run, tokenizer_json  # noqa: E402
from tests.util import random_params  # noqa: E402

SIZES = {"illada": {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6},
         "llada": {"d_model": 48, "mlp_hidden_size": 80, "n_layers": 3, "n_heads": 6}}
LENGTHS = np.array([13, 1, 8, 13])


def inputs(vocab_size: int):
    tokens_BL = np.random.default_rng(3).integers(0, vocab_size, (len(LENGTHS), 13))
    return tokens_BL, np.arange(13) < LENGTHS[:, None]


def torch_logits(directory, tokens_BL, real_BL) -> np.ndarray:
    """Logits of the weights in a directory."""
    config = json.loads((directory / "config.json").read_text())
    state = {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}
    return torch_oracles.logits(config, state, torch.from_numpy(tokens_BL), torch.from_numpy(real_BL)).numpy()


def agree(got_BLV, expected_BLV, real_BL, tolerance):
    np.testing.assert_allclose(got_BLV[real_BL], expected_BLV[real_BL], atol=tolerance, rtol=0)
    assert (got_BLV[real_BL].argmax(-1) == expected_BLV[real_BL].argmax(-1)).all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [2, 6], ids=["gqa", "mha"])
@pytest.mark.parametrize("family", ["illada", "llada"])
def test_imported_and_exported_logits_are_those_of_torch(tmp_path, family, kv_heads, tied):
    config = getattr(make_checkpoints, family)(kv_heads, tied) | SIZES[family]
    make_checkpoints.save(tmp_path / "there", config, torch_oracles.random_state(config, seed=11), num_files=2)
    (tmp_path / "there" / "tokenizer.json").write_text(tokenizer_json(family))
    tokens_BL, real_BL = inputs(config["vocab_size"])
    expected_BLV = torch_logits(tmp_path / "there", tokens_BL, real_BL)
    loaded = interop.load_model(tmp_path / "there")
    agree(run(loaded.config.model, loaded.params, tokens_BL, real_BL), expected_BLV, real_BL, 1e-4)
    full_BL = np.ones_like(real_BL)
    agree(run(loaded.config.model, loaded.params, tokens_BL, full_BL),
          torch_logits(tmp_path / "there", tokens_BL, full_BL), full_BL, 1e-4)
    save_model(tmp_path / "here", loaded, False, family)
    export_model(open_saved_model(tmp_path / "here"), tmp_path / "back", FAMILIES[family], np.dtype(np.float32), 50_000)
    agree(torch_logits(tmp_path / "back", tokens_BL, real_BL), expected_BLV, real_BL, 1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["illada", "llada"])
def test_a_model_of_ours_is_the_same_in_torch(tmp_path, family, tied):
    model = ModelConfig(vocab_size=280, d_model=48, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=8, d_ff=80,
                        max_length=64, tied_head=tied)
    params = random_params(model, scale=1.5)
    save_model(tmp_path / "here", LoadedModel(Config(model=model), params, ByteTokenizer(), 0), False, "")
    saved = open_saved_model(tmp_path / "here")
    export_model(saved, tmp_path / "there", FAMILIES[family], np.dtype(np.float32), 50_000)
    tokens_BL, real_BL = inputs(model.vocab_size)
    ours_BLV = run(model, params, tokens_BL, real_BL)
    assert np.abs(ours_BLV).mean() > 0.2
    agree(torch_logits(tmp_path / "there", tokens_BL, real_BL), ours_BLV, real_BL, 1e-5)


@pytest.mark.parametrize("case", make_checkpoints.CASES)
def test_the_goldens_are_what_torch_says(case):
    tokens_BL, real_BL, expected_BLV = golden(case)
    directory = make_checkpoints.HERE / "checkpoints" / case
    # Logits of about 7; other CPUs round otherwise.
    agree(torch_logits(directory, tokens_BL, real_BL), expected_BLV, real_BL, 5e-5)
