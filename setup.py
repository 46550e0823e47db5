"""Installs illada_jax. `pip install .` is enough on a CPU; extras add accelerators and tools."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent

setup(
    name="illada_jax",
    version="0.1.0",
    description="iLLaDA, a masked diffusion language model, in JAX for TPU: training, decoding, evaluation.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["illada_jax", "illada_jax.*"]),
    package_data={"illada_jax": ["glossary.md", "demo/*.md", "demo/*/*"],
                  "illada_jax.tracing": ["page.html", "page.css", "page.js"]},
    # Read by versions of lm-eval after 0.4.13: `lm_eval --model illada_jax`.
    entry_points={
        "console_scripts": ["illada = illada_jax.__main__:main"],
        "lm_eval.models": ["illada_jax = illada_jax.evaluation.lm_eval_cli:IlladaJax"],
    },
    install_requires=[
        "absl-py",
        "array_record",
        "chex",
        "etils[epath]",
        "filelock>=4",
        "flax",
        "grain",
        "jax",
        "jinja2",
        "ml_collections",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "rich",
        "safetensors",
        "sentencepiece",
        "tensorboardX",
        "tokenizers",
        "tqdm",
        "zstandard",
    ],
    extras_require={
        "test": ["hypothesis", "pytest", "pytest-xdist"],
        "dev": ["ruff"],
        "docs": ["pdoc"],
        "tpu": ["gcsfs", "jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "eval": ["lm_eval[math]>=0.4.13,<0.5"],
        "hub": ["huggingface_hub"],
        "prepare": ["apache-beam"],
        "parquet": ["pyarrow"],
        "plot": ["matplotlib"],
        "colab": ["ipykernel", "jupytext", "matplotlib", "nbclient"],
    },
)
