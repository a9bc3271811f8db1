"""A merge by FusionBench's own algorithm classes; runs in an environment that has fusion-bench, without fastmerge.

python fusion.py METHOD PARAMETERS(json) OUT BASE MODEL...

The weights of each checkpoint are put into a plain module, as FusionBench's model pools hold them. Its TIES trims over the
whole model where mergekit's trims each tensor: its results are another rule's, its times are comparable.
"""

import json
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    from fusion_bench.method import SimpleAverageAlgorithm, TaskArithmeticAlgorithm, TiesMergingAlgorithm
    from safetensors.torch import load_file, save_file
    from torch import nn

    method, parameters, out, base, *models = arguments
    p = json.loads(parameters)

    def module(folder: str) -> nn.Module:
        made = nn.Module()
        for file in sorted(Path(folder).glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                made.register_parameter(name.replace(".", "/"), nn.Parameter(tensor, requires_grad=False))
        return made

    pool = {f"model{i}": module(m) for i, m in enumerate(models)}
    if method == "linear":
        algorithm = SimpleAverageAlgorithm()
    elif method == "task_arithmetic":
        algorithm = TaskArithmeticAlgorithm(scaling_factor=p["weight"])
    elif method == "ties":
        algorithm = TiesMergingAlgorithm(
            scaling_factor=p["weight"], threshold=100 * p["density"], remove_keys=[], merge_func="mean"
        )
    else:
        raise SystemExit(f"fusion.py knows linear, task_arithmetic and ties, not {method}")
    if method != "linear":
        pool["_pretrained_"] = module(base)
    merged = algorithm.run(pool)
    Path(out).mkdir(parents=True, exist_ok=True)
    state = {name.replace("/", "."): t.detach().contiguous() for name, t in merged.state_dict().items()}
    save_file(state, Path(out) / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1:])
