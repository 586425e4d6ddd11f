"""The HTML of a report: a page that asks for nothing outside itself and runs no script."""

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import Any

from fastppo.report.plots import Panel
from fastppo.report.runs import Run, column, first_and_last, lost

# names of the metric, title, format
FIGURES = (
    (("env/reward_mean", "objective/scores"), "reward", "{:.2f}"),
    (("objective/kl",), "KL, nats per response", "{:.1f}"),
    (("ppo/policy/entropy", "policy/entropy_avg", "entropy"), "entropy, nats per token", "{:.2f}"),
    (("loss",), "loss", "{:.3f}"),
    (("mean_token_accuracy", "accuracy"), "accuracy", "{:.1%}"),
    (("perf/response_tokens_per_second",), "response tokens per second", "{:,.0f}"),
    (("report/peak_memory_gib",), "peak memory, GiB", "{:.2f}"),
)
SAMPLES = 12
STYLE = """
:root{color-scheme:light dark;--ink:#1f2933;--pale:#5b6672;--line:#e4e7eb;--wash:#f6f7f9;--paper:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--pale:#a3adb8;--line:#39424c;--wash:#222a32;--paper:#161b20}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--ink);background:var(--paper);max-width:1180px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:18px;margin:40px 0 12px;overflow-wrap:anywhere}
p.sub{color:var(--pale);margin:0 0 20px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,178px),1fr));gap:12px;margin:16px 0}
.tile{background:var(--wash);border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:18px;white-space:nowrap;font-variant-numeric:tabular-nums}.tile span{color:var(--pale);font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px}
.plots img{width:100%;height:auto;display:block;border:1px solid var(--line);border-radius:10px;padding:10px}
.scroll{overflow-x:auto;margin-bottom:12px}table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--pale);font-weight:600;white-space:nowrap}th,td{padding:8px 10px;border-bottom:1px solid var(--line);vertical-align:top}
th.num,td.num{text-align:right;font-variant-numeric:tabular-nums}td.num{white-space:nowrap}
.summary th,.summary td{padding:8px 6px}.summary th.num{white-space:normal}.summary .num{font-size:13px}
td.text{min-width:190px}td.text div{white-space:pre-wrap;overflow-wrap:anywhere;max-height:15em;overflow-y:auto}
td.name{overflow-wrap:anywhere;min-width:120px;font-weight:600}
details{margin:8px 0}summary{cursor:pointer;overflow-wrap:anywhere}
pre{background:var(--wash);border-radius:10px;padding:12px 16px;overflow-x:auto;font-size:13px}
@media(max-width:640px){body{padding:20px 16px 48px}.samples tr{display:block;padding:10px 0;border-bottom:1px solid var(--line)}
.samples th{display:none}.samples td{display:block;border:0;padding:2px 0}.samples td.num{text-align:left}
.samples td::before{content:attr(data-name);color:var(--pale);font-size:12px;display:block}}
@media(prefers-color-scheme:dark){.plots img{filter:invert(.9) hue-rotate(180deg);border-color:#ddd}}
@media print{.plots{grid-template-columns:1fr 1fr}td.text div{max-height:none}}
"""


def ends(run: Run, keys: Sequence[str], form: str) -> str:
    """'first → last' of a metric, one number for a run of one step, '' when the run lacks it."""
    found = first_and_last(run, keys)
    if not found:
        return ""
    first, last = (form.format(x) for x in found)
    first, last = (x if re.search("[1-9]", x) else x.lstrip("-") for x in (first, last))  # no sign before a zero
    return last if len(column(run, keys)[1]) == 1 else f"{first} → {last}"


def summary(runs: Sequence[Run]) -> str:
    """The few numbers that a reader wants first: tiles for one run, a table for several."""
    shown = [figure for figure in FIGURES if any(first_and_last(run, figure[0]) for run in runs)]
    if len(runs) == 1:
        cells = [(f"{runs[0].rows[-1]['step']:,}", "steps")]
        cells += [(ends(runs[0], keys, form), title) for keys, title, form in shown]
        return (
            f'<div class="tiles">{"".join(f"<div class=tile><b>{v}</b><span>{t}</span></div>" for v, t in cells)}</div>'
        )
    head = "".join(f'<th class="num">{title}</th>' for _, title, _ in shown)
    rows = []
    for run in runs:
        numbers = "".join(f'<td class="num">{ends(run, keys, form)}</td>' for keys, _, form in shown)
        rows.append(
            f'<tr><td class="name">{html.escape(run.name)}</td><td class="num">{run.rows[-1]["step"]:,}</td>{numbers}</tr>'
        )
    return f'<div class="scroll"><table class="summary"><tr><th>run</th><th class="num">steps</th>{head}</tr>{"".join(rows)}</table></div>'


def gaps(runs: Sequence[Run]) -> str:
    """Metrics of the summary that were no numbers in some steps: the means leave these out, so they have to be told."""
    told = []
    for run in runs:
        for keys, title, _ in FIGURES:
            if found := lost(run, keys):
                steps = f"{found[0]:,} of {len(run.rows):,} steps, step {found[1]:,} the last"
                told.append(f"<p><b>{html.escape(run.name)}: {title} was NaN or infinite in {steps}.</b></p>")
    return "".join(told)


def sample_table(run: Run) -> str:
    """Answers to the same prompts before and after; without those, the last step's samples."""
    before, after = (pairs(run, name) for name in ("before", "after"))
    rows = []
    if before and after:
        head = '<th>prompt</th><th>before</th><th class="num">score</th><th>after</th><th class="num">score</th>'
        for old, new in list(zip(before, after, strict=False))[:SAMPLES]:
            rows.append(text_cell(old["prompt"], "prompt") + answer(old, "before") + answer(new, "after"))
    else:
        last = pairs(run, "last_step") or after or before
        when = "in the last step" if pairs(run, "last_step") else "after training" if after else "before training"
        head = f'<th>prompt</th><th>response {when}</th><th class="num">score</th>'
        rows += [text_cell(sample["prompt"], "prompt") + answer(sample, "response") for sample in last[:SAMPLES]]
    if not rows:
        return ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f'<table class="samples"><tr>{head}</tr>{body}</table>'
    return f'<h2>Samples: {html.escape(run.name)}</h2><div class="scroll">{table}</div>'


def pairs(run: Run, name: str) -> list[dict[str, Any]]:
    """The entries of samples.json under `name` that have a prompt and a response."""
    found = run.samples.get(name)
    return (
        [s for s in found if isinstance(s, dict) and {"prompt", "response"} <= set(s)]
        if isinstance(found, list)
        else []
    )


def text_cell(text: Any, name: str) -> str:
    return f'<td class="text" data-name="{name}"><div>{html.escape(str(text))}</div></td>'


def answer(sample: dict[str, Any], name: str) -> str:
    score = sample.get("score")
    told = f"{score:.2f}" if isinstance(score, (int, float)) else ""
    return f'{text_cell(sample["response"], name)}<td class="num" data-name="score">{told}</td>'


def differences(runs: Sequence[Run]) -> str:
    """The settings and versions in which the runs differ, one row each; runs that recorded none are left out."""
    runs = [run for run in runs if run.settings or run.about]
    flat = [run.settings | {name: value for name, value in run.about.items() if isinstance(value, str)} for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = [(name, [values.get(name, "—") for values in flat]) for name in names]
    rows = [(name, values) for name, values in rows if any(value != values[0] for value in values)]
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><td>{html.escape(str(name))}</td>{''.join(f'<td>{html.escape(str(v))}</td>' for v in values)}</tr>"
        for name, values in rows
    )
    return f'<h2>What differs</h2><div class="scroll"><table><tr><th>setting</th>{head}</tr>{body}</table></div>'


def details(run: Run) -> str:
    """Configuration and versions, folded."""
    import yaml

    parts = []
    for title, values in (("Configuration", run.settings), ("Versions and machine", run.about)):
        name = html.escape(run.name)
        if values:
            text = html.escape(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
            parts.append(f"<details><summary>{title}: {name}</summary><pre>{text}</pre></details>")
        else:
            parts.append(f'<p class="sub">{title}: {name} has recorded none.</p>')
    return "".join(parts)


def machine(runs: Sequence[Run]) -> str:
    """'fastppo 0.1.0, torch 2.13.0, cpu' of the first run that says so."""
    about = next((run.about for run in runs if run.about), {})
    told = [f"{name} {about[name]}" for name in ("fastppo", "torch", "transformers") if name in about]
    device = about.get("gpu") if about.get("device") not in (None, "cpu") else about.get("cpu")
    return html.escape(", ".join([*told, *([str(device)] if device else [])]))


def picture(figure: Any, panel: Panel, runs: Sequence[Run]) -> str:
    """The figure as an SVG image inside the page (as data, so that scripts and styles cannot reach it)."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastppo"}):  # the same run gives the same page
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    told = [f"{run.name}: {ends(run, keys, '{:.3g}')} {label}" for run in runs for keys, label in panel.lines]
    alt = f"{panel.title}, {panel.unit}. First to last tenth: {'; '.join(t.strip() for t in told)}"
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def page_text(runs: Sequence[Run], pictures: Sequence[str]) -> str:
    """The whole page."""
    names = html.escape(", ".join(run.name for run in runs))
    curves = f'<div class="plots">{"".join(pictures)}</div>' if pictures else "<p>No metric that is plotted.</p>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastppo: {names}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>{names}</h1><p class="sub">{machine(runs)}</p>'
        f'{summary(runs)}{gaps(runs)}<p class="sub">Means over the first → the last tenth of the steps.</p>'
        f'<h2>Curves</h2><p class="sub">Thin lines are single steps, thick lines their trailing mean.</p>{curves}'
        f"{differences(runs)}{''.join(map(sample_table, runs))}<h2>How it was run</h2>{''.join(map(details, runs))}</body></html>"
    )
