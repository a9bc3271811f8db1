"""Makes golden/mergekit.safetensors: what mergekit gives for the recipes of mergekit_cases.py, in float32.

Run it in an environment of its own, which needs nothing of fastmerge:

    python -m venv mk && mk/bin/pip install mergekit==0.1.5 torch==2.13.0
    mk/bin/python tests/integrations/make_mergekit_golden.py
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from mergekit_cases import CASES, write_models
from safetensors.numpy import load_file, save_file


def main() -> None:
    out = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_models(folder)
        for i, (case, text) in enumerate(CASES.items()):
            recipe, merged = folder / f"{i}.yml", folder / f"out{i}"
            recipe.write_text(text.format(**paths) + "\ndtype: float32\n")
            command = [Path(sys.executable).with_name("mergekit-yaml"), recipe, merged]
            subprocess.run([*command, "--no-copy-tokenizer", "--no-write-model-card", "--quiet"], check=True)
            out |= {f"{case}|{name}": tensor for name, tensor in load_file(merged / "model.safetensors").items()}
    versions = {p: importlib.metadata.version(p) for p in ("mergekit", "torch")}
    save_file(out, Path(__file__).parent / "golden" / "mergekit.safetensors", versions)
    print(f"{len(CASES)} cases, {len(out)} tensors, {versions}")


if __name__ == "__main__":
    main()
