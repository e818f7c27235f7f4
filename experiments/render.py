"""The table of results for people: RESULTS.md, and the short one in README.md."""

from pathlib import Path

from experiments.table import Result

SMALL = ("digits_", "mnist_", "mnist8bit_", "fashion_")
"""Rows that RESULTS.md shows and README.md does not."""
README_MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")


def write_pages(folder: Path, results: list[Result]) -> None:
    """RESULTS.md in `folder`, with its notes.md and figures/, and the table of the README.md above."""
    figures = sorted(path.name for path in (folder / "figures").glob("*.png"))
    notes, readme = folder / "notes.md", folder.parent / "README.md"
    said = notes.read_text(encoding="utf-8") if notes.exists() else ""
    (folder / "RESULTS.md").write_text(render(results, figures, said), encoding="utf-8")
    if readme.exists():
        readme.write_text(fill_readme(readme.read_text(encoding="utf-8"), results), encoding="utf-8")


def render(results: list[Result], figures: list[str], notes: str = "") -> str:
    """RESULTS.md: a table per data set and split, `notes` (what was tried and what fell short), then the curves."""
    parts = [
        "# Results",
        "Generated from `results.csv` by `python -m experiments.results render`. Scores are in percent, but bits per "
        "dimension and distances (lower is better) and PSNR in dB (mean ± standard deviation over seeds). "
        "MACs are per image, means over the split; % is the share of the static twin's. "
        "Latency is the median per image at batch 1, the static twin timed in the same run, alternating picture by "
        "picture; at 32 is the speed-up in batches of 32.",
    ]
    for data, split in dict.fromkeys((result.data, result.split) for result in results):
        parts.append(f"## {data}, {split}")
        parts += _section([result for result in results if (result.data, result.split) == (data, split)])
    parts += [notes.strip()] if notes.strip() else []
    parts += [f"![{name}](figures/{name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def _section(lines: list[Result]) -> list[str]:
    """Paragraphs about one data set and split: protocols, the table, hardware, commands."""
    parts = []
    for protocol in dict.fromkeys(result.protocol for result in lines if result.protocol):
        rows = dict.fromkeys(f"`{result.row}`" for result in lines if result.protocol == protocol)
        parts.append(f"{', '.join(rows)}: {protocol}")
    metric = " or ".join(dict.fromkeys(line.metric for line in lines))
    names = f"row|budget|{metric}|paper|seeds|MMAC|%|ms|static ms|speed-up|at 32|met|commit".split("|")
    table = [_cells(names), "|---|" + "---:|" * 10 + "---|---|"]
    for line in lines:
        paper = f"{line.paper_score} ({line.paper_mmacs} MMAC)" if line.paper_mmacs else line.paper_score
        cells = [f"`{line.row}`", line.budget, _score(line), paper, line.seeds, line.mmacs, line.macs_percent]
        table.append(_cells([*cells, *_times(line), line.met, line.commit]))
    parts.append("\n".join(table))
    parts += [f"Measured on {hardware}." for hardware in dict.fromkeys(line.hardware for line in lines)]
    parts.append("\n".join(["```", *dict.fromkeys(line.command for line in lines), "```"]))
    return parts


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _score(line: Result) -> str:
    return f"{line.score} ± {line.score_std}" if line.score_std else line.score


def _times(line: Result) -> list[str]:
    ratios = (line.speedup, line.batch32_speedup)
    return [line.latency_ms, line.static_latency_ms, *(f"{ratio}x" if ratio else "" for ratio in ratios)]


def fill_readme(readme: str, results: list[Result]) -> str:
    """`readme` with a short table of the results between its two markers, of each row the budget nearest to half,
    without rows of small data; as it is without markers."""
    begin, end = README_MARKERS
    if begin not in readme or end not in readme:
        return readme
    sets = list(dict.fromkeys((r.data, r.split) for r in results))
    nearest: dict[tuple[str, ...], Result] = {}
    large = [result for result in results if not result.row.startswith(SMALL)]
    for result in sorted(large, key=lambda r: abs(float(r.budget) - 0.5)):
        nearest.setdefault((result.row, result.data, result.split), result)
    shown = [r for each in sets for r in results if (r.data, r.split) == each and r in nearest.values()]
    lines = [
        "| row | data | budget | score | MACs, % of the twin | ms | twin, ms | speed-up | at batch 32 |",
        "|---|---|" + "---:|" * 7,
    ]
    for r in shown:
        cells = [f"`{r.row}`", f"{r.data}, {r.split}", r.budget, f"{r.metric} {_score(r)}", r.macs_percent]
        lines.append(_cells([*cells, *_times(r)]))
    before, after = readme.split(begin)[0], readme.split(end)[1]
    return before + "\n".join([begin, "", *lines, "", end]) + after
