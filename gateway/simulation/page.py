"""A simulation's report as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gateway.scenario import Swept
from gateway.simulation.figures import SHARES, Distributions
from gateway.simulation.plan import Plan
from gateway.simulation.records import PARTS
from gateway.simulation.runs import Outcome
from gateway.simulation.show import COLUMNS, MEASURED, Show, number
from gateway.simulation.summary import Row, Spread
from gateway.simulation.svg import Axis, Line, axis, bars, log_axis, plot
from policies.types import Kind

STYLE = """
:root{color-scheme:light dark;--ink:#1d2328;--paper:#fff;--soft:#66707a;--rule:#dde2e6}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8eb;--paper:#14181b;--soft:#98a2ab;--rule:#2e353b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:1120px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2.2rem}.soft,.soft li{color:var(--soft)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:1.2rem}
figure{margin:0}figcaption{font-weight:600;margin-bottom:.2rem}svg{width:100%;height:auto}
svg text{font-size:11px;fill:var(--soft)}.grid{stroke:var(--rule)}.line{fill:none;stroke-width:2}
.legend{display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:12px;color:var(--soft)}
.key i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:2px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:nth-child(-n+3),td:nth-child(-n+3){text-align:left}td small{color:var(--soft)}
"""


def page(plan: Plan, rows: Sequence[Row], outcomes: Sequence[Outcome], notes: Sequence[str]) -> str:
    scenario = plan.scenario
    sections = [
        f"<h1>{escape(scenario.name)}</h1><p>{escape(scenario.about)}</p>",
        _definitions(plan),
        "<h2>Figures</h2>" + _table(rows),
        "<h2>Attainment against load</h2>" + _plots(_attainment(rows, scenario.sweep.of)),
        "<h2>Latencies</h2>" + _plots(_latencies(outcomes)),
        "<h2>Queues and pools</h2>" + _plots(_timelines(outcomes)),
        "<h2>Where each request's time went</h2>" + _plots(_parts(rows)),
        "<h2>Notes</h2><ul class=soft>" + "".join(f"<li>{escape(n)}</li>" for n in notes) + "</ul>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(scenario.name)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _definitions(plan: Plan) -> str:
    scenario = plan.scenario
    targets = ", ".join(
        f"{it.name}: TTFT {it.ttft_ms:g} ms, TPOT {it.tpot_ms:g} ms"
        if it.kind is Kind.ONLINE
        else f"{it.name}: all within {it.window_s:g} s"
        for it in scenario.workload
    )
    return (
        f"<p class=soft>Targets: {escape(targets)}. TTFT: from arrival to the first token. "
        "TPOT: (last - first) / (tokens - 1). Kept: the share of all submitted requests; what was "
        "refused, failed or did not end has missed. "
        f"{MEASURED}. Online requests of the first "
        f"{scenario.warm_up_s:g} s are served and not counted. Medians of {len(scenario.seeds)} "
        "seeds, with the least and the most.</p>"
    )


def _table(rows: Sequence[Row]) -> str:
    names = [f"{what} p{share}" for what in ("TTFT ms", "TPOT ms") for share in (50, 90, 99)]
    keys = [f"{what}_ms_p{share}" for what in ("ttft", "tpot") for share in (50, 90, 99)]
    heads = ["load", "policy", "workload", *(name for name, _, _ in COLUMNS), *names]
    body = []
    for row in rows:
        cells = [f"{row.load:g}", escape(row.policy), escape(row.workload)]
        cells += [_cell(row.metrics[key], show) for _, key, show in COLUMNS]
        cells += [_cell(row.metrics[key], number) for key in keys]
        body.append("<tr>" + "".join(f"<td>{it}</td>" for it in cells) + "</tr>")
    head = "".join(f"<th>{escape(it)}</th>" for it in heads)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _cell(spread: Spread | None, show: Show) -> str:
    if spread is None:
        return "-"
    low, median, high = show(spread.low), show(spread.median), show(spread.high)
    return median if low == high else f"{median} <small>{low}-{high}</small>"


def _plots(plots: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(plots)}</div>'


def _attainment(rows: Sequence[Row], swept: Swept) -> list[str]:
    loads = [row.load for row in rows]
    across = axis(f"{swept} load", loads, from_zero=False)
    share = Axis(label="share of all submitted", low=0.0, high=1.0, percent=True)
    plots = []
    for workload in dict.fromkeys(row.workload for row in rows):
        own = [row for row in rows if row.workload == workload]
        for title, key in (
            ("", "attained"),
            (" TTFT", "ttft_attained"),
            (" TPOT", "tpot_attained"),
        ):
            lines = _by_policy(own, key)
            if any(line.points for line in lines):
                plots.append(
                    plot(f"{workload}: kept its{title or ' targets'}", across, share, lines)
                )
        tokens = _by_policy(own, "tokens_per_s")
        most = [y for line in tokens for _, y in line.points]
        plots.append(plot(f"{workload}: tokens/s", across, axis("tokens/s", most), tokens))
    return plots


def _by_policy(rows: Sequence[Row], key: str) -> list[Line]:
    lines = []
    for i, policy in enumerate(dict.fromkeys(row.policy for row in rows)):
        own = [(row.load, row.metrics[key]) for row in rows if row.policy == policy]
        points = [(load, spread.median) for load, spread in own if spread is not None]
        lines.append(Line(name=policy, points=points, colour=i))
    return lines


def _latencies(outcomes: Sequence[Outcome]) -> list[str]:
    """The first seed of every policy, at the lowest and the highest load."""
    share = Axis(label="share of those measured", low=0.0, high=1.0, percent=True)
    plots = []
    loads = sorted({it.facts.load for it in outcomes})
    for load in dict.fromkeys((loads[0], loads[-1])):
        shown = _first_seed(outcomes, load)
        for workload in dict.fromkeys(d.workload for it in shown for d in it.distributions):
            for what in ("ttft_ms", "tpot_ms"):
                lines = _distribution_lines(shown, workload, what)
                values = [x for line in lines for x, _ in line.points]
                title = f"{workload}: {what[:4].upper()} at load {load:g}"
                plots.append(plot(title, log_axis("ms", values), share, lines))
    return plots


def _first_seed(outcomes: Sequence[Outcome], load: float) -> list[Outcome]:
    found: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.facts.load == load:
            found.setdefault(outcome.facts.policy, outcome)
    return list(found.values())


def _distribution_lines(shown: Sequence[Outcome], workload: str, what: str) -> list[Line]:
    lines = []
    for i, outcome in enumerate(shown):
        own = [d for d in outcome.distributions if d.workload == workload]
        values = _values(own[0], what) if own else ()
        points = list(zip(values, SHARES, strict=False))
        lines.append(Line(name=outcome.facts.policy, points=points, colour=i))
    return lines


def _values(distributions: Distributions, what: str) -> tuple[float, ...]:
    return distributions.ttft_ms if what == "ttft_ms" else distributions.tpot_ms


def _timelines(outcomes: Sequence[Outcome]) -> list[str]:
    """The first seed of every policy at the highest load."""
    plots = []
    for outcome in _first_seed(outcomes, max(it.facts.load for it in outcomes)):
        timeline = outcome.timeline
        across = axis("seconds", timeline.times_s)
        for what, series in (("waiting", timeline.waiting), ("decoding", timeline.running)):
            lines = [
                Line(name=name, points=list(zip(timeline.times_s, values, strict=True)), colour=i)
                for i, (name, values) in enumerate(series.items())
                if any(values)
            ]
            most = [value for line in lines for _, value in line.points]
            title = f"{outcome.facts.policy}: {what}, load {outcome.facts.load:g}"
            plots.append(plot(title, across, axis("requests", most), lines))
    return plots


def _parts(rows: Sequence[Row]) -> list[str]:
    """Online requests; the time of decoding apart, because it dwarfs the rest."""
    plots = []
    for load in sorted({row.load for row in rows}):
        own = [row for row in rows if row.load == load and row.parts_ms]
        names = [f"{row.policy}, {row.workload}" for row in own]
        before = [row.parts_ms[:-1] for row in own]
        title = f"before the first token, load {load:g}"
        plots.append(bars(title, "mean ms", names, PARTS[:-1], before))
        after = [row.parts_ms[-1:] for row in own]
        plots.append(bars(f"after it, load {load:g}", "mean ms", names, PARTS[-1:], after))
    return plots
