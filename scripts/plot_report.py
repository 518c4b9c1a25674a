#!/usr/bin/env python3
"""Draws the figures of a quantisation from its JSON.

usage: scripts/plot_report.py REPORT.json OUTDIR [--format png|svg]

REPORT is what `llama-quant --report` wrote: of one run, or of --compare-grids (then every version is drawn).
Figures: loss by block with one line a projection (absolute and relative), versions compared, the weights'
histogram with its fitted normal, where the bits went, and (after --bpw) what each linear does to the output. A table
by thirds of the model goes to stdout: do deeper blocks, the MLP or o_proj stand out, and are weights symmetric?
Needs matplotlib (Debian: python3-matplotlib).
"""
import argparse
import json
import math
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLOURS = dict(zip(PROJECTIONS, plt.get_cmap("tab10").colors))


def series(blocks, projection, key):
    """Block ids and values of one projection; values that were not measured are left out."""
    points = [(b["block"], l[key]) for b in blocks for l in b["linears"] if l["name"] == projection]
    return [p for p in points if isinstance(p[1], (int, float)) and p[1] > 0]


def save(figure, folder, name, form):
    path = os.path.join(folder, f"{name}.{form}")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(path)


def by_block(blocks, title, folder, name, form):
    """The seed's figure, absolute on the left, relative beside it."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2))
    for axis, key, label in ((axes[0], "loss", "absolute loss ½ tr(ΔW (H + λI) ΔWᵀ)"),
                             (axes[1], "relative_loss", "relative loss")):
        for projection in PROJECTIONS:
            points = series(blocks, projection, key)
            if points:
                axis.plot(*zip(*points), marker=".", label=projection, color=COLOURS[projection])
        axis.set_yscale("log")
        axis.set_xlabel("block")
        axis.set_title(label)
        axis.grid(alpha=0.3)
    axes[0].legend(ncol=2, fontsize=8)
    figure.suptitle(title)
    save(figure, folder, name, form)


def versions_figure(versions, folder, form):
    """Loss of every version by block (summed over projections), and what the output lost."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2))
    for v in versions:
        sums = [(b["block"], sum(l["loss"] for l in b["linears"])) for b in v["blocks"]]
        axes[0].plot(*zip(*sums), marker=".", label=v["name"])
    axes[0].set_yscale("log")
    axes[0].set_xlabel("block")
    axes[0].set_title("absolute loss of a block")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high * 10)  # room for the legend
    axes[0].legend(fontsize=7, loc="upper left")
    axes[0].grid(alpha=0.3)
    names = [f'{v["name"]}\nPPL {v["ppl"]:.2f}' for v in versions]
    axes[1].barh(names, [v["kl_mean"] for v in versions])
    axes[1].invert_yaxis()
    axes[1].set_title("mean KL divergence of the output from the source")
    axes[1].tick_params(labelsize=7)
    save(figure, folder, "versions", form)


def weights_figure(blocks, folder, form):
    """Histogram of all weights of a projection, in units of each linear's deviation, against the normal."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.5))
    for axis, projection in zip(axes.flat, PROJECTIONS):
        shapes = [l["weights"] for b in blocks for l in b["linears"] if l["name"] == projection]
        bins = len(shapes[0]["histogram"])
        width = 8.0 / bins
        centres = [-4 + (i + 0.5) * width for i in range(bins)]
        counts = [sum(s["histogram"][i] for s in shapes) for i in range(bins)]
        total = sum(counts)
        axis.bar(centres, [c / total / width for c in counts], width=width, color=COLOURS[projection], alpha=0.6)
        axis.plot(centres, [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in centres], "k", lw=1)
        skew = sum(s["skew"] for s in shapes) / len(shapes)
        kurtosis = sum(s["kurtosis"] for s in shapes) / len(shapes)
        axis.set_title(f"{projection}: skew {skew:+.2f}, kurtosis {kurtosis:.1f}", fontsize=9)
        axis.set_yscale("log")
        axis.set_ylim(1e-5, 1)
    axes.flat[-1].axis("off")
    figure.suptitle("weights in units of their deviation (line: the normal fit; the outer bars hold what lies beyond)")
    save(figure, folder, "weights", form)


def bits_figure(blocks, folder, form):
    """Bits a weight of every linear, scales included."""
    grid = []
    for projection in PROJECTIONS:
        row = []
        for b in blocks:
            l = next(l for l in b["linears"] if l["name"] == projection)
            row.append(l["bits"] + (16 * math.ceil(l["k"] / l["group"]) / l["k"] if l["group"] else 0))
        grid.append(row)
    figure, axis = plt.subplots(figsize=(10, 2.8))
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(PROJECTIONS)), PROJECTIONS, fontsize=8)
    axis.set_xlabel("block")
    axis.set_title("bits a weight")
    figure.colorbar(image)
    save(figure, folder, "bits", form)


def effects_figure(effects, folder, form):
    """KL of the output with one linear alone rounded to nearest, measured."""
    figure, axis = plt.subplots(figsize=(8, 4))
    for unit in ("qkv", "o", "gate_up", "down"):
        points = sorted((int(name.split(".")[1]), e["kl_alone"]) for name, e in effects.items()
                        if name.endswith("." + unit))
        axis.plot(*zip(*points), marker=".", label=unit)
    axis.set_yscale("log")
    axis.set_xlabel("block")
    axis.set_title("KL of the output with this linear alone rounded to nearest")
    axis.legend()
    axis.grid(alpha=0.3)
    save(figure, folder, "effects", form)


def rank_correlation(points):
    """Spearman's, of block and value."""

    def ranks(values):
        order = sorted(range(len(values)), key=lambda i: values[i])
        result = [0] * len(values)
        for rank, i in enumerate(order):
            result[i] = rank
        return result

    n = len(points)
    if n < 2:
        return float("nan")
    a, b = ranks([p[0] for p in points]), ranks([p[1] for p in points])
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(a, b)) / (n * (n * n - 1))


def thirds_table(blocks, effects):
    """Means over the first, middle and last third of the blocks; how far block and loss rise together."""
    n = len(blocks)
    thirds = [blocks[: n // 3], blocks[n // 3 : n - n // 3], blocks[n - n // 3 :]]

    def mean(values):
        values = list(values)
        return sum(values) / len(values) if values else float("nan")

    total = sum(l["loss"] for b in blocks for l in b["linears"])
    print("| projection | share | absolute loss, by thirds | rank correlation with depth | relative loss, by thirds | "
          "rank correlation with depth | skew | kurtosis |")
    print("|---|---|---|---|---|---|---|---|")
    for projection in PROJECTIONS:
        rows = [[l for b in third for l in b["linears"] if l["name"] == projection] for third in thirds]
        every = [l for third in rows for l in third]
        print(f"| {projection} | {sum(l['loss'] for l in every) / total:.1%} | "
              + " / ".join(f"{mean(l['loss'] for l in r):.3g}" for r in rows)
              + f" | {rank_correlation(series(blocks, projection, 'loss')):+.2f} | "
              + " / ".join(f"{mean(l['relative_loss'] for l in r):.2g}" for r in rows)
              + f" | {rank_correlation(series(blocks, projection, 'relative_loss')):+.2f}"
              + f" | {mean(l['weights']['skew'] for l in every):+.3f} | {mean(l['weights']['kurtosis'] for l in every):.2f} |")
    if not effects:
        return
    print("\n| linear | KL with it alone rounded, by thirds |\n|---|---|")
    for unit in ("qkv", "o", "gate_up", "down"):
        values = [[effects[f"blk.{b['block']}.{unit}"]["kl_alone"] for b in third] for third in thirds]
        print(f"| {unit} | " + " / ".join(f"{mean(v):.3g}" for v in values) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report")
    parser.add_argument("outdir")
    parser.add_argument("--format", choices=["png", "svg"], default="png")
    args = parser.parse_args()
    with open(args.report, encoding="utf-8") as f:
        report = json.load(f)
    if report.get("schema") != 1:
        parser.error(f'{args.report}: schema {report.get("schema")}, expected 1')
    os.makedirs(args.outdir, exist_ok=True)
    if "versions" in report:
        versions_figure(report["versions"], args.outdir, args.format)
        for i, v in enumerate(report["versions"]):
            by_block(v["blocks"], v["name"], args.outdir, f"loss_{i}", args.format)
        weights_figure(report["versions"][0]["blocks"], args.outdir, args.format)
        thirds_table(report["versions"][0]["blocks"], {})
        return
    by_block(report["blocks"], os.path.basename(args.report), args.outdir, "loss", args.format)
    weights_figure(report["blocks"], args.outdir, args.format)
    bits_figure(report["blocks"], args.outdir, args.format)
    if report["effects"]:
        effects_figure(report["effects"], args.outdir, args.format)
    thirds_table(report["blocks"], report["effects"])


if __name__ == "__main__":
    main()
