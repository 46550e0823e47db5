"""Plans as text for a terminal and as tables for a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from illada_jax.planning.chips import CHIPS, GIB


def as_text(plan: dict[str, Any]) -> str:
    """One plan, every figure with its unit, the assumptions last."""
    axes = " × ".join(f"{name}={size}" for name, size in plan["mesh"].items())
    lines = [
        f"{plan['mode']} on {plan['num_slices']} × {plan['topology']} ({plan['chips']} chips), mesh {axes}",
        f"versions        {', '.join(f'{name} {version}' for name, version in plan['versions'].items())}",
        f"model           {plan['model']['parameters']:,} parameters, {plan['model']['dtype']}, attention "
        f"{plan['model']['attention']}, remat {plan['model']['remat']}",
        f"memory          {'fits' if plan['fits'] else 'DOES NOT FIT'}: arguments {_gib(plan['argument_bytes'])}, "
        f"temporaries {_gib(plan['temporary_bytes'])}, together {_gib(plan['total_bytes'])} of "
        f"{_gib(plan['available_bytes'])} on each device, {_gib(plan['headroom_bytes'])} to spare"
        + (f"; {_gib(plan['peak_bytes'])} in use at the peak" if plan.get("peak_bytes") else ""),
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
    if "saving" in plan:
        lines += _saving_lines(plan["saving"], bounds["best"])
    if "cost" in plan:
        lines.append(f"cost            {plan['cost']:,.0f}")
    if "largest_rows_per_device" in plan:
        lines.append(f"largest batch   {plan['largest_rows_per_device']} rows on a device in a micro-batch")
    for key, name in (("whole_logits", "whole logits"), ("replicated_params", "replicated parameters")):
        lines.append(f"{name:15} {'; '.join(plan[key]) or 'none in any buffer'}")
    return [*lines, plan["sharding"]]


def _saving_lines(saving: dict[str, Any], step: float) -> list[str]:
    lines = [f"a checkpoint    {saving['copy_seconds']:.1f} s to copy, {saving['write_seconds']:.0f} s to write"]
    for title, key in (("saving", "configured"), ("saving, best", "best")):
        figures = saving[key]
        lines.append(f"{title:15} every {figures['every']:,} steps ({figures['every'] * step / 60:,.1f} min): "
                     f"{figures['steps_lost']:,.1f} steps lost by an interruption on average, "
                     f"{figures['share_blocked']:.2%} of the time spent saving; with one every "
                     f"{saving['preemption_hours']:g} h {figures['share_lost']:.1%} of the time lost in all")
    return lines


def _inference_lines(plan: dict[str, Any]) -> list[str]:
    lines = [f"batch           {plan['rows']} rows on a canvas of {plan['canvas']:,}, block {plan['block_length']}, "
             f"cache {plan['cache']}, reveal {plan['reveal']}",
             f"params          {_gib(plan['param_bytes'])} on a device, {_weights(plan)}"]
    lines += [f"evaluation      {name}: {1e3 * b['best']:.2f} ms at best (compute {1e3 * b['compute']:.2f}, memory "
              f"{1e3 * b['hbm']:.2f}, interconnect {1e3 * b['ici']:.2f})" for name, b in plan["bounds"].items()]
    if plan["mode"] == "score":
        return [*lines, f"scoring         {plan['rows_per_second']:,.1f} rows/s at best"]
    return lines + [f"{rate['decoding']:15} {rate['tokens_per_second']:,.0f} tokens/s at best with "
                    f"{rate['tokens_per_evaluation']} tokens an evaluation" for rate in plan["rates"]]


# Tables: the head of each column, and its cells as a template.
_TRAIN_COLUMNS = {
    "case": "{name}", "topology": "{where}", "mesh (data, fsdp, tensor)": "{mesh_sizes}", "remat": "{model[remat]}",
    "rows/device × micro-batches": "{rows_per_device} × {microbatches}", "arguments GiB": "{argument_gib:.2f}",
    "temporaries GiB": "{temporary_gib:.2f}", "in use at the peak GiB": "{peak}",
    "spare GiB": "{headroom_gib:.2f}", "fusions s": "{bounds[fusions]:.2f}",
    "kernels s (at peak)": "{bounds[kernels]:.2f} ({bounds[kernels_at_peak]:.2f})", "HBM s": "{bounds[hbm]:.2f}",
    "ICI s": "{bounds[ici]:.2f}", "DCN s": "{bounds[dcn]:.2f}", "step s": "{bounds[best]:.2f}",
    "MFU bound": "{mfu_bound:.1%}", "kernels at peak": "{mfu_bound_with_kernels_at_peak:.1%}",
    "no overlap": "{mfu_without_overlap:.1%}", "days": "{days_text}", "saved every; steps lost; time saving": "{saved}",
    "whole logits; replicated parameters": "{buffers}",
}
_INFERENCE_COLUMNS = {
    "case": "{name}", "topology": "{where}", "mesh": "{mesh_sizes}", "rows": "{rows}", "canvas": "{canvas:,}",
    "weights": "{weights}", "params GiB": "{param_gib:.2f}", "temporaries GiB": "{temporary_gib:.2f}",
    "spare GiB": "{headroom_gib:.2f}",
}
_DECODE_COLUMNS = _INFERENCE_COLUMNS | {
    "cache": "{cache}", "ms at best: canvas; block": "{canvas_ms:,.1f}; {block_ms:,.1f}",
    "tokens/s at best: exact 1 / 2 / 4": "{exact}", "prefix cache 1 / 2 / 4": "{prefix cache}",
    "append cache 1 / 2 / 4": "{append cache}",
}
_SCORE_COLUMNS = _INFERENCE_COLUMNS | {"ms at best": "{canvas_ms:,.1f}", "rows/s at best": "{rows_per_second:,.1f}"}
_CHIP_COLUMNS = ("chip", "peak TFLOP/s (bf16)", "HBM GiB", "HBM GB/s", "links GB/s (one way)", "DCN GB/s", "clock GHz",
                 "devices")


def as_markdown(cases: list[dict[str, Any]]) -> str:
    """Tables of cases, each with a name and a plan or an error, of the chips, the arithmetic and every assumption."""
    planned = [case for case in cases if "plan" in case]
    train, decode, score = ([case for case in planned if case["plan"]["mode"] == mode]
                            for mode in ("train", "decode", "score"))
    train.sort(key=lambda case: -case["plan"]["mfu_bound"])
    sections = []
    if train:
        sections += ["## Training", "", _table(_TRAIN_COLUMNS, train),
                     "", f"## The first of them in full: {train[0]['name']}", "", "```", as_text(train[0]["plan"]),
                     "```"]
    for title, columns, selected in (("Decoding", _DECODE_COLUMNS, decode), ("Scoring", _SCORE_COLUMNS, score)):
        if selected:
            sections += ["", f"## {title}", "", _table(columns, selected)]
    failed = [f"- {case['name']}: {case['error']}" for case in cases if "error" in case]
    if failed:
        sections += ["", "## What does not fit, or does not compile", "", *failed]
    assumptions = dict.fromkeys(text for case in planned for text in case["plan"]["assumptions"])
    chips = [(name, f"{c.flops / 1e12:,.0f}", f"{c.hbm_bytes / GIB:.0f}", f"{c.hbm_bandwidth / 1e9:,.0f}",
              f"{c.ici_bandwidth / 1e9:.0f}", f"{c.dcn_bandwidth / 1e9:.2f}", f"{c.clock / 1e9:.2f}", str(c.devices))
             for name, c in CHIPS.items()]
    sections += ["", "## Arithmetic", "", *(f"- {text}" for text in _ARITHMETIC),
                 "", "## Assumptions", "", *(f"- {text}" for text in assumptions),
                 "", "## Chips", "", _lines([_CHIP_COLUMNS, *chips]),
                 "", "Sources: the pages of each chip at https://docs.cloud.google.com/tpu/docs (see "
                 "`planning/chips.py`)."]
    return "\n".join(sections).lstrip("\n") + "\n"


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
    "steps lost by an interruption = steps between checkpoints ÷ 2 + time to write one ÷ step; time spent saving = "
    "time to copy the state to the host ÷ time between checkpoints, plus the rest of the write if that takes longer",
    "MFU bound = model FLOPs ÷ peak ÷ step; days = configured steps × step",
]


def _values(case: dict[str, Any]) -> dict[str, Any]:
    """The values of a case's plan that the templates of the columns name."""
    plan = case["plan"]
    sizes = {f"{key.removesuffix('_bytes')}_gib": size / GIB for key, size in plan.items() if key.endswith("_bytes")}
    values = plan | sizes | {"name": case["name"], "mesh_sizes": ", ".join(map(str, plan["mesh"].values()))}
    values["where"] = plan["topology"] if plan["num_slices"] == 1 else f"{plan['num_slices']} × {plan['topology']}"
    if plan["mode"] == "train":
        values["peak"] = f"{sizes['peak_gib']:.2f}" if plan.get("peak_bytes") else "-"
        values["days_text"] = f"{plan['days']:,.0f}" if plan["steps"] else "-"
        saving = plan.get("saving", {}).get("configured")
        values["saved"] = "{every:,}; {steps_lost:,.1f}; {share_blocked:.2%}".format(**saving) if saving else "-"
        values["buffers"] = "; ".join(str(len(plan[key]) or "none") for key in ("whole_logits", "replicated_params"))
        return values
    values["weights"] = _weights(plan)
    values |= {f"{part}_ms": 1e3 * bounds["best"] for part, bounds in plan["bounds"].items()}
    for decoding in ("exact", "prefix cache", "append cache"):
        values[decoding] = " / ".join(f"{rate['tokens_per_second']:,.0f}" for rate in plan.get("rates", ())
                                      if rate["decoding"] == decoding)
    return values


def _weights(plan: dict[str, Any]) -> str:
    return "int8" if plan["quantize"] == "int8" else plan["model"]["dtype"]


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def _table(columns: Mapping[str, str], cases: Sequence[dict[str, Any]]) -> str:
    rows = [[cell.format_map(_values(case)) for cell in columns.values()] for case in cases]
    return _lines([list(columns), *rows])


def _lines(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rest])
