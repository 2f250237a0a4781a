"""From scores of single tokens to rows, and from rows to a table and a picture. Needs neither torch nor a model."""

import numpy as np

TEXTS = ("prose", "code", "chat")
TARGETS = {"q8": 0.2e-3, "k8v5": 0.6e-3, "ecsq 1": 3e-3}  # of the KL over texts, on each model
HEAD = (
    "| codec | bits | ratio | RMS error of K / V, % | ppl, % | KL, 1e-3 | top-1, % "
    "| look-up: ppl, % | KL, 1e-3 | top-1, % |"
)


def score(reference, probabilities, log_p, targets):
    """What changed at each token; arrays of numpy or torch.

    Parameters
    ----------
    reference, log_p : (tokens, vocabulary)
        Logarithms of the probabilities of the next token: with the exact K and V, and with those that came back.
    probabilities : (tokens, vocabulary)
        Those of `reference`.
    targets : (tokens,)
        The tokens that came next.

    Returns
    -------
    (3, tokens) float64
        By how much the logarithm of the target's probability fell, KL(exact || restored), and 1 where the likeliest
        token is the same.
    """
    rows = range(len(targets))
    fallen = reference[rows, targets] - log_p[rows, targets]
    kl = (probabilities * (reference - log_p)).sum(-1)
    same = reference.argmax(-1) == log_p.argmax(-1)
    return np.stack([np.asarray(values, dtype=np.float64) for values in (fallen, kl, same)])


def summary(scores):
    """Means over the tokens of `scores`, (3, tokens); the standard error of a change is that of the paired tokens."""
    fallen, kl, same = scores
    ratio = np.exp(fallen.mean())
    return {
        "num_tokens": len(fallen),
        "ppl_change_percent": 100 * (ratio - 1),
        "ppl_error_percent": 100 * ratio * fallen.std(ddof=1) / len(fallen) ** 0.5,
        "kl": kl.mean(),
        "kl_error": kl.std(ddof=1) / len(kl) ** 0.5,
        "top1_percent": 100 * same.mean(),
    }


def row_of(name, bits, scores, errors):
    """A row of the JSON.

    Parameters
    ----------
    scores : dict
        Of each kind of document a list of what `score` returned.
    errors : (n, 4)
        Of each document the squares of K's errors, of K, of V's errors, and of V, summed.
    """
    whole = {kind: np.concatenate(found, axis=1) for kind, found in scores.items()}
    k_error, k, v_error, v = np.sum(errors, axis=0)
    texts = np.concatenate([whole[kind] for kind in TEXTS], axis=1)
    return {
        "codec": name,
        "bits": bits,
        "ratio": 16 / bits,
        "k_error_percent": 100 * (k_error / k) ** 0.5,
        "v_error_percent": 100 * (v_error / v) ** 0.5,
        "texts": summary(texts),
        **{kind: summary(found) for kind, found in whole.items()},
    }


def cells(found, target=None):
    missed = "!" if target is not None and found["kl"] > target else ""
    return [
        f"{found['ppl_change_percent']:+.2f} +-{found['ppl_error_percent']:.2f}",
        f"{1e3 * found['kl']:.3f}{missed}",
        f"{found['top1_percent']:.1f}",
    ]


def show(result):
    """Print the table of each model, in Markdown."""
    print(f"{result['machine']}, {result['date']}, `{result['command']}`; {result['versions']}.")
    for model in result["models"]:
        exact = ", ".join(f"{kind} {ppl:.1f}" for kind, ppl in model["perplexity"].items())
        counts = {name: model["rows"][0][name]["num_tokens"] for name in ("texts", "look-up")}
        print(
            f"\n{model['model']}, {model['num_layers']} layers, {model['num_heads']} KV heads of {model['head_dim']}: "
            f"a prefix of {model['prefix_tokens']} tokens saved and loaded, then {counts['texts']} tokens of prose, "
            f"code and chat scored, and {counts['look-up']} of look-up. Perplexity of the model as it is: {exact}.\n"
        )
        print(f"{HEAD}\n{'|---' * (HEAD.count('|') - 1)}|")
        for row in model["rows"]:
            errors = f"{row['k_error_percent']:.2f} / {row['v_error_percent']:.2f}"
            sizes = [f"{row[name]:.2f}" if row[name] > 0 else "n.a." for name in ("bits", "ratio")]
            line = [row["codec"], *sizes, errors]
            line += cells(row["texts"], TARGETS.get(row["codec"])) + cells(row["look-up"])
            print(f"| {' | '.join(line)} |")


def draw(result, path):
    """Draw KL against bits into a file of the format that its suffix names."""
    from matplotlib.figure import Figure  # no pyplot: no display and no global state

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    panel = figure.subplots()
    figure.suptitle("What a codec costs: KL of the next token, over prose, code and chat")
    for model, colour in zip(result["models"], ("#08519c", "#d95f0e"), strict=False):
        for row in model["rows"]:
            if row["texts"]["kl"] <= 0:
                continue  # exact
            if not row["bits"] > 0:
                continue  # unknown
            marker = "o" if row["codec"].startswith(("q8", "k8v5", "k6v4", "q4", "ecsq")) else "x"
            place = row["bits"], row["texts"]["kl"]
            panel.plot(*place, marker, color=colour)
            panel.annotate(row["codec"], place, (6, 4), textcoords="offset points", fontsize=8, color=colour)
        panel.plot([], [], "o", color=colour, label=model["model"])
    panel.set_yscale("log")
    panel.set_xlabel("bits of a number of K or V, everything counted")
    panel.set_ylabel("KL(exact || restored)")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path)
