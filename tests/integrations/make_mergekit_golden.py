"""Makes golden/mergekit.safetensors: what mergekit gives for the recipes of mergekit_cases.py, in float32.

Run it in an environment of its own, which needs nothing of fastmerge:

    python -m venv mk && mk/bin/pip install mergekit==0.1.5 torch==2.13.0
    mk/bin/python tests/integrations/make_mergekit_golden.py            # all cases, or only those whose name is given
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from mergekit_cases import CASES, write_models
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "golden" / "mergekit.safetensors"


def main(chosen: list[str]) -> None:
    cases = {case: CASES[case] for case in chosen or CASES}
    out = {k: v for k, v in load_file(GOLDEN).items() if k.partition("|")[0] in CASES.keys() - cases} if chosen else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_models(folder)
        for i, (case, text) in enumerate(cases.items()):
            recipe, merged = folder / f"{i}.yml", folder / f"out{i}"
            recipe.write_text(text.format(**paths) + "\ndtype: float32\n")
            command = [Path(sys.executable).with_name("mergekit-yaml"), recipe, merged]
            subprocess.run([*command, "--no-copy-tokenizer", "--no-write-model-card", "--quiet"], check=True)
            out |= {f"{case}|{name}": tensor for name, tensor in load_file(merged / "model.safetensors").items()}
    versions = {p: importlib.metadata.version(p) for p in ("mergekit", "torch")}
    save_file(out, GOLDEN, versions)
    print(f"{len(cases)} cases made, {len(out)} tensors in all, {versions}")


if __name__ == "__main__":
    main(sys.argv[1:])
