"""Installs illada_jax. `pip install .` is enough on a CPU; extras add accelerators and tools."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "illada_jax" / "__init__.py").read_text(encoding="utf-8"), re.M)

setup(
    name="illada_jax",
    version=VERSION.group(1),
    description="Masked diffusion language models (iLLaDA, LLaDA) in JAX: training, decoding, scoring, evaluation.",
    author="The illada_jax developers",
    keywords="jax tpu diffusion language-model masked-diffusion llada illada",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["illada_jax", "illada_jax.*"]),
    package_data={"illada_jax": ["glossary.md", "demo/*.md", "demo/*/*"],
                  "illada_jax.tracing": ["page.html", "page.css", "page.js"]},
    # lm-eval after 0.4.13 reads lm_eval.models: `lm_eval --model illada_jax`.
    entry_points={
        "console_scripts": ["illada = illada_jax.__main__:main"],
        "lm_eval.models": ["illada_jax = illada_jax.evaluation.lm_eval_cli:IlladaJax"],
    },
    install_requires=[
        "absl-py",
        "array_record",
        "chex",
        "etils[epath,epy]",
        "filelock>=4",
        "flax",
        "grain",
        "jax",
        "jinja2>=3.1.6",  # its sandbox had known escapes before
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
        "test": ["hypothesis", "pytest", "pytest-xdist", "setuptools>=70.1"],  # which builds wheels by itself
        "dev": ["ruff"],
        "docs": ["pdoc"],
        "tpu": ["gcsfs", "jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "eval": ["lm_eval[math]>=0.4.13,<0.5"],
        "hub": ["huggingface_hub"],
        "prepare": ["apache-beam"],
        "parquet": ["pyarrow"],
        "plot": ["matplotlib"],
        "wandb": ["wandb", "tensorboard"],
        "colab": ["ipykernel", "jupytext", "matplotlib", "nbclient"],
    },
)
