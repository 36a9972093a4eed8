"""Make `rpa/data/azure_2023_quantiles.json` from the Azure LLM inference trace 2023.

    python tools/fit_traces.py --data DIR

DIR holds AzureLLMInferenceTrace_conv.csv and AzureLLMInferenceTrace_code.csv, from
https://github.com/Azure/AzurePublicDataset. The result is the same on every machine.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent.parent / "rpa" / "data" / "azure_2023_quantiles.json"

FILES = {
    "conversation": "AzureLLMInferenceTrace_conv.csv",
    "code": "AzureLLMInferenceTrace_code.csv",
}

PROBABILITIES = sorted(
    {round(p, 4) for p in np.linspace(0, 1, 41)} | {0.001, 0.005, 0.01, 0.99, 0.995, 0.999}
)
"""Every 2.5 %, and finer at both ends, where few requests hold many of the tokens."""

NUM_GROUPS = 20

ABOUT = {
    "what": "Quantiles of request lengths in tokens; generated_tokens has one list for each "
    "twentieth of the requests, ordered by context.",
    "source": "Azure LLM inference trace 2023, https://github.com/Azure/AzurePublicDataset",
    "licence": "CC-BY 4.0",
    "cite": "Patel et al., Splitwise: Efficient generative LLM inference using phase splitting, "
    "ISCA 2024",
    "made_by": "python tools/fit_traces.py --data DIR",
}


def read_trace(path):
    """Return (context_tokens, generated_tokens) of every request of a trace file, i64[n] each."""
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=(1, 2), dtype=np.int64).T


def quantiles(values):
    """Return the quantiles of `values` at `PROBABILITIES`, each a value that did occur."""
    picked = np.quantile(values, PROBABILITIES, method="inverted_cdf")
    return [int(value) for value in picked]


def fit(context, generated):
    """Return the table of one service, see `rpa.traces.quantile_table`."""
    # Stable: requests of equal context stay in the file's order, so every run cuts them alike.
    by_context = np.argsort(context, kind="stable")
    return {
        "num_requests": len(context),
        "probabilities": PROBABILITIES,
        "context_tokens": quantiles(context),
        "generated_tokens": [
            quantiles(generated[group]) for group in np.array_split(by_context, NUM_GROUPS)
        ],
    }


def table(data_dir):
    """Return the whole JSON document from the files in `data_dir`."""
    services = {name: fit(*read_trace(data_dir / file)) for name, file in FILES.items()}
    return {"about": ABOUT, "services": services}


def as_text(document):
    """Return the document as JSON with every list of numbers on one line, so that a diff reads."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\[\s+([\d.,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def main():
    """Read the trace and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the two CSV files")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(as_text(table(parser.parse_args().data)), encoding="utf-8")
    print(f"wrote {OUT}, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
