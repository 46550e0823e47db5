"""Plans as text for a terminal and as tables for a report."""

from typing import Any

from illada_jax.planning.chips import CHIPS
from illada_jax.planning.plan import gib


def as_text(plan: dict[str, Any]) -> str:
    """One plan, every figure with its unit, the assumptions last."""
    axes = " × ".join(f"{name}={size}" for name, size in plan["mesh"].items())
    lines = [
        f"{plan['mode']} on {plan['num_slices']} × {plan['topology']} ({plan['chips']} chips), mesh {axes}",
        f"versions        {', '.join(f'{name} {version}' for name, version in plan['versions'].items())}",
        f"model           {plan['model']['parameters']:,} parameters, {plan['model']['dtype']}, attention "
        f"{plan['model']['attention']}, remat {plan['model']['remat']}",
        f"memory          {'fits' if plan['fits'] else 'DOES NOT FIT'}: arguments {gib(plan['argument_bytes'])}, "
        f"temporaries {gib(plan['temporary_bytes'])}, together {gib(plan['total_bytes'])} of "
        f"{gib(plan['available_bytes'])} on each device, {gib(plan['headroom_bytes'])} to spare"
        + (f"; {gib(plan['peak_bytes'])} in use at the peak" if plan.get("peak_bytes") else ""),
        f"compiled in     {plan['compile_seconds']} s of processor time",
    ]
    lines += _train_lines(plan) if plan["mode"] == "train" else _inference_lines(plan)
    lines += ["assumptions", *(f"  - {text}" for text in plan["assumptions"])]
    return "\n".join(lines)


def _train_lines(plan: dict[str, Any]) -> list[str]:
    bounds, work = plan["bounds"], plan["work"]
    collectives = ", ".join(f"{kind} {size / 1e9:,.1f} GB" for kind, size in work["collectives"].items()) or "none"
    lines = [
        f"batch           {plan['batch_size']:,} rows of {plan['length']:,} tokens: {plan['microbatches']} "
        f"micro-batches of {plan['rows_per_device']} rows on a device",
        f"FLOPs           {bounds['model_flops']:.4g} of the model on a device (formula), {bounds['compute']:.3f} s at "
        "the peak",
        f"fusions         {bounds['fusions']:.3f} s ({work['cycles']:,.0f} cycles estimated by the compiler)",
        f"attention       {bounds['kernels']:.3f} s in kernels, {bounds['kernels_at_peak']:.3f} s at the peak "
        f"({', '.join(f'{count} × {name}' for name, count in work['kernels'].items())})",
        f"memory traffic  {bounds['hbm']:.3f} s ({work['hbm_bytes'] / 1e9:,.0f} GB)",
        f"interconnect    {bounds['ici']:.3f} s ({work['ici_bytes'] / 1e9:,.1f} GB sent; results of {collectives})",
        f"other slices    {bounds['dcn']:.3f} s ({work['dcn_bytes'] / 1e9:,.2f} GB sent)",
        f"step            {bounds['best']:.3f} s at best, {bounds['without_overlap']:.3f} s without overlap",
        f"MFU bound       {plan['mfu_bound']:.1%} = {bounds['compute']:.3f} s / {bounds['best']:.3f} s; "
        f"{plan['mfu_bound_with_kernels_at_peak']:.1%} with kernels at the peak, {plan['mfu_without_overlap']:.1%} "
        "without overlap",
        f"whole run       {plan['days']:,.1f} days for {plan['steps'] * plan['tokens_per_step'] / 1e12:,.3f} T tokens",
    ]
    if "cost" in plan:
        lines.append(f"cost            {plan['cost']:,.0f}")
    if "largest_rows_per_device" in plan:
        lines.append(f"largest batch   {plan['largest_rows_per_device']} rows on a device in a micro-batch")
    for key, name in (("whole_logits", "whole logits"), ("replicated_params", "replicated parameters")):
        lines.append(f"{name:15} {'; '.join(plan[key]) or 'none in any buffer'}")
    return [*lines, plan["sharding"]]


def _inference_lines(plan: dict[str, Any]) -> list[str]:
    weights = "int8" if plan["quantize"] == "int8" else plan["model"]["dtype"]
    lines = [f"batch           {plan['rows']} rows on a canvas of {plan['canvas']:,}, block {plan['block_length']}, "
             f"cache {plan['cache']}, reveal {plan['reveal']}",
             f"params          {gib(plan['param_bytes'])} on a device, {weights}"]
    lines += [f"evaluation      {name}: {1e3 * b['best']:.2f} ms at best (compute {1e3 * b['compute']:.2f}, memory "
              f"{1e3 * b['hbm']:.2f}, interconnect {1e3 * b['ici']:.2f})" for name, b in plan["bounds"].items()]
    if plan["mode"] == "score":
        return [*lines, f"scoring         {plan['rows_per_second']:,.1f} rows/s at best"]
    return lines + [f"{rate['decoding']:15} {rate['tokens_per_second']:,.0f} tokens/s at best with "
                    f"{rate['tokens_per_evaluation']} tokens an evaluation" for rate in plan["rates"]]


def as_markdown(cases: list[dict[str, Any]]) -> str:
    """Tables of compared plans, the best first, of the chips, the arithmetic and every assumption.

    Args:
      cases: {"name": …, "plan": …} or {"name": …, "error": …}.
    """
    made = [case for case in cases if "plan" in case]
    train = sorted((c for c in made if c["plan"]["mode"] == "train"), key=lambda c: -c["plan"]["mfu_bound"])
    sections = []
    if train:
        best = train[0]
        sections += ["## Training", "", _table(
            ["case", "topology", "mesh (data, fsdp, tensor)", "remat", "rows/device × micro-batches", "arguments GiB",
             "temporaries GiB", "in use at the peak GiB", "spare GiB", "fusions s", "kernels s (at peak)",
             "HBM s", "ICI s", "DCN s", "step s", "MFU bound", "kernels at peak", "no overlap", "days",
             "whole logits; replicated parameters"],
            [_train_row(case["name"], case["plan"]) for case in train]),
            "", f"## The first of them in full: {best['name']}", "", "```", as_text(best["plan"]), "```"]
    decoding = [case for case in made if case["plan"]["mode"] == "decode"]
    if decoding:
        sections += ["", "## Decoding", "", _table(
            [*_INFERENCE, "cache", "ms at best: canvas; block", "tokens/s at best: exact 1 / 2 / 4",
             "prefix cache 1 / 2 / 4"], [_decode_row(case["name"], case["plan"]) for case in decoding])]
    scoring = [case for case in made if case["plan"]["mode"] == "score"]
    if scoring:
        sections += ["", "## Scoring", "", _table(
            [*_INFERENCE, "ms at best", "rows/s at best"],
            [[*_inference_row(case["name"], case["plan"]), f"{1e3 * case['plan']['bounds']['canvas']['best']:,.1f}",
              f"{case['plan']['rows_per_second']:,.1f}"] for case in scoring])]
    failed = [case for case in cases if "error" in case]
    if failed:
        sections += ["", "## What does not fit, or does not compile", "",
                     *(f"- {case['name']}: {case['error']}" for case in failed)]
    assumptions = dict.fromkeys(text for case in made for text in case["plan"]["assumptions"])
    chips = [[name, f"{c.flops / 1e12:,.0f}", f"{c.hbm_bytes / 2**30:.0f}", f"{c.hbm_bandwidth / 1e9:,.0f}",
              f"{c.ici_bandwidth / 1e9:.0f}", f"{c.dcn_bandwidth / 1e9:.2f}", f"{c.clock / 1e9:.2f}", str(c.devices)]
             for name, c in CHIPS.items()]
    sections += ["", "## Arithmetic", "", *(f"- {text}" for text in _ARITHMETIC),
                 "", "## Assumptions", "", *(f"- {text}" for text in assumptions), "", "## Chips", "", _table(
        ["chip", "peak TFLOP/s (bf16)", "HBM GiB", "HBM GB/s", "links GB/s (one way)", "DCN GB/s", "clock GHz",
         "devices"], chips),
        "", "Sources: the pages of each chip at https://docs.cloud.google.com/tpu/docs (see `planning/chips.py`)."]
    return "\n".join(sections).lstrip("\n") + "\n"


_INFERENCE = ["case", "topology", "mesh", "rows", "canvas", "weights", "params GiB", "temporaries GiB", "spare GiB"]
_ARITHMETIC = [
    "it fits if arguments + outputs in memory of their own + temporaries, as the compiler lays them out, are no more "
    "than HBM; in use at the peak, arguments included, is less: the rest are gaps between arrays",
    "model FLOPs of a token = 3 × 2 × (layers × (projections + feed-forward + 2 × length × heads × width of a head) + "
    "d_model × vocabulary): forward once, backward twice; what is computed again is not counted",
    "fusions = cycles estimated by the compiler, loops multiplied out, ÷ clock; clock = peak ÷ FLOPs of the matrix "
    "units in a cycle",
    "kernels = FLOPs of the attention kernels (2 products forward, 5 backward, each 2 × length² × width of a head, per "
    "head, row and call) ÷ (peak × efficiency)",
    "HBM, ICI, DCN = bytes read and written, sent within a slice, sent to other slices ÷ the bandwidth of each",
    "step = max(fusions + kernels, HBM, ICI, DCN); without overlap = max(fusions + kernels, HBM) + ICI + DCN",
    "MFU bound = model FLOPs ÷ peak ÷ step; days = configured steps × step",
]


def _mesh(plan: dict[str, Any]) -> str:
    return ", ".join(str(size) for size in plan["mesh"].values())


def _where(plan: dict[str, Any]) -> str:
    return plan["topology"] if plan["num_slices"] == 1 else f"{plan['num_slices']} × {plan['topology']}"


def _train_row(name: str, plan: dict[str, Any]) -> list[str]:
    b = plan["bounds"]
    checks = "; ".join(str(len(plan[key])) if plan[key] else "none" for key in ("whole_logits", "replicated_params"))
    return [name, _where(plan), _mesh(plan), plan["model"]["remat"],
            f"{plan['rows_per_device']} × {plan['microbatches']}", _giga(plan["argument_bytes"]),
            _giga(plan["temporary_bytes"]), _giga(plan["peak_bytes"]) if plan.get("peak_bytes") else "-",
            _giga(plan["headroom_bytes"]), f"{b['fusions']:.2f}",
            f"{b['kernels']:.2f} ({b['kernels_at_peak']:.2f})", f"{b['hbm']:.2f}", f"{b['ici']:.2f}",
            f"{b['dcn']:.2f}", f"{b['best']:.2f}", f"{plan['mfu_bound']:.1%}",
            f"{plan['mfu_bound_with_kernels_at_peak']:.1%}", f"{plan['mfu_without_overlap']:.1%}",
            f"{plan['days']:,.0f}" if plan["steps"] else "-", checks]


def _inference_row(name: str, plan: dict[str, Any]) -> list[str]:
    weights = "int8" if plan["quantize"] == "int8" else plan["model"]["dtype"]
    return [name, _where(plan), _mesh(plan), str(plan["rows"]), f"{plan['canvas']:,}", weights,
            _giga(plan["param_bytes"]), _giga(plan["temporary_bytes"]), _giga(plan["headroom_bytes"])]


def _decode_row(name: str, plan: dict[str, Any]) -> list[str]:
    def rates(decoding: str) -> str:
        return " / ".join(f"{rate['tokens_per_second']:,.0f}" for rate in plan["rates"] if rate["decoding"] == decoding)

    bounds = "; ".join(f"{1e3 * plan['bounds'][part]['best']:,.1f}" for part in ("canvas", "block"))
    return [*_inference_row(name, plan), plan["cache"], bounds, rates("exact"), rates("prefix cache")]


def _giga(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
