"""Official weights, checked against the authors' PyTorch code: a table of agreement to post in an issue.

Needs a network that reaches the Hugging Face Hub, 16 GB of disk for each model, and a GPU or TPU with room for it:

    pip install torch transformers==4.57.1 'illada_jax[hub,eval]'    # and JAX for your accelerator
    python experiments/verify_official.py --trust_remote_code --output=verified.json
    python experiments/verify_official.py --trust_remote_code --models=GSAI-ML/LLaDA-8B-Base --gsm8k=0

On ten prompts (Instruct: through the chat template) it compares the ids of the published tokenizer with ours, the
logits of the published network with ours where masks stand behind the prompt, and greedy tokens, one per step, of the
published loop (`benchmarks/torch_llada.py`, on the logits of the published network) with those of our decoder: in
variable length for iLLaDA, in fixed length for LLaDA. Then it scores GSM8K with `illada_jax.evaluate` and the preset of
the published number. PyTorch, JAX and the evaluation run one after the other in processes of their own, so that memory
holds one model at a time.

With --dtype=float32 (twice the memory) expect logits equal to about 1e-3 and tokens equal but for near-ties. In
bfloat16 both networks round, and one near-tie can change the rest of an answer. The evaluation may take hours; it
keeps what is finished in --workdir, and the same command resumes it. A local directory may take the place of a Hub id;
it is prompted through its chat template if its name contains "Instruct".
"""

import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import operator
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath

from illada_jax import api, cli, interop
from illada_jax.data.tokenizers.chat import encode_chat
from illada_jax.errors import InputError
from illada_jax.evaluation.manifest import git_commit
from illada_jax.evaluation.presets import find_preset
from illada_jax.files import write_atomically
from illada_jax.parallel.mesh import parse_mesh

OFFICIAL = [f"GSAI-ML/{family}-8B-{kind}" for family in ("iLLaDA", "LLaDA") for kind in ("Base", "Instruct")]
MODELS = flags.DEFINE_list("models", OFFICIAL, "Hub ids, or directories with weights and modelling code")
TRUST = flags.DEFINE_bool("trust_remote_code", False, "run the Python code that comes with the weights")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "type of params and compute of both networks")
MESH = flags.DEFINE_string("mesh", "", "devices that JAX spreads a model over, such as fsdp=4; default: the first one")
BLOCKS = flags.DEFINE_integer("blocks", 2, "blocks to decode behind each prompt", lower_bound=1)
GSM8K = flags.DEFINE_integer("gsm8k", 50, "items of GSM8K; 0 skips the evaluation", lower_bound=0)
INCLUDE_PATH = flags.DEFINE_string("include_path", "", "tasks of experiments/tasks/prepare.py; default: from the Hub")
WORKDIR = flags.DEFINE_string("workdir", "workdirs/verify_official", "logits of PyTorch, results of the evaluation")
OUTPUT = flags.DEFINE_string("output", "", "JSON file for all results")

PROMPTS = [
    "The capital of France is", "Water boils at a temperature of", "def fibonacci(n):\n", "12 + 30 =",
    "Once upon a time there was a", "The three primary colours are", "Plants need light because",
    "Die Hauptstadt von Deutschland ist", "光合作用是", "The opposite of 'always' is",
]
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.py")
LIBRARIES = ("jax", "jaxlib", "torch", "transformers", "illada_jax")


def main(argv: list[str]) -> None:
    """Verifies model after model; prints the table of those that were finished, even if the next one fails."""
    del argv
    check_requirements()
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    report = {"models": {}, "versions": {"python": platform.python_version(), **versions, "commit": git_commit()}}
    try:
        for name in MODELS.value:
            result = report["models"][name] = {"dtype": DTYPE.value}
            verify(name, result)
            if OUTPUT.value:
                write_atomically(epath.Path(OUTPUT.value), json.dumps(report, indent=1) + "\n")
    finally:
        print(markdown(report))


def check_requirements() -> None:
    """Checks flags and libraries before anything is fetched. Raises InputError."""
    if not TRUST.value:
        raise InputError("--trust_remote_code is required: the published networks are Python code that comes with the "
                         "weights and runs with your rights; read modeling_*.py at https://huggingface.co/MODEL first")
    remote = not all(pathlib.Path(name).is_dir() for name in MODELS.value)
    needed = ["torch", "transformers", *["huggingface_hub"] * remote, *["lm_eval"] * bool(GSM8K.value)]
    missing = [library for library in needed if importlib.util.find_spec(library) is None]
    if missing:
        raise InputError(f"{', '.join(missing)}: not installed; pip install torch transformers==4.57.1 "
                         "'illada_jax[hub,eval]'")


class Comparison(NamedTuple):
    """The inputs of both frameworks.

    Attributes:
      directory: weights, tokenizer and modelling code.
      dtype, mesh: the flags.
      is_chat: the prompts go through the chat template.
      ids: the prompts, tokenized by us.
      canvases: the prompts, filled up with MASK to one length L.
      special_ids: of MASK and EOS, by the names `mask` and `eos`.
      settings: those of our decoder.
      logits_file: logits of the published network, float32 [prompts, L, V].
    """

    directory: pathlib.Path
    dtype: str
    mesh: str
    is_chat: bool
    ids: list[list[int]]
    canvases: list[list[int]]
    special_ids: dict[str, int]
    settings: dict[str, Any]
    logits_file: pathlib.Path


def verify(name: str, result: dict[str, Any]) -> None:
    """Fills in the results of one model, step by step. Raises InputError if a step fails."""
    directory = fetch(name)
    workdir = pathlib.Path(WORKDIR.value) / name.strip("/").replace("/", "--")
    workdir.mkdir(parents=True, exist_ok=True)
    kind = "instruct" if "instruct" in pathlib.Path(name).name.lower() else "base"
    inputs = prepare(directory, kind == "instruct", workdir)
    result["revision"] = directory.name if directory.parent.name == "snapshots" else "local"
    theirs = in_child(run_torch, inputs)
    result["share_of_prompts_tokenized_alike"] = statistics.fmean(map(operator.eq, theirs.pop("torch_ids"), inputs.ids))
    ours = in_child(run_jax, inputs)
    inputs.logits_file.unlink()
    # Our decoder leaves MASK behind a block that holds EOS; the published loop writes the whole canvas.
    equal = [[a == b for a, b in itertools.zip_longest(*pair) if b != inputs.special_ids["mask"]]
             for pair in zip(theirs["torch_tokens"], ours["jax_tokens"], strict=True)]
    result |= {**theirs, **ours, "share_of_greedy_tokens_equal": statistics.fmean(itertools.chain(*equal)),
               "share_of_answers_equal": statistics.fmean(map(all, equal))}
    if GSM8K.value:
        family = json.loads((directory / "config.json").read_text())["model_type"]
        result |= evaluate(directory, f"{family}-{kind}/gsm8k", workdir)


def fetch(name: str) -> pathlib.Path:
    """The directory of a model: `name` itself, or the snapshot of a Hub id, downloaded if necessary."""
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name).absolute()
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of the library, of its transport (whose errors it does not wrap) or of the disk
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"--models={name}: no such directory, and it cannot be fetched from the Hugging Face Hub: "
                         f"{reason}; check the name and the network, then repeat the command") from error


def prepare(directory: pathlib.Path, is_chat: bool, workdir: pathlib.Path) -> Comparison:
    """Tokenizes the prompts. Raises InputError if they and the answers exceed the context."""
    source = interop.open_model(directory)
    decode, context, tokenizer = source.config.decode, source.config.model.max_length, source.tokenizer
    ids = [encode_chat(tokenizer, as_messages(prompt), True) if is_chat else tokenizer.encode(prompt)
           for prompt in PROMPTS]
    block, new_tokens = decode.block_length, BLOCKS.value * decode.block_length
    length = max(map(len, ids)) + new_tokens
    if length > context:
        raise InputError(f"--blocks={BLOCKS.value}: prompt and blocks of {block} take {length} tokens, the context of "
                         f"{directory} is {context}")
    canvases = [prompt + [tokenizer.mask_id] * (length - len(prompt)) for prompt in ids]
    settings = {"max_new_tokens": new_tokens, "block_length": block, "steps_per_block": block, "length": decode.length,
                "temperature": 0.0, "reveal": "schedule", "confidence": "low_confidence", "stop_ids": ()}
    return Comparison(directory, DTYPE.value, MESH.value, is_chat, ids, canvases,
                      {"mask": tokenizer.mask_id, "eos": tokenizer.eos_id}, settings, workdir / "torch_logits.npy")


def as_messages(prompt: str) -> list[dict[str, str]]:
    """A conversation that begins with the prompt."""
    return [{"role": "user", "content": prompt}]


def in_child(function: Callable[[Comparison], dict[str, Any]], inputs: Comparison) -> dict[str, Any]:
    """Calls a function in a separate process, whose memory is freed afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, inputs).result()
        except BrokenProcessPool as error:
            raise InputError(f"{function.__name__}: its process was killed, most likely for lack of memory") from error


def run_torch(inputs: Comparison) -> dict[str, Any]:
    """Ids and greedy tokens of the published code; its logits go to the disk."""
    import torch
    import transformers

    sys.path.append(str(pathlib.Path(__file__).parent / "benchmarks"))
    from torch_llada import fixed_length, variable_length

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        options = {"pretrained_model_name_or_path": inputs.directory, "trust_remote_code": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
        classes = transformers.AutoConfig.from_pretrained(**options).auto_map
        auto = transformers.AutoModelForCausalLM if "AutoModelForCausalLM" in classes else transformers.AutoModel
        network = auto.from_pretrained(**options, torch_dtype=getattr(torch, inputs.dtype)).to(device).eval()
    except Exception as error:  # the authors' code may raise anything
        raise InputError(f"{inputs.directory}: transformers {transformers.__version__} cannot load the published code "
                         f"({type(error).__name__}: {error}); try pip install transformers==4.57.1") from error

    @torch.no_grad()
    def logits(tokens_L: torch.Tensor) -> torch.Tensor:
        return network(tokens_L[None].to(device)).logits[0].float().cpu()

    texts = [tokenizer.apply_chat_template(as_messages(prompt), tokenize=False, add_generation_prompt=True)
             if inputs.is_chat else prompt for prompt in PROMPTS]
    np.save(inputs.logits_file, np.stack([logits(torch.tensor(canvas)).numpy() for canvas in inputs.canvases]))
    decode = {"fixed": fixed_length, "variable": variable_length}[inputs.settings["length"]]
    budget = {key: inputs.settings[key] for key in ("max_new_tokens", "block_length", "steps_per_block")}
    return {"torch_device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "torch_ids": [tokenizer.encode(text, add_special_tokens=False) for text in texts],
            "torch_tokens": [decode(logits, prompt, inputs.special_ids, **budget) for prompt in inputs.ids]}


def run_jax(inputs: Comparison) -> dict[str, Any]:
    """Greedy tokens of our decoder, and our logits compared with those on the disk."""
    if inputs.dtype == "float32":  # GPUs and TPUs otherwise round the operands of matrix products
        jax.config.update("jax_default_matmul_precision", "highest")
    lm = api.load(str(inputs.directory), inputs.dtype, parse_mesh(inputs.mesh))
    compared = []
    for canvas, expected_LV in zip(inputs.canvases, np.load(inputs.logits_file, mmap_mode="r"), strict=True):
        masked = np.array(canvas) == lm.tokenizer.mask_id
        compared.append(compare_logits(np.asarray(lm.logits([canvas])[0])[masked], expected_LV[masked]))
    largest, kl, same_argmax = (np.concatenate(values) for values in zip(*compared, strict=True))
    answers = lm.generate(inputs.ids, **inputs.settings)
    return {"jax_device": jax.devices()[0].device_kind, "masked_positions": len(kl),
            "largest_logit_difference": float(largest.max()), "mean_kl_nats": float(kl.mean()),
            "share_of_argmax_equal": float(same_argmax.mean()),
            "jax_tokens": [answer.canvas[len(prompt):] for answer, prompt in zip(answers, inputs.ids, strict=True)]}


def compare_logits(got_QV: np.ndarray, expected_QV: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each position: largest absolute difference, KL(expected ‖ got) in nats, whether the argmax is the same."""
    if got_QV.shape != expected_QV.shape:
        raise InputError(f"logits: [positions, vocabulary] is {list(got_QV.shape)} here, {list(expected_QV.shape)} in "
                         "the published code")
    got_QV, expected_QV = got_QV.astype(np.float64), expected_QV.astype(np.float64)
    log_q_QV, log_p_QV = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (got_QV, expected_QV))
    return (np.abs(got_QV - expected_QV).max(-1), (np.exp(log_p_QV) * (log_p_QV - log_q_QV)).sum(-1),
            got_QV.argmax(-1) == expected_QV.argmax(-1))


def evaluate(directory: pathlib.Path, preset_name: str, workdir: pathlib.Path) -> dict[str, Any]:
    """GSM8K: exact match and its standard error for each way to find the answer, and the published number."""
    preset = find_preset(preset_name)
    output_dir = workdir / f"gsm8k-{GSM8K.value}-{DTYPE.value}"
    options = {"checkpoint": directory, "dtype": DTYPE.value, "mesh": MESH.value, "preset": preset_name,
               "limit": GSM8K.value, "output_dir": output_dir}
    if INCLUDE_PATH.value:
        options |= {"include_path": INCLUDE_PATH.value, "tasks": preset.local_task}
    command = [sys.executable, "-m", "illada_jax.evaluate", *(f"--{key}={value}" for key, value in options.items())]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code:
        raise InputError(f"illada_jax.evaluate failed with exit code {code}; its message is above")
    scores, = json.loads((output_dir / "results.json").read_text())["results"].values()
    found = {f"gsm8k_{key}": value for key, value in scores.items() if key.startswith("exact_match")}
    return {"gsm8k_preset": preset_name, "gsm8k_items": GSM8K.value, **found, "gsm8k_published": preset.target / 100}


def markdown(report: dict[str, Any]) -> str:
    """The table to post, a column for each model, and the versions."""
    results = report["models"].values()
    rows = dict.fromkeys(key for result in results for key in result if not key.endswith("_tokens"))
    lines = [f"| | {' | '.join(report['models'])} |", "|---" * (len(results) + 1) + "|"]
    for row in rows:
        values = [result.get(row, "") for result in results]
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| {row.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", ", ".join(f"{name} {version}" for name, version in report["versions"].items())])


if __name__ == "__main__":
    cli.run(main)
